"""Machine: memory, processors, GPUs and package versions."""
