"""Reports of runs: HTML, Markdown and terminal tables for people, JSON and CSV for programs."""

from .files import write
from .table import headline_markdown, headline_table
from .types import ModelRow, RunReport

__all__ = ["ModelRow", "RunReport", "headline_markdown", "headline_table", "write"]
