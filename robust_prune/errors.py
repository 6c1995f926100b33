"""Errors for users; each message says what was requested, what was found and what to do."""

from __future__ import annotations


class RobustPruneError(Exception):
    """Base class of errors that end a command with a one-line message.

    Attributes:
        exit_code: exit status of the process: 2 usage, 3 environment, 4 failed quality gate.
    """

    exit_code: int = 2


class UsageError(RobustPruneError):
    """The request is wrong: a path, value, name or key."""

    exit_code = 2


class EnvironmentProblem(RobustPruneError):
    """The machine lacks something that the request needs: a package, a device or disk space."""

    exit_code = 3


class QualityGateError(RobustPruneError):
    """A result failed a check of its correctness, such as ONNX parity."""

    exit_code = 4
