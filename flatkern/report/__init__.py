"""From a demo's result to pictures and one self-contained page."""

from flatkern.report.html import write_report

__all__ = ["write_report"]
