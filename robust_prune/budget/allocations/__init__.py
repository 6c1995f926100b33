"""Allocations of a budget, one file each: see `catalogue.ALLOCATIONS` and `budget.allocation.Problem`."""
