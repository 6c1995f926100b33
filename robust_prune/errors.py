"""Errors that a user meets: each says what was asked, what was found and what to do."""

from __future__ import annotations


class RobustPruneError(Exception):
    """Base of every error that ends a command in one clear line.

    Attributes:
        exit_code: the process's exit status: 2 usage, 3 environment, 4 a quality gate failed.
    """

    exit_code: int = 2


class UsageError(RobustPruneError):
    """The request cannot be carried out as written: a wrong path, value, name or key."""

    exit_code = 2


class EnvironmentProblem(RobustPruneError):
    """The machine lacks something that the request needs: a package, a device, disk space."""

    exit_code = 3


class QualityGateError(RobustPruneError):
    """A result was made but failed a check that guards its truth, such as ONNX parity."""

    exit_code = 4
