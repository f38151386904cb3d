"""Errors that are the user's to mend, and so deserve one clear line instead of a traceback."""

from __future__ import annotations

__all__ = ["Cancelled", "UserError"]


class UserError(Exception):
    """Something asked for cannot be done; the message says what and, where possible, how to mend it.

    The command line prints it as one line and exits with status 2.
    """


class Cancelled(Exception):
    """The run was stopped from outside."""
