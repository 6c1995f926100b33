"""The command line; commands are imported only when they run, so that help is fast."""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError
from rich.console import Console

from . import __version__
from .errors import RobustPruneError

app = App(
    name="robust-prune",
    version=__version__,
    help="Prunes adversarially trained vision models and reports the robust accuracy and the latency that are left, in "
    "one table.\n\nStart with: robust-prune compress demo --ratio 0.5",
    # Only `main` ends the process, so that tests and Python callers can continue and Ctrl-C can explain how to resume.
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
_COMMANDS = {
    "compress": "Prune a robust model, fine-tune it, and report its robust accuracy and latency.",
    "train": "Train a robust model from scratch.",
    "sensitivity": "Measure the Module Robustness Sensitivity (MRS) of each layer.",
    "evaluate": "Measure clean and robust accuracy of a model.",
    "export": "Write a model as an ONNX file, checked against a float64 reference.",
    "bench": "Measure the latency of ONNX files side by side.",
    "report": "Write the report of a finished run again, or compare several runs.",
    "doctor": "Check the installation and the hardware, and name repairs.",
}
for _name, _help in _COMMANDS.items():
    app.command(f"robust_prune.commands.{_name}:{_name}", name=_name, help=_help)
app.command("robust_prune.commands.recipes:app", name="recipes", help="List, show, copy or explain recipes.")


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; errors end the process with an exit code.

    Exit codes: 0 success, 2 usage, 3 environment, 4 failed quality gate, 130 interrupted. A traceback is shown only
    with ``--debug``.

    Args:
        arguments: the command line; by default ``sys.argv[1:]``.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    problems = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except (CycloptsError, RobustPruneError) as error:
        if debug:
            raise
        problems.print(f"error: {_one_line(error)}", markup=False)
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        problems.print("interrupted; run the same command again to go on from here", markup=False)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
