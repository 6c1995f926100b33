"""Start of the command line: ``robust-prune``, and ``python -m robust_prune``, which distributed launchers use."""

import sys


def main() -> None:
    """Run the command line, of which much is imported first: a second in which Ctrl-C may come as well."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
