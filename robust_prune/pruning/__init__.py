"""Pruning: coupled groups, channel scores, budgeted allocation and proven surgery."""
