"""AutoAttack (Croce & Hein, 2020, arXiv 2003.01690), standard version, by the package pyautoattack."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..attacks.threat import ThreatModel
from ..errors import EnvironmentProblem, UsageError

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Attacks in the order of the standard version; each attacks the survivors of the previous ones."""

_NORMS = {"linf": "Linf", "l2": "L2"}
_LEAST_CLASSES = 4
_TARGETS = 9


def check_classes(classes: int) -> None:
    """Raise UsageError for fewer than four classes, for which the targeted attacks are not defined."""
    if classes < _LEAST_CLASSES:
        raise UsageError(
            f"the standard ensemble needs at least {_LEAST_CLASSES} classes, the model has {classes}. Use --tier "
            "aa-fast."
        )


class _Contiguous(nn.Module):
    """Makes inputs and logits contiguous, since the ensemble calls `view`, which fails on channels_last tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.contiguous())
        return logits.contiguous()


class StandardEnsemble:
    """The attacks of AutoAttack's standard version, one at a time.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; in eval mode.
        threat: norm and radius, > 0.
        classes: number of classes K >= 4; the targeted attacks have min(9, K - 1) targets.
        seed: random seed of the attacks.
        device: device of the images.

    Raises:
        EnvironmentProblem: pyautoattack is not installed.
        UsageError: there are fewer than four classes, for which the targeted attacks are not defined.
    """

    def __init__(self, model: nn.Module, threat: ThreatModel, classes: int, seed: int, device: torch.device) -> None:
        check_classes(classes)
        try:
            from pyautoattack import AutoAttack
        except ImportError as error:
            raise EnvironmentProblem(
                f"the standard tier needs pyautoattack ({error}). Run: pip install pyautoattack"
            ) from error
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        self._ensemble = AutoAttack(
            _Contiguous(model), norm=_NORMS[threat.norm], eps=threat.epsilon, seed=seed, device=device
        )
        targets = min(_TARGETS, classes - 1)
        self._ensemble.apgd_targeted.n_target_classes = targets
        self._ensemble.fab.n_target_classes = targets
        self._devices = [device] if device.type == "cuda" else []

    def points(self, attack: str, x: Tensor, y: Tensor) -> Tensor:
        """Return images [N, C, H, W] after one attack: misclassified where it succeeded, unchanged elsewhere.

        Args:
            attack: a name from `ATTACKS`.
            x, y: correctly classified images [N, C, H, W] in [0, 1], and their labels [N].
        """
        self._ensemble.attacks_to_run = [attack]
        x = x.contiguous()
        # AutoAttack seeds torch's global generators.
        with torch.random.fork_rng(self._devices):
            found: Tensor = self._ensemble.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return found
