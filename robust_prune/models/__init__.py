"""Models: architectures by name, safe artifacts, and the opening of other people's checkpoints."""
