"""The standard's own ensemble, AutoAttack (Croce & Hein, 2020, arXiv 2003.01690), from the package pyautoattack."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..attacks.threat import ThreatModel
from ..errors import EnvironmentProblem, UsageError

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""In the order in which the standard runs them, each on what survived those before."""

_NORMS = {"linf": "Linf", "l2": "L2"}
_LEAST_CLASSES = 4
_TARGETS = 9


def check_classes(classes: int) -> None:
    """Raises UsageError for fewer classes than the ensemble's targeted attacks are defined for."""
    if classes < _LEAST_CLASSES:
        raise UsageError(
            f"the standard ensemble needs at least {_LEAST_CLASSES} classes, the model has {classes}. Use --tier "
            "aa-fast."
        )


class _Contiguous(nn.Module):
    """Takes any memory layout: the ensemble's views fail on channels_last outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.contiguous())
        return logits.contiguous()


class StandardEnsemble:
    """AutoAttack's standard version on one batch, attack by attack.

    Args:
        model: maps [0, 1] images to logits [N, K], K >= 4; in eval mode.
        threat: norm and radius, > 0.
        classes: K; below 10, as many targets as there are other classes.
        seed: of its random numbers.
        device: where the images are.

    Raises:
        EnvironmentProblem: pyautoattack is not installed.
        UsageError: fewer than four classes, for which its targeted attacks are not defined.
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
        """Images [N, C, H, W] after one of `ATTACKS`: misclassified ones where it succeeded, the others as they came.

        Args:
            attack: a name of `ATTACKS`.
            x, y: images in [0, 1] that are classified rightly, and their labels.
        """
        self._ensemble.attacks_to_run = [attack]
        x = x.contiguous()
        # It seeds torch's global generators.
        with torch.random.fork_rng(self._devices):
            found: Tensor = self._ensemble.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return found
