"""Ghost norms: which shapes go together, and which form is cheaper. For tensors and for arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

Form = Literal["auto", "explicit", "gram"]
FORMS = ("auto", "explicit", "gram")


def take_formed(form: str, positions: int, d_in: int, d_out: int, cotangents: int) -> bool:
    """Whether to sum over tiles of the gradients: as asked, or where that takes fewer multiplications.

    The other form takes the upper halves of two T × T matrices; tiles of 32 columns on the diagonal are computed whole.
    """
    if form != "auto":
        return form == "explicit"
    explicit = cotangents * positions * d_out * d_in
    return explicit <= positions * (positions + 32) // 2 * (d_in + cotangents * d_out)


def check_form(name: str, form: str) -> None:
    """Raises ValueError for a form that is not known."""
    if form not in FORMS:
        raise ValueError(f"{name}: form={form!r} is not known; use one of {', '.join(FORMS)}")


def leading(name: str, a: Sequence[int], g: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Of a [..., T, d_in] and g [..., T, d_out]: their common leading shape, and along how many of its dimensions, from
    the left, a is the same.
    """
    if a[-2] != g[-2]:
        raise ValueError(
            f"{name}: a and g: expected as many positions, [..., T, d], got {tuple(a)} and {tuple(g)}"
        )
    try:
        lead = tuple(torch.broadcast_shapes(a[:-2], g[:-2]))
    except RuntimeError:
        raise ValueError(
            f"{name}: the leading dimensions of a {tuple(a)} and g {tuple(g)} do not broadcast"
        ) from None
    absent = len(lead) - (len(a) - 2)
    while absent < len(lead) and a[absent - len(lead) - 2] == 1:
        absent += 1
    return lead, absent


class Geometry(NamedTuple):
    """A convolution that was checked against its input and the cotangents of its output."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    positions: list[int]
    lead: tuple[int, ...]
    """Leading dimensions of the cotangents."""
    cotangents: tuple[int, ...]
    """[K, n, groups, C_out / groups, *positions]."""


def geometry(
    name: str,
    x: Sequence[int],
    g: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int] | int,
    padding: Sequence[int] | int,
    dilation: Sequence[int] | int,
    groups: int,
) -> Geometry:
    """Raises ValueError, naming the argument, where x [n, C_in, *size] and g [..., n, C_out, *positions] do not fit."""
    dims = len(kernel_size)
    if not 1 <= dims <= 3:
        raise ValueError(f"{name}: kernel_size: expected one to three numbers, got {tuple(kernel_size)}")
    kernel, steps, pads, gaps = (
        [value] * dims if isinstance(value, int) else list(value)
        for value in (kernel_size, stride, padding, dilation)
    )
    for argument, values, least in (
        ("kernel_size", kernel, 1),
        ("stride", steps, 1),
        ("padding", pads, 0),
        ("dilation", gaps, 1),
    ):
        if len(values) != dims or min(values) < least:
            raise ValueError(f"{name}: {argument}: expected {dims} numbers, at least {least}, got {values}")
    if len(x) != dims + 2 or groups < 1 or x[1] % groups:
        raise ValueError(
            f"{name}: x: expected [n, C_in, *size] with {dims} spatial dimensions and C_in a multiple of groups = "
            f"{groups}, got shape {tuple(x)}"
        )
    spans = [gap * (size - 1) + 1 for gap, size in zip(gaps, kernel, strict=True)]
    room = [size + 2 * pad - span for size, pad, span in zip(x[2:], pads, spans, strict=True)]
    if min(room) < 0:
        raise ValueError(
            f"{name}: x: the padded input of {tuple(x)} is smaller than the kernel, {spans} with its gaps"
        )
    positions = [extent // step + 1 for extent, step in zip(room, steps, strict=True)]
    channels = g[-dims - 1] if len(g) >= dims + 2 else 0
    if len(g) < dims + 2 or tuple(g[-dims - 2 :]) != (x[0], channels, *positions) or channels % groups:
        raise ValueError(
            f"{name}: g: expected [..., {x[0]}, C_out, {', '.join(map(str, positions))}] with C_out a multiple of "
            f"groups = {groups}, got shape {tuple(g)}"
        )
    lead = tuple(g[: -dims - 2])
    stacked = (math.prod(lead), x[0], groups, channels // groups, *positions)
    return Geometry(kernel, steps, pads, gaps, groups, positions, lead, stacked)
