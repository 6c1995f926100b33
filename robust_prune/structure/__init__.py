"""Structure: groups of coupled channels, found in the dependency graph and proved by trial cuts on a copy."""
