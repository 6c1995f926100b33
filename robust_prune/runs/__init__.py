"""Runs: run folders, atomic files, and stages that are resumed."""
