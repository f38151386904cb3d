"""Numbers as people read them: the tables of the page and of the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flatkern.experiments.quantities import QUANTITIES, final_value

if TYPE_CHECKING:
    from flatkern.experiments.correlation import Correlation
    from flatkern.experiments.result import Result

__all__ = [
    "SUMMARY",
    "Cell",
    "Table",
    "inequality_table",
    "matrix_table",
    "number",
    "pair_table",
    "run_table",
    "spread",
    "summary_table",
    "trajectory_table",
    "transformer_table",
]

SUMMARY = (
    "train_loss",
    "test_accuracy",
    "sqrt_sharpness",
    "log_volume_top3",
    "mls",
    "nmls",
    "local_dimensionality",
    "generalization_gap",
)


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number it is sorted by."""

    text: str
    sort: float = math.nan
    weight: float = math.nan
    """−1 to 1 where the cell is tinted."""


@dataclass(frozen=True)
class Table:
    """A table; headings carry the definition that is shown on hover."""

    headings: list[tuple[str, str]]
    rows: list[list[Cell]]


def number(value: float, digits: int = 3) -> str:
    """A number in as many significant digits, with a true minus sign."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else digits - 1
    return f"{value:.{min(decimals, 4)}f}".replace("-", "−")


def spread(values: Sequence[float], most_decimals: int = 4) -> str:
    """Mean ± standard deviation; the mean alone where there is one value."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "–"
    mean = statistics.fmean(finite)
    if len(finite) < 2:
        return number(mean)
    deviation = statistics.stdev(finite)
    if 0 < abs(mean) < 1e-3:
        exponent = math.floor(math.log10(abs(mean)))
        scale = 10.0**exponent
        return f"({mean / scale:.1f} ± {deviation / scale:.1f})e{exponent}".replace("-", "−")
    # as many decimals as the deviation's first digit is worth, one more where that digit is a 1
    decimals = 2 if deviation == 0 else max(0, -math.floor(math.log10(deviation / 1.95)))
    decimals = min(decimals, most_decimals)
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}".replace("-", "−")


def _heading(key: str) -> tuple[str, str]:
    q = QUANTITIES[key]
    return (q.symbol if key == "sqrt_sharpness" else q.title), q.definition


def summary_table(result: Result, most_decimals: int = 4) -> Table:
    """One line a setting: mean ± standard deviation over seeds, at the end of training."""
    rows = []
    for setting in result.config.settings:
        runs = [r for r in result.runs if r.setting == setting]
        line = [
            Cell(f"{setting.learning_rate:g}", setting.learning_rate),
            Cell(str(setting.batch_size), setting.batch_size),
        ]
        for key in SUMMARY:
            values = [final_value(r, key) for r in runs]
            finite = [v for v in values if math.isfinite(v)]
            line.append(Cell(spread(values, most_decimals), statistics.fmean(finite) if finite else math.nan))
        rows.append(line)
    headings = [("lr", "Learning rate of plain SGD."), ("batch", "Samples a step."), *map(_heading, SUMMARY)]
    return Table(headings, rows)


def run_table(result: Result) -> Table:
    """One line a run, at the end of training."""
    keys = (*SUMMARY, "log_volume", "log10_mls_d", "log10_nmls_bound")
    rows = [
        [
            Cell(f"{r.setting.learning_rate:g}", r.setting.learning_rate),
            Cell(str(r.setting.batch_size), r.setting.batch_size),
            Cell(str(r.seed), r.seed),
            *(Cell(number(v), v) for v in (final_value(r, k) for k in keys)),
        ]
        for r in result.runs
    ]
    headings = [
        ("lr", "Learning rate of plain SGD."),
        ("batch", "Samples a step."),
        ("seed", "Decides the initial weights and the order of the samples."),
        *map(_heading, keys),
    ]
    return Table(headings, rows)


def pair_table(correlations: Sequence[Correlation]) -> Table:
    """One line a pair of quantities: both coefficients, their intervals, corrected p-values."""
    rows = []
    for c in correlations:
        line = [Cell(_heading(c.first)[0]), Cell(_heading(c.second)[0])]
        for k in (c.pearson, c.spearman):
            line += [
                Cell(_fixed(k.value), k.value),
                Cell(f"{_fixed(k.low)} to {_fixed(k.high)}" if math.isfinite(k.low) else "–", k.low),
                Cell(number(k.p_holm, 2), k.p_holm),
            ]
        rows.append(line)
    interval = "95 % bootstrap interval (BCa, runs resampled)."
    holm = "p-value against no correlation, corrected for the number of pairs in this table (Holm)."
    return Table(
        [
            ("first", "One quantity, a value a run."),
            ("second", "The other."),
            ("r", "Pearson's correlation: how well a straight line fits."),
            ("interval of r", interval),
            ("p of r", holm),
            ("ρ", "Spearman's rank correlation: how well the orders agree."),
            ("interval of ρ", interval),
            ("p of ρ", holm),
        ],
        rows,
    )


