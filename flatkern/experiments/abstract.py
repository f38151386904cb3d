"""The claims of the paper's abstract, each with the verdicts on all statements that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

from flatkern.experiments.claims import (
    DIMENSION,
    HELD,
    NOT_HELD,
    SENSITIVITY,
    SENSITIVITY_BOUND,
    TRANSFORMERS,
    UNDECIDED,
    VOLUME,
    VOLUME_BOUND,
    Claim,
)

__all__ = ["summarize"]

_STATEMENTS = {
    VOLUME: "In the last phase of learning, volume is compressed as the loss gets flatter",
    SENSITIVITY: "So are the sensitivities (MLS, NMLS)",
    VOLUME_BOUND: "Flatness bounds the local volume from above",
    SENSITIVITY_BOUND: "Flatness bounds the sensitivities from above",
    DIMENSION: "Local dimensionality has no such link",
    TRANSFORMERS: "Normalized sensitivity follows adaptive sharpness across transformers",
}


def summarize(claims: Sequence[Claim]) -> list[Claim]:
    """One line a claim of the abstract: it held where all of its statements did, and did not where one did not."""
    found = []
    for topic, statement in _STATEMENTS.items():
        parts = [c for c in claims if c.topic == topic]
        if not parts:
            continue
        counts = {v: sum(c.verdict == v for c in parts) for v in (HELD, NOT_HELD, UNDECIDED)}
        verdict = NOT_HELD if counts[NOT_HELD] else UNDECIDED if counts[UNDECIDED] else HELD
        detail = ("its statement: " if len(parts) == 1 else f"of {len(parts)} statements ") + ", ".join(
            f"{n} {v}" for v, n in counts.items() if n
        )
        worst = next(c for c in parts if c.verdict == verdict)
        found.append(Claim(statement, verdict, f"{detail}. {worst.statement}: {worst.detail}", topic))
    return found
