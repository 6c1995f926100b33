"""Models: architectures by name, artifacts without pickle, and foreign checkpoints."""
