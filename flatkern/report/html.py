"""The page: one file that opens offline, with every figure, table and definition in it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from flatkern.experiments.abstract import summarize
from flatkern.experiments.claims import HELD, NOT_HELD
from flatkern.experiments.networks import takes_vectors
from flatkern.experiments.quantities import CORRELATED, PANELS, QUANTITIES, final_value
from flatkern.report.figures import inline_panels, save_figures
from flatkern.report.tables import (
    inequality_table,
    matrix_table,
    number,
    pair_table,
    run_table,
    summary_table,
    trajectory_table,
    transformer_table,
)

if TYPE_CHECKING:
    from flatkern.experiments.result import Result

__all__ = ["page", "render", "write_report"]


def write_report(folder: Path, result: Result) -> None:
    """Write the figures and ``report.html`` into a folder that exists."""
    save_figures(folder, result)
    pictures = sorted({path.stem for path in folder.glob("*.svg")})
    (folder / "report.html").write_text(render(result, pictures), encoding="utf-8")


def page(template: str, **values: Any) -> str:
    """A page of one of the templates here, with the style and script that all of them share."""
    files = resources.files("flatkern.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    css, js = ((files / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return environment.get_template(template).render(css=css, js=js, **values)


def render(result: Result, pictures: Sequence[str] = ()) -> str:
    """The page of a demo as text; ``pictures`` are the names of the figures beside it."""
    return page(
        "report.html.j2",
        result=result,
        pictures=pictures,
        config=result.config,
        lead=_lead(result),
        tally=_tally(result),
        panels=inline_panels(result),
        summary=summary_table(result),
        runs=run_table(result),
        pairs=pair_table(result.correlations),
        matrix=matrix_table(result),
        links={where: pair_table(found) for where, found in result.elsewhere.items()},
        inequalities=inequality_table(result),
        transformers=transformer_table(result),
        trajectories=trajectory_table(result),
        sections=result.config.sections,
        definitions=[
            QUANTITIES[k]
            for k in dict.fromkeys(
                (
                    *PANELS,
                    "log_volume",
                    *CORRELATED,
                    "test_accuracy",
                    *(("normalized_mls", "adaptive_sharpness") if result.transformers else ()),
                )
            )
        ],
        facts=_facts(result),
        expected_false_alarms=0.05 * len(result.correlations),
        abstract=summarize(result.claims),
        HELD=HELD,
        NOT_HELD=NOT_HELD,
    )


def _lead(result: Result) -> dict[str, Any] | None:
    """The main effect in numbers: from the smallest to the largest learning rate."""
    first, last = result.config.rate_sweep[0], result.config.rate_sweep[-1]
    if not {first, last} <= set(result.config.settings):
        return None
    found: dict[str, Any] = {"first": first, "last": last}
    for key in ("sqrt_sharpness", "log_volume_top3", "mls"):
        for end, setting in (("from", first), ("to", last)):
            values = [final_value(r, key) for r in result.runs if r.setting == setting and not r.diverged]
            if not values:
                return None
            found[f"{key}_{end}"] = number(statistics.fmean(values))
    return found


def _tally(result: Result) -> dict[str, int]:
    verdicts = [c.verdict for c in result.claims]
    return {v: verdicts.count(v) for v in dict.fromkeys((HELD, NOT_HELD, *verdicts))}


def _facts(result: Result) -> list[tuple[str, str]]:
    config, env = result.config, result.environment
    points = f"{len(config.schedule)} iterations" + (
        " spaced logarithmically" if config.every is None else f", every {config.every}"
    )
    facts = [
        ("images", f"{result.source}; {result.num_train:,} for training, {result.num_test:,} for the test"),
        ("network", f"{_network(result)}, PyTorch's default initialization, float32"),
        (
            "training",
            f"plain SGD, no momentum, no decay, nn.MSELoss to one-hot labels, {config.steps:,} iterations",
        ),
        ("settings", "; ".join(s.label for s in config.settings) + f"; {config.seeds} seeds each"),
        (
            "measured on",
            f"the first {min(config.num_probe, result.num_train)} training images, at {points}",
        ),
        (
            "seeds",
            f"0 to {config.seeds - 1} for weights and order; {config.data_seed} for the choice of images",
        ),
        ("preset", config.preset + (f"; {config.scale}" if config.scale else "")),
        ("started", result.started),
        ("time", f"{result.wall_seconds:.0f} s wall, {result.cpu_seconds:.0f} s CPU (before the figures)"),
    ]
    if not result.runs:
        facts = [(name, text) for name, text in facts if name not in ("network", "settings", "measured on")]
    return facts + [(str(k).replace("_", " "), str(v)) for k, v in env.items()]


def _network(result: Result) -> str:
    config = result.config
    if not takes_vectors(config.network):
        return config.network
    kind = "tanh" if config.network == "mlp-tanh" else "ReLU"
    return f"{kind} MLP {'-'.join(str(s) for s in result.sizes)}"
