"""Ranking: importance scores of the channels of each group, by our own criteria and those of torch-pruning."""
