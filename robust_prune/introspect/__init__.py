"""Looking at modules without changing them: fingerprints, hooks, modes and copies."""
