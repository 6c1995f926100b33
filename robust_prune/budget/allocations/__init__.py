"""Allocations of a budget, one in each file; see `catalogue.ALLOCATIONS` and `budget.allocation.Problem`."""
