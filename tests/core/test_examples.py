"""Every example in a docstring and in the README runs and gives what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import flatkern

ROOT = Path(__file__).parents[2]
NATIVE = ("_C", "_native")
MODULES = [
    m.name for m in pkgutil.walk_packages(flatkern.__path__, "flatkern.") if not m.name.endswith(NATIVE)
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an optional dependency, or the NumPy door where nothing was built
        pytest.skip(str(error))
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


def test_public_functions_have_examples():
    for name in flatkern.__all__:
        thing = getattr(flatkern, name)
        if callable(thing) and not isinstance(thing, type):
            assert ">>>" in (thing.__doc__ or ""), f"fk.{name} has no example"


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
