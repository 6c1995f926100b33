"""What surgery changed, as JSON. It lives with the models, which must be rebuilt without importing pruning."""

from __future__ import annotations

from ..models.manifest import apply_changes, describe_changes

__all__ = ["apply_changes", "describe_changes"]
