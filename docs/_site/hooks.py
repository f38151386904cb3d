"""Pages that the site makes from what is in the tree, and the check that every public name has its place."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import log

from docs._site.docstrings import place
from docs._site.examples import Shown, run_examples

ROOT = Path(__file__).parents[2]
API = ("flatkern", "flatkern.kernels", "flatkern.native", "flatkern.losses")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the gallery, and changes and contributing, whose links start at the root of the tree."""
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    shown = run_examples(ROOT)
    for example in shown:
        for figure in example.figures:
            uri = f"gallery/{example.path.stem}-{figure.name}"
            files.append(File.generated(config, uri, content=figure.read_bytes()))
    files.append(File.generated(config, "gallery.md", content=_gallery(shown)))
    return files


def _gallery(shown: list[Shown]) -> str:
    """One section an example: what it is, its figures and output of this build, its source."""
    lead = "The scripts of `examples/`, run when this site was built: figures and output are what they gave then."
    parts = ["# Gallery", lead]
    for example in shown:
        source = example.path.read_text(encoding="utf-8")
        title, _, rest = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
        parts += [f"## {example.path.stem}", title]
        parts += [f"![{f.stem}](gallery/{example.path.stem}-{f.name})" for f in example.figures]
        parts += [_block("text", example.output)] if example.output else []
        parts += [
            _block("text", rest),
            f'??? example "{example.path.name}"',
            _indented(_block("python", source)),
        ]
    return "\n\n".join(parts) + "\n"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _indented(text: str) -> str:
    return re.sub(r"^(?=.)", "    ", text, flags=re.MULTILINE)


def on_post_build(config: MkDocsConfig) -> None:
    """Every public name has an anchor in the API pages."""
    pages = (Path(config.site_dir) / "api").glob("*.html")
    anchors = {a for p in pages for a in re.findall(r'id="([\w.]+)"', p.read_text(encoding="utf-8"))}
    missing = []
    for name in API:
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # the NumPy door where nothing was built
            log.info(f"{name} is not checked: {error}")
            continue
        missing += [f"{name}.{public}" for public in module.__all__ if not _has_place(name, public, anchors)]
    if missing:
        raise PluginError(f"public names without a place in docs/api: {', '.join(missing)}")


def _has_place(module: str, public: str, anchors: set[str]) -> bool:
    name = place(public) if module == "flatkern" else f"{module}.{public}"
    return public.startswith("__") or f"{module}.{public}" in API or name in anchors
