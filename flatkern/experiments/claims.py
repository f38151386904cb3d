"""What the paper leads one to expect, held against what was measured: each with its verdict and its numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flatkern.experiments.correlation import Correlation
from flatkern.experiments.quantities import QUANTITIES, final_value
from flatkern.experiments.settings import DemoConfig, Setting
from flatkern.experiments.training import Run
from flatkern.experiments.trajectories import Trajectory, last_phase
from flatkern.experiments.transformers import Transformers
from flatkern.rows import Row

__all__ = [
    "DIMENSION",
    "HELD",
    "NOT_HELD",
    "SENSITIVITY",
    "SENSITIVITY_BOUND",
    "TRANSFORMERS",
    "UNDECIDED",
    "VOLUME",
    "VOLUME_BOUND",
    "Claim",
    "InequalityCheck",
    "check_inequalities",
    "judge",
    "judge_transformers",
]

HELD, NOT_HELD, UNDECIDED = "held", "did not hold", "undecided"
VOLUME, SENSITIVITY, DIMENSION = "volume", "sensitivity", "dimension"
VOLUME_BOUND, SENSITIVITY_BOUND, TRANSFORMERS = "volume bound", "sensitivity bound", "transformers"
_TOPICS = {
    "log_volume_top3": VOLUME,
    "log_volume": VOLUME,
    "mls": SENSITIVITY,
    "nmls": SENSITIVITY,
    "local_dimensionality": DIMENSION,
}


@dataclass(frozen=True)
class Claim:
    """A statement that the measurements can contradict."""

    statement: str
    verdict: str
    detail: str
    topic: str = ""
    """Which claim of the paper's abstract it belongs to; empty for none."""


@dataclass(frozen=True)
class InequalityCheck:
    """One inequality over all measurement points of all runs."""

    name: str
    checked: int
    violated: int
    not_applicable: int
    looseness: tuple[float, float, float]
    """Smallest, median and largest distance between the outer sides, in decades."""
    decades: dict[int, int]
    """How many points have their outer sides 0 to 1, 1 to 2, … decades apart."""
    samples: str = "training"
    """Which samples the sides were taken on."""


def check_inequalities(runs: Sequence[Run]) -> list[InequalityCheck]:
    """Count how often each inequality held, and how far apart its sides were, on each kind of samples."""
    elsewhere = list(dict.fromkeys(where for run in runs for where in run.elsewhere))
    found = _check([row for run in runs for row in run.rows], "training")
    for where in elsewhere:
        found += _check([row for run in runs for row in run.elsewhere[where]], where)
    return found


def _check(rows: Sequence[Row], samples: str) -> list[InequalityCheck]:
    keys = list(dict.fromkeys(k for row in rows for k in row if k.startswith("status_")))
    checks = []
    for key in keys:
        name = key.removeprefix("status_")
        status = [str(row[key]) for row in rows if key in row]
        loose = [v for row in rows if math.isfinite(v := float(row.get(f"looseness_{name}", math.nan)))]
        spread = (min(loose), float(np.median(loose)), max(loose)) if loose else (math.nan,) * 3
        checks.append(
            InequalityCheck(
                name,
                sum(s != "not applicable" for s in status),
                sum(s == "violated" for s in status),
                sum(s == "not applicable" for s in status),
                (spread[0], spread[1], spread[2]),
                # rounding may leave an equality a hair below zero
                dict(sorted(Counter(max(0, math.floor(v)) for v in loose).items())),
                samples,
            )
        )
    return checks


def judge(
    config: DemoConfig,
    runs: Sequence[Run],
    correlations: Sequence[Correlation],
    in_time: Sequence[Trajectory] = (),
    elsewhere: Mapping[str, Sequence[Correlation]] | None = None,
) -> list[Claim]:
    """All claims, those about trends only where the last phase of learning was reached."""
    trained = [run for run in runs if not run.diverged]
    claims = [_interpolation(config, runs)]
    trends: list[Claim] = []
    sweeps = (
        ("a higher learning rate gives a lower", config.rate_sweep[::-1]),
        ("a smaller batch gives a lower", config.batch_sweep),
    )
    for words, sweep in sweeps:
        if set(sweep) <= set(config.settings):
            for key in ("sqrt_sharpness", "log_volume_top3", "mls", "nmls"):
                trends.append(_about(key, _ordering(key, words, sweep, trained)))
    trends += [
        _about(c.second, _link(c))
        for c in correlations
        if c.first == "sqrt_sharpness" and c.second in ("log_volume_top3", "mls", "nmls")
    ]
    trends += [
        _about(c.second, _no_link(c))
        for c in correlations
        if (c.first, c.second) == ("sqrt_sharpness", "local_dimensionality")
    ]
    for where, links in (elsewhere or {}).items():
        for c in links:
            claim = _no_link(c) if c.second == "local_dimensionality" else _link(c)
            claim = replace(claim, statement=f"On {where} samples: {_lowered(claim.statement)}")
            trends.append(_about(c.second, claim))
    trends += [_about(key, _in_time(config, trained, key)) for key in ("log_volume_top3", "mls")]
    trends += [_about(t.key, _over_checkpoints(config, t)) for t in in_time]
    early = sum(not run.final("train_loss") < config.last_phase for run in runs)
    if early:
        why = f"{early} of {len(runs)} runs did not reach the last phase (train loss below {config.last_phase:g})"
        trends = [replace(c, verdict=UNDECIDED, detail=f"{why}; {c.detail}") for c in trends]
    claims += trends
    claims += [_bound(check) for check in check_inequalities(runs)]
    return claims


