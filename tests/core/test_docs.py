"""The documents say what the tree holds: links lead somewhere, tables are what the results give, snippets run."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import flatkern as fk
from benchmarks import tables

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS])
MADE_BY_THE_SITE = {"gallery.md", "changelog.md", "contributing.md"}  # docs/_site/hooks.py
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def outside_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them (lower case, no punctuation, hyphens for spaces)."""
    headings = re.findall(r"^#+ (.+)$", outside_code(page), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", outside_code(page)):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lists_are_read_alike_by_github_and_the_site(page):
    """The site's Markdown wants a blank line before a list, and four spaces before one inside another."""
    lines = outside_code(page).splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"[-*] |\d+\. ", line):
            assert re.match(r"$|#|[-*] |\d+\. |  ", before), f"a blank line is missing before: {line}"
        assert not re.match(r" {1,3}[-*] ", line), f"fewer than four spaces before: {line}"


@pytest.mark.parametrize("page", [p for p in DOCS if BLOCK.search(p.read_text(encoding="utf-8"))], ids=name)
def test_snippets_run(page):
    """The blocks of one page run in order, in one namespace; a comment before a block says why it is left out."""
    names: dict[str, object] = {}
    for left_out, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if not left_out:
            exec(compile(code, name(page), "exec"), names)


def test_all_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    there = {str(page.relative_to(ROOT / "docs")) for page in DOCS}
    assert listed - MADE_BY_THE_SITE == there


def test_every_public_name_has_a_place_in_the_api_pages():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    paths = re.findall(r"^::: (flatkern\.[\w.]+)$", text, flags=re.MULTILINE)
    modules = {
        p
        for p in paths
        if (ROOT / p.replace(".", "/")).exists() or (ROOT / f"{p.replace('.', '/')}.py").exists()
    }
    # a function with the name of a module is listed by its whole path, or the module would be shown
    assert modules == {"flatkern.kernels", "flatkern.losses", "flatkern.native"}
    listed = [p.rpartition(".")[2] for p in paths if p != "flatkern.losses.Reduction"]
    assert sorted([*listed, "__version__"]) == sorted([*fk.__all__, "native"]), "add the name to docs/api/"


def test_the_performance_page_is_what_the_results_give():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()