def matrix_table(result: Result) -> Table:
    """Pearson's r of every pair as a triangle, tinted by size."""
    keys = list(dict.fromkeys(k for c in result.correlations for k in (c.first, c.second)))
    known = {(c.first, c.second): c.pearson for c in result.correlations}
    rows = []
    for i, a in enumerate(keys[1:], start=1):
        line = [Cell(_heading(a)[0])]
        for b in keys[:i]:
            r = known[(b, a)]
            line.append(Cell(_fixed(r.value), r.value, 0.0 if math.isnan(r.value) else r.value))
        rows.append(line + [Cell("")] * (len(keys) - 1 - i))
    return Table([("", ""), *map(_heading, keys[:-1])], rows)


def inequality_table(result: Result) -> Table:
    """One line an inequality and kind of samples: how often it held, and how many points lie how far from equality."""
    decades = sorted({d for check in result.inequalities for d in check.decades})
    rows = []
    for check in result.inequalities:
        low, median, high = check.looseness
        rows.append(
            [
                Cell(check.name),
                Cell(check.samples),
                *(Cell(str(n), n) for n in (check.checked, check.violated, check.not_applicable)),
                *(Cell(number(v, 2), v) for v in (low, median, high)),
                *(Cell(str(n) if (n := check.decades.get(d, 0)) else "", n) for d in decades),
            ]
        )
    spread_of = "Decades between the outer sides, over all points and runs: "
    return Table(
        [
            ("inequality", ""),
            ("samples", "Which samples both sides were taken on."),
            ("checked", "Measurement points of all runs where the inequality applies."),
            ("violated", "Points where it did not hold."),
            ("n/a", "Points where it does not apply, such as for shared weights."),
            ("tightest", spread_of + "the smallest."),
            ("median", spread_of + "the median."),
            ("loosest", spread_of + "the largest."),
            *(
                (f"{d} to {d + 1}", f"Points whose outer sides are {d} to {d + 1} decades apart.")
                for d in decades
            ),
        ],
        rows,
    )


def trajectory_table(result: Result) -> Table:
    """One line a quantity: how it goes with √S over the checkpoints of a run's last phase."""
    rows = [
        [
            Cell(QUANTITIES[t.key].title),
            Cell(str(len(t.coefficients)), len(t.coefficients)),
            Cell(_fixed(t.mean), t.mean),
            Cell(f"{_fixed(t.low)} to {_fixed(t.high)}" if math.isfinite(t.low) else "–", t.low),
            Cell(_fixed(min(t.coefficients, default=math.nan))),
            Cell(_fixed(max(t.coefficients, default=math.nan))),
        ]
        for t in result.trajectories
    ]
    return Table(
        [
            ("quantity", ""),
            ("runs", "Those with at least four measurement points in the last phase."),
            ("mean r", "Mean over runs of Pearson's r between √S and the quantity."),
            ("interval", "95 % bootstrap interval of the mean (BCa, runs resampled); needs four runs."),
            ("lowest", "Lowest r of a run."),
            ("highest", "Highest r of a run."),
        ],
        rows,
    )


def transformer_table(result: Result) -> Table | None:
    """One line a model."""
    if result.transformers is None:
        return None
    rows = []
    for row in result.transformers.rows:
        line = [Cell(str(row["model"]))]
        for key in ("parameters", "learning_rate", "seed", "train_loss", "test_accuracy"):
            if key in row:
                line.append(
                    Cell(f"{row[key]:,}" if key == "parameters" else number(float(row[key])), float(row[key]))
                )
        for key in ("adaptive_sharpness", "normalized_mls"):
            value, error = float(row[key]), float(row[f"{key}_stderr"])
            line.append(Cell(f"{number(value)} ± {number(error, 2)}", value))
        rows.append(line)
    trained = (
        []
        if result.transformers.pretrained
        else [("lr", ""), ("seed", ""), *map(_heading, ("train_loss", "test_accuracy"))]
    )
    return Table(
        [
            ("model", ""),
            ("parameters", ""),
            *trained,
            *map(_heading, ("adaptive_sharpness", "normalized_mls")),
        ],
        rows,
    )


def _fixed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")
