"""Attacks: pure functions of a model, images, labels and a threat model."""

from .apgd import apgd
from .context import frozen_eval, kept_buffers
from .pgd import default_step_size, input_gradient, pgd
from .projections import project, random_start, share_of_batch
from .single_step import n_fgsm
from .square import square
from .threat import Norm, ThreatModel

__all__ = [
    "Norm",
    "ThreatModel",
    "apgd",
    "default_step_size",
    "frozen_eval",
    "input_gradient",
    "kept_buffers",
    "n_fgsm",
    "pgd",
    "project",
    "random_start",
    "share_of_batch",
    "square",
]
