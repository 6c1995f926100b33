"""Budget: what a cut costs and saves, and how many channels each group keeps for it."""
