"""Introspection of modules without changing them: fingerprints, modes and copies."""
