"""Runs: folders, files that are written whole, and stages that are not done twice."""
