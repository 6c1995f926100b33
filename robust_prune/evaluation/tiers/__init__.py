"""Strengths of evaluation, one file each: see `catalogue.TIERS` and `evaluation.stages`."""
