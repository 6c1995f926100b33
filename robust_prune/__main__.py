"""``python -m robust_prune``, which distributed launchers start in each process."""

from .cli import main

main()
