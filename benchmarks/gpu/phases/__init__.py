"""The phases of the GPU job: one module each, with `run(work, sizes, deadline)`."""