def _about(key: str, claim: Claim) -> Claim:
    return replace(claim, topic=_TOPICS.get(key, ""))


def _interpolation(config: DemoConfig, runs: Sequence[Run]) -> Claim:
    losses = [run.final("train_loss") for run in runs]
    good = sum(loss < config.converged for loss in losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    span = (
        f"final train loss {min(finite):.1e} to {max(finite):.1e}".replace("e-0", "e−")
        if finite
        else "all diverged"
    )
    diverged = sum(run.diverged for run in runs)
    return Claim(
        f"Every run ends interpolating (train loss below {config.converged:g})",
        HELD if good == len(runs) else NOT_HELD,
        f"{good} of {len(runs)} runs; {span}" + (f"; {diverged} diverged" if diverged else ""),
    )


def _ordering(key: str, words: str, sweep: Iterable[Setting], runs: Sequence[Run]) -> Claim:
    """Whether the means over seeds rise strictly along a sweep that is listed from flat to sharp."""
    sweep = list(sweep)
    values = {s: [final_value(r, key) for r in runs if r.setting == s] for s in sweep}
    name = QUANTITIES[key].title
    statement = f"At the end, {words} {name}"
    if any(not v or not all(math.isfinite(x) for x in v) for v in values.values()):
        return Claim(statement, UNDECIDED, "a setting has no finite value")
    means = [float(np.mean(values[s])) for s in sweep]
    rises = all(a < b for a, b in itertools.pairwise(means))
    numbers = (" < " if rises else ", ").join(f"{m:#.3g}" for m in means).replace("-", "−")
    by_rate = len({s.learning_rate for s in sweep}) > 1
    settings = ", ".join(f"{s.learning_rate:g}" if by_rate else str(s.batch_size) for s in sweep)
    settings = f"{'lr' if by_rate else 'batch'} {settings}"
    falls = all(a > b for a, b in itertools.pairwise(means))
    apart = all(
        max(values[a]) < min(values[b]) or min(values[a]) > max(values[b])
        for a, b in itertools.pairwise(sweep)
    )
    seeds = "no overlap of seeds" if apart else "seeds of neighbouring settings overlap"
    if all(len(v) == 1 for v in values.values()):
        seeds = "one seed a setting"
    if falls:
        seeds = f"the other way round, {seeds}"
    return Claim(statement, HELD if rises else NOT_HELD, f"{numbers} ({settings}); {seeds}")


def _numbers(c: Correlation) -> str:
    r, rho = c.pearson, c.spearman
    corrected = "" if math.isnan(r.p_holm) else f", p of r = {r.p_holm:.2g} (Holm)"
    return (
        f"r = {r.value:.2f} ({r.low:.2f} to {r.high:.2f}), ρ = {rho.value:.2f} ({rho.low:.2f} to {rho.high:.2f})"
        + corrected
    ).replace("-", "−")


def _link(c: Correlation) -> Claim:
    statement = f"Across runs, flatter goes with lower {QUANTITIES[c.second].title}"
    if math.isnan(c.pearson.low):
        return Claim(statement, UNDECIDED, f"{c.runs} runs are too few")
    verdict = HELD if c.pearson.low > 0 else NOT_HELD if c.pearson.high < 0 else UNDECIDED
    return Claim(statement, verdict, _numbers(c))


def _no_link(c: Correlation) -> Claim:
    statement = "Across runs, local dimension is not tied to sharpness"
    if math.isnan(c.pearson.low):
        return Claim(statement, UNDECIDED, f"{c.runs} runs are too few")
    # an interval around 0 does not prove absence: with few runs it would be wide for a real link, too
    verdict = UNDECIDED if c.pearson.low <= 0 <= c.pearson.high else NOT_HELD
    note = "; the interval contains 0, which does not prove absence" if verdict == UNDECIDED else ""
    return Claim(statement, verdict, _numbers(c) + note)


def _in_time(config: DemoConfig, runs: Sequence[Run], key: str) -> Claim:
    title = QUANTITIES[key].title
    phase = f"last phase (train loss below {config.last_phase:g})"
    statement = f"Within a run's {phase}, sharpness and {title} fall together"
    changes = []
    for run in runs:
        start = last_phase(run, config.last_phase)
        if len(run.rows) - start < 3:
            continue
        root, other = np.array(run.column("sqrt_sharpness")[start:]), np.array(run.column(key)[start:])
        changes.append((root[-1] - root[0], other[-1] - other[0]))
    if not changes:
        return Claim(statement, UNDECIDED, "no run reached it with three measurement points to spare")
    both = sum(a < 0 and b < 0 for a, b in changes)
    detail = (
        f"both fall in {both} of {len(changes)} runs; √S falls in {sum(a < 0 for a, _ in changes)} "
        f"(mean {np.mean([a for a, _ in changes]):+.2f}), {title} in "
        f"{sum(b < 0 for _, b in changes)} (mean {np.mean([b for _, b in changes]):+.2f})"
    )
    return Claim(statement, HELD if both == len(changes) else NOT_HELD, detail.replace("-", "−"))


def judge_transformers(config: DemoConfig, found: Transformers) -> Claim:
    """Whether the models that are sharper for their parameters' size are also more sensitive for their inputs'."""
    statement = "Across transformers, normalized MLS rises with adaptive sharpness"
    c = Correlation("adaptive_sharpness", "normalized_mls", len(found.rows), found.pearson, found.spearman)
    claim = replace(_link(c), statement=statement, topic=TRANSFORMERS)
    left_out = f" ({found.diverged} more diverged)" if found.diverged else ""
    claim = replace(claim, detail=f"{len(found.rows)} models{left_out}, logarithms of both: {claim.detail}")
    early = sum(not float(row.get("train_loss", 0.0)) < config.last_phase for row in found.rows)
    if early:
        why = f"{early} of {len(found.rows)} models did not reach the last phase"
        claim = replace(claim, verdict=UNDECIDED, detail=f"{why}; {claim.detail}")
    return claim


def _lowered(statement: str) -> str:
    return statement[0].lower() + statement[1:]


def _over_checkpoints(config: DemoConfig, t: Trajectory) -> Claim:
    title, tied = QUANTITIES[t.key].title, t.key != "local_dimensionality"
    statement = f"Over the checkpoints of a run's last phase, √S and {title} " + (
        "rise and fall together" if tied else "are not tied"
    )
    if not t.coefficients:
        return Claim(statement, UNDECIDED, "no run reached it with four measurement points to spare")
    numbers = (
        f"r from {min(t.coefficients):.2f} to {max(t.coefficients):.2f} in {len(t.coefficients)} runs, "
        f"mean {t.mean:.2f}"
    )
    if math.isnan(t.low):
        return Claim(statement, UNDECIDED, f"{numbers}; too few runs for an interval".replace("-", "−"))
    numbers = f"{numbers} ({t.low:.2f} to {t.high:.2f}, runs resampled)".replace("-", "−")
    apart = t.low > 0 or t.high < 0
    if tied:
        return Claim(statement, HELD if t.low > 0 else NOT_HELD if t.high < 0 else UNDECIDED, numbers)
    note = "" if apart else "; the interval contains 0, which does not prove absence"
    return Claim(statement, NOT_HELD if apart else UNDECIDED, numbers + note)


_INEQUALITIES = {
    "mls": "MLS is bounded by flatness: A ≤ B ≤ C ≤ D",
    "mls_with_bias": "MLS is bounded by flatness, biases counted",
    "nmls": "NMLS is bounded by flatness",
    "nmls_with_bias": "NMLS is bounded by flatness, biases counted",
    "lvr": "the mean local volume is bounded by flatness (LVR chain)",
    "nvr": "the network's volume ratio is bounded by flatness (NVR)",
    "pointwise_dv": "a sample's local volume is bounded by its ‖J‖",
    "normalized_mls": "‖x‖²σ², which rescaling does not change, is bounded by gradients",
}
_PER_POSITION = "_per_position"
_TOPIC_OF_BOUND = {"lvr": VOLUME_BOUND, "nvr": VOLUME_BOUND, "pointwise_dv": ""}


def _bound(check: InequalityCheck) -> Claim:
    low, median, high = check.looseness
    # flatness is not in the forms per position
    topic = "" if check.name.endswith(_PER_POSITION) else _TOPIC_OF_BOUND.get(check.name, SENSITIVITY_BOUND)
    statement = _inequality_title(check.name)
    if check.samples != "training":
        statement = f"On {check.samples} samples: {statement}"
    statement = statement[0].upper() + statement[1:]
    if not check.checked:
        return Claim(statement, UNDECIDED, f"not applicable at {check.not_applicable} points", topic)
    return Claim(
        statement,
        HELD if not check.violated else NOT_HELD,
        f"{check.checked - check.violated} of {check.checked} measurement points; outer sides {low:.2g} to {high:.2g} "
        f"decades apart (median {median:.2g})",
        topic,
    )


def _inequality_title(name: str) -> str:
    base = name.removesuffix(_PER_POSITION)
    if base.startswith("ma_ying"):
        power = base.removeprefix("ma_ying").removeprefix("_k_")
        words = "the Ma–Ying bound on MLS" + (f", with power k = {power}" if power else "")
    else:
        words = _INEQUALITIES.get(base, f"inequality {base}")
    return words if base == name else f"{words.replace('by flatness', 'by gradients')}, position by position"
