"""Evaluation tiers, one in each file; see `catalogue.TIERS` and `evaluation.stages`."""
