"""Module Robustness Sensitivity (MRS): how much each layer contributes to a model's robustness."""
