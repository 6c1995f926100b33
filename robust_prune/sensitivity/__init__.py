"""Module Robustness Sensitivity: where a model's robustness lives, layer by layer."""
