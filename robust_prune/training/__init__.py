"""Training: adversarial losses, the resumable trainer, and the choice of precision and memory layout."""
