"""``python -m robust_prune``: what launchers of several processes start."""

from .cli import main

main()
