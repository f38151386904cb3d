"""What the shape of a sample says about the error of its mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Shape"]

_KURTOSIS_BIAS = 2.5
"""Few samples of a heavy tail show less than half of its kurtosis."""


@dataclass(frozen=True)
class Shape:
    """What an interval for the mean of independent values needs beside their standard error."""

    dof: int
    skewness: float
    """Of the mean: that of one value over the root of their number."""

    @staticmethod
    def of(values: Tensor, dof: int) -> Shape:
        """From values [k] and the degrees of freedom that normal ones would leave.

        A variance estimated from k values of excess kurtosis κ has Var s²/σ⁴ = 2/(k − 1) + κ/k, as one from
        1 + 2/(2/(k − 1) + κ/k) normal values: so many degrees of freedom are stated where that is fewer.
        """
        count = len(values)
        centred = values.double() - values.double().mean()
        second = float(centred.square().mean())
        if count < 3 or not second > 0:
            return Shape(dof, 0.0)
        scaled = centred / second**0.5
        skewness = float((scaled**3).mean()) * (count * (count - 1)) ** 0.5 / (count - 2)
        kurtosis = max(0.0, float((scaled**4).mean()) - 3.0)
        fewer = 2 / (2 / (count - 1) + _KURTOSIS_BIAS * kurtosis / count)
        return Shape(max(1, min(dof, int(fewer))), skewness / count**0.5)
