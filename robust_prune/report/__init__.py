"""The outcome of a run for people (HTML, Markdown, terminal) and for programs (JSON, CSV)."""

from .files import write
from .table import headline_markdown, headline_table
from .types import ModelRow, RunReport

__all__ = ["ModelRow", "RunReport", "headline_markdown", "headline_table", "write"]
