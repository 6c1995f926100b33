"""The machine: memory, processors, GPUs and versions."""
