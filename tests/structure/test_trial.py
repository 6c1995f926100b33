"""The proof that a group may go."""

from __future__ import annotations

from dataclasses import replace

from builders.surgery_models import (
    Residual,
    example,
)

from robust_prune.structure.groups import find_candidates
from robust_prune.structure.trial import Candidate, Cut, Trial


def test_the_proof_catches_a_wrong_channel() -> None:
    trial = Trial(Residual(), example())
    candidate = next(c for c in find_candidates(trial)[0] if c.group.name == "stem")
    slices = list(candidate.group.slices)
    where = next(i for i, s in enumerate(slices) if (s.target, s.side) == ("conv1", "in"))
    slices[where] = replace(slices[where], root=slices[where].root[::-1])
    wrong = Candidate(replace(candidate.group, slices=tuple(slices)))
    outcome = trial.attempt([Cut(wrong, (0, 1, 4))])
    assert "differs from the masked dense model" in outcome.reason
    assert trial.small.stem.out_channels == 12
    assert trial.attempt([Cut(candidate, (0, 1, 4))]).reason == ""
    assert trial.small.stem.out_channels == 9
