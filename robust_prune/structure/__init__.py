"""Structure: which channels of a model hang together, found on the model and proved by cutting a copy."""
