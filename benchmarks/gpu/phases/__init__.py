"""Phases of the GPU job: one module each, with a function `run(work, sizes, deadline)`."""
