"""Threat models."""

from __future__ import annotations

import pytest

from robust_prune.attacks import ThreatModel
from robust_prune.errors import UsageError


@pytest.mark.parametrize(("arguments", "text"), [(("l1", 0.1), "norm must be"), (("linf", -1.0), "epsilon must be")])
def test_threat_model_refuses_nonsense(arguments, text):
    with pytest.raises(UsageError, match=text):
        ThreatModel(*arguments)
