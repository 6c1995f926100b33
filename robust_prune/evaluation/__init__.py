"""Evaluation: clean and robust accuracy, and warnings about results that may not be trusted."""
