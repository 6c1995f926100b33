"""Ranking: how much each channel of a group matters, by criteria of ours and of torch-pruning."""
