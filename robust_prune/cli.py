"""The command line; commands are imported only when they run, so that help is fast."""

from __future__ import annotations

import difflib
import io
import os
import sys
from dataclasses import dataclass
from typing import Literal, NoReturn

from cyclopts import App, CycloptsError, Group, MissingArgumentError, UnknownOptionError, UnusedCliTokensError
from cyclopts.completion.detect import ShellDetectionError

from . import __version__, last_resort
from .errors import EnvironmentProblem, RobustPruneError, UsageError
from .interruption import Terminated, interruptible
from .printable import printable
from .suggest import question

ISSUES = "https://github.com/robust-prune/robust-prune/issues"
OPTIONS = Group("Options", sort_key=9)
app = App(
    name="robust-prune",
    version=__version__,
    help="Prunes adversarially trained vision models and reports the robust accuracy and the latency that are left, in "
    "one table.\n\nStart with: robust-prune compress demo --ratio 0.5",
    # Only `main` ends the process, so that tests and Python callers can continue and Ctrl-C can explain how to resume.
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app["--help"].group = app["--version"].group = OPTIONS


@dataclass(frozen=True)
class Verb:
    """What help and errors say of a command: its purpose, its arguments as usage shows them, and an example."""

    purpose: str
    arguments: str
    example: str


_MODEL = "[OPTIONS] MODEL"
_VERBS = {
    "compress": Verb(
        "Prune a robust model, fine-tune it, and report its robust accuracy and latency.",
        _MODEL,
        "compress demo --ratio 0.5",
    ),
    "frontier": Verb(
        "Compress a robust model by several ratios, and report all models in one table and one plot.",
        _MODEL,
        "frontier demo --ratio 0.3,0.5,0.75,0.9",
    ),
    "train": Verb(
        "Train a robust model from scratch.",
        "[OPTIONS]",
        "train --arch cifar/resnet18 --data cifar10 --epochs 30",
    ),
    "sensitivity": Verb(
        "Measure the Module Robustness Sensitivity (MRS) of each layer.",
        _MODEL,
        "sensitivity demo --estimator boundary --out runs/mrs",
    ),
    "evaluate": Verb(
        "Measure clean and robust accuracy of a model on test images.",
        _MODEL,
        "evaluate demo --tier aa-fast --out card.json",
    ),
    "export": Verb(
        "Write a model as an ONNX file, checked against a float64 reference.",
        _MODEL,
        "export demo --out demo.onnx --precision fp16,int8",
    ),
    "bench": Verb(
        "Measure the latency of ONNX files side by side.",
        "[OPTIONS] FILES...",
        "bench dense.onnx model.onnx --batch 1,8",
    ),
    "report": Verb(
        "Write the report of a finished run again, or compare several runs.",
        "[OPTIONS] RUNS...",
        "report runs/half runs/quarter --out runs/both",
    ),
    "verify": Verb(
        "Check that the files of a run are those that it wrote, and classify a sample of images again.",
        "[OPTIONS] RUN",
        "verify runs/half",
    ),
    "doctor": Verb("Check the installation and the hardware, and name repairs.", "", "doctor"),
}
_MODULES = {"frontier": "compress"}
for _name, _verb in _VERBS.items():
    app.command(
        f"robust_prune.commands.{_MODULES.get(_name, _name)}:{_name}",
        name=_name,
        help=f"{_verb.purpose}\n\nExample: robust-prune {_verb.example}",
        usage=f"Usage: robust-prune {_name} {_verb.arguments}".rstrip(),
    )
app.command("robust_prune.commands.recipes:app", name="recipes", help="List, show, copy or explain recipes.")
app.command("robust_prune.commands.cache:app", name="cache", help="List or remove results that commands share.")


@app.command(name="--install-completion", group=OPTIONS)
def install_completion(*, shell: Literal["bash", "zsh", "fish", "powershell"] | None = None) -> None:
    """Make the shell complete commands and flags: writes a script, and a line to the shell's startup file.

    Parameters
    ----------
    shell
        The shell; by default the one that runs.
    """
    try:
        file = app.install_completion(shell=shell)
    except ShellDetectionError as error:
        raise EnvironmentProblem("cannot tell which shell runs. Name it: --install-completion --shell bash.") from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot write the completion script: {error}") from error
    print(f"{file} was written. Start a new shell to use it.")


@app.command(name="--debug", group=OPTIONS)
def debug() -> None:
    """Show the traceback of an error; goes with every command."""
    app.help_print([])


_REQUIRED = {name: ("MODEL", verb.example) for name, verb in _VERBS.items() if verb.arguments == _MODEL} | {
    "verify": ("RUN", "verify runs/half"),
    "recipes show": ("NAME", "recipes show demo"),
    "recipes cp": ("NAME TO", "recipes cp cifar10-resnet18 mine.yaml"),
}
_CALLED = {"MODEL": "a model", "RUN": "a run folder", "NAME": "a recipe", "TO": "a file to write to"}


INTERRUPTED, TERMINATED = 130, 143


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; errors end the process with an exit code.

    Exit codes: 0 success, 2 usage, 3 environment, 4 failed quality gate, 70 an error in this package, 130 interrupted,
    143 terminated. A traceback is shown only with ``--debug``.

    Args:
        arguments: the command line; by default ``sys.argv[1:]``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in messages may not exist in the terminal's encoding
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        if odd := [token for token in tokens if not _is_text(token)]:
            raise UsageError(
                f"the argument {printable(odd[0])} is not UTF-8 text. Rename the file, or make a link to it."
            )
        with interruptible():
            app(tokens, exit_on_error=False, print_error=False)
    except (CycloptsError, RobustPruneError) as error:
        if debug:
            raise
        _end(f"error: {_said(error)}", getattr(error, "exit_code", 2))
    except KeyboardInterrupt as error:
        _end(
            "interrupted; run the same command again to go on from here",
            TERMINATED if isinstance(error, Terminated) else INTERRUPTED,
        )
    except BrokenPipeError:
        # The reader of a pipe has ended; Python would report that once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if known := last_resort.explain(error):
            _end(f"error: {known}", known.exit_code)
        file = last_resort.keep_traceback(error, tokens)
        kept = (
            f"The traceback is in {file}; please report it, with the command, at {ISSUES}" if file else "Add --debug."
        )
        _end(f"error in robust-prune itself: {type(error).__name__}: {str(error)[:200]}. {kept}", last_resort.EXIT_CODE)


def _end(text: str, code: int) -> NoReturn:
    # Not by rich, which imports more of itself when it prints: there may be no memory left.
    print(printable(" ".join(text.split())), file=sys.stderr)
    sys.exit(code)


def _is_text(token: str) -> bool:
    """Return whether an argument is text; bytes that are not UTF-8 arrive as halves of surrogate pairs."""
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True


def _said(error: Exception) -> str:
    """Return the message of an error; those of the parser are said in the words of this command line."""
    command = " ".join(getattr(error, "command_chain", None) or ())
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        if name.startswith("-"):
            return f"robust-prune {command}: {error.keyword or name} needs a value"
        arguments, example = _REQUIRED[command]
        return f"{command} needs {_CALLED[name]}: robust-prune {command} {arguments}, e.g. robust-prune {example}"
    if isinstance(error, UnusedCliTokensError):
        left = " ".join(error.unused_tokens or ())
        return f"robust-prune {command} does not take {left!r}. `robust-prune {command} --help` says what it takes."
    if isinstance(error, UnknownOptionError):
        given = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
        near = [name for name in known if name.startswith(given)]
        near = near or difflib.get_close_matches(given, known, n=1, cutoff=0.8)
        called = f"robust-prune {command}".rstrip()
        return f"{called} has no option {given}.{question(near) or f' `{called} --help` lists all.'}"
    return str(error)


if __name__ == "__main__":
    main()
