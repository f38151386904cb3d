"""Docstrings as the site reads them: roles become links, and a doctest becomes a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

import flatkern

ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def _link(match: re.Match[str]) -> str:
    name = match[1].removeprefix("flatkern.")
    return f"[`{name}`][flatkern.{name}]" if name in flatkern.__all__ else f"`{name}`"


class Docstrings(griffe.Extension):
    """Rewrites every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """One object, as soon as it is there."""
        if obj.docstring is not None:
            text = ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)
