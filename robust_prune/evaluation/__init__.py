"""Clean and robust accuracy, with the warnings that belong to them."""
