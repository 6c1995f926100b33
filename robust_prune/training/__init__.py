"""Training: losses, the resumable trainer, and the choice of number format."""
