"""Docstrings as the site reads them: roles become links, and a doctest becomes a block of code."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import griffe

import flatkern

ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc):`~?([\w.]+)`")
# the site takes what stands before a colon for the type, so the class is put there
RETURNED = re.compile(r"^( *Returns:\n +)(?:An?|The) :class:`(?:[\w.]+\.)?(\w+)`[:,.]? (?=\S)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def _link(match: re.Match[str]) -> str:
    name = match[1].removeprefix("flatkern.")
    return f"[`{name}`][{place(name)}]" if name in flatkern.__all__ else f"`{name}`"


def place(name: str) -> str:
    """Where the API pages have ``flatkern.name``: a function with the name of a module is listed by its whole path."""
    thing = getattr(flatkern, name)
    hidden = f"flatkern.{name}" in sys.modules and not isinstance(thing, ModuleType)
    return f"{thing.__module__}.{name}" if hidden else f"flatkern.{name}"


class Docstrings(griffe.Extension):
    """Rewrites every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """One object, as soon as it is there."""
        if obj.docstring is not None:
            text = ROLE.sub(_link, RETURNED.sub(r"\1\2: ", obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)
