"""The monitor of a training run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from flatkern.linearize import budget
from flatkern.monitor.point import Extra, Point
from flatkern.monitor.probe import choose_probe
from flatkern.monitor.record import Record
from flatkern.monitor.running_loss import RunningLoss
from flatkern.monitor.scalars import Scalars
from flatkern.monitor.schedule import Clock, Schedule
from flatkern.monitor.undisturbed import bare, undisturbed
from flatkern.problem import ParameterSelection, model_device
from flatkern.rows import Row, write_rows

__all__ = ["Monitor"]

_FIGURES = (".png", ".svg", ".pdf")


class Monitor:
    """Watches flatness and volume while a model trains, and leaves the training exactly as it is without.

    Every ``every`` steps the quantities of :func:`flatkern.geometry` (S_GN, log-volume, MLS, NMLS, local
    dimensionality) are measured on the same few samples, in eval mode. Weights, gradients, modes, buffers and random
    states are afterwards as before, so the weights of a run are bit for bit those of the run without a monitor. The
    first measurement is taken at the start, the last at the end.

    Args:
        model: the model that trains; inside ``DistributedDataParallel`` or ``torch.compile`` it is found. Where
            several processes train, the first one measures.
        x: where the probe samples are drawn from, without touching a random state: inputs [n, ...], or a dataset, a
            ``DataLoader`` or any iterable of (inputs, targets). Token ids (integers) give the sharpness alone.
        y: targets [n, ...] to a tensor ``x``.
        loss_fn: (output, target) → scalar; adds ``probe_loss``.
        every: measure each time so many steps are done; or ``"log"`` for ``per_decade`` steps a decade; or a list of
            steps.
        share: leave out every measurement that would take the time spent measuring above this part of the training
            time (0.05: 5 %). The first and the last are always taken, and counted.
        samples: size of the probe set. Cost and error bars (over samples) go with it.
        seed: of the choice of the probe set.
        bounds: also both sides of every inequality of :func:`flatkern.bounds`; costs a decomposition of each dense
            weight.
        layers, params, max_memory: as for :func:`flatkern.geometry`.
        extra: more quantities by name, (model in eval mode) → number, e.g.
            ``{"lambda_max": lambda m: fk.max_eigenvalue(m, loss_fn, data)}``. They must not change the weights.
        forward: (model, x) → output, where the model is not called as ``model(x)``, e.g.
            ``lambda model, x: model(pixel_values=x).logits``.
        path: ``.csv`` or ``.jsonl`` file that gets each row when it is measured.
        resume: continue the file ``path`` of an earlier run; without it an existing file is an error.
        tensorboard: a folder, or a ``SummaryWriter``; scalars are named ``flatkern/…``.
        per_decade: see ``every``.
        pick: (batch) → (inputs, targets) where the batches of ``x`` are no pairs.

    A row holds ``step``, ``seconds`` (of training, without measuring), ``measure_seconds``, ``probe`` (tells probe sets
    apart), ``status``, ``train_loss`` (mean of the losses given to :meth:`step` since the row before), ``probe_loss``
    and the columns of docs/demo.md. Training that diverged gives rows with the status ``"not finite"`` and no values.
    The first measurement raises what is wrong; a later one that fails warns and leaves the reason as the row's status,
    so that training goes on.

    Cost: one :func:`flatkern.geometry` of ``samples`` samples a measurement, and one synchronization with the device.

    Raises:
        TypeError, ValueError: bad arguments; at the start, whatever :func:`flatkern.geometry` refuses.
        FileExistsError: ``path`` exists and ``resume`` is not set.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 6), torch.randn(64, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with fk.Monitor(model, x, y, torch.nn.MSELoss(), every=10) as m:
        ...     for _ in range(25):
        ...         optimizer.zero_grad()
        ...         loss = torch.nn.functional.mse_loss(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...         row = m.step(loss)
        >>> [row["step"] for row in m.history]
        [0, 10, 20, 25]
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        y: Tensor | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        every: int | str | Iterable[int] = 200,
        *,
        share: float | None = None,
        samples: int = 20,
        seed: int = 0,
        bounds: bool = False,
        layers: str | Sequence[str] | None = None,
        params: ParameterSelection = None,
        extra: Mapping[str, Extra] | None = None,
        forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
        path: str | os.PathLike[str] | None = None,
        resume: bool = False,
        tensorboard: Any = None,
        per_decade: int = 10,
        pick: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None,
        max_memory: int | None = None,
    ) -> None:
        self._model = bare(model)
        self._schedule, self._clock = Schedule(every, per_decade), Clock(share)
        budget(max_memory)
        for name, function in {"loss_fn": loss_fn, "forward": forward, **(extra or {})}.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
        if taken := set(extra or ()) & _OWN:
            raise ValueError(f"extra: {taken.pop()!r} is a column of the monitor's own; choose another name")
        probe = choose_probe(x, y, samples, seed, pick)
        if loss_fn is not None and probe.y is None:
            raise ValueError("loss_fn: it needs targets; pass y, or data that brings them")
        self._fingerprint = probe.fingerprint
        self._point = Point(
            self._model,
            probe.to(model_device(self._model)),
            loss_fn=loss_fn,
            forward=forward,
            with_bounds=bounds,
            layers=layers,
            params=params,
            extra=extra or {},
            max_memory=max_memory,
        )
        self._first = _is_first_process()
        self._record = Record(path if self._first else None, resume)
        self._scalars = Scalars(tensorboard if self._first else None)
        self._check_probe(self._record.rows, f"path: {path}")
        self._step = self._record.last_step or 0
        self._clock.restore(*_times(self._record.rows))
        self._running = False
        self._loss = RunningLoss()

    @property
    def history(self) -> list[Row]:
        """All rows so far, oldest first (a copy)."""
        return [dict(row) for row in self._record.rows]

    def column(self, key: str) -> list[float]:
        """One quantity at every row, NaN where a row has none.

        Raises:
            KeyError: no row has it.
        """
        if not any(key in row for row in self._record.rows):
            known = dict.fromkeys(k for row in self._record.rows for k in row)
            raise KeyError(f"{key!r} was not measured; there are {', '.join(known)}")
        if key in ("status", "probe"):
            raise KeyError(f"{key!r} holds text; read it from history")
        return [float(row.get(key, float("nan"))) for row in self._record.rows]

    @property
    def overhead(self) -> float:
        """Seconds spent measuring over seconds spent training, earlier runs included."""
        training = self._clock.training
        return self._clock.measuring / training if training else 0.0

    def start(self, step: int | None = None) -> Self:
        """Begin, or continue, after ``step`` steps of training; measures if there is no row at all yet.

        Without ``step`` the count goes on where the last row or :meth:`load_state_dict` left it. With it, rows beyond
        (of a run that went on after the checkpoint now loaded) are dropped, with 0 all; a file that loses rows is kept
        as ``NAME.bak.csv`` (``.jsonl``). ``with`` calls this.
        """
        if step is not None:
            dropped = self._record.rewind(_count(step, "step"))
            if dropped or step != self._step:
                self._clock.restore(*_times(self._record.rows))
                self._loss = RunningLoss()
            self._step = step
        self._scalars.start(self._step)
        self._running = True
        self._clock.start()
        if not self._record.rows:
            self.measure()
        return self

    def step(self, loss: Tensor | float | None = None, *, at: int | None = None) -> Row | None:
        """Count one step of training; call it after ``optimizer.step()``. Returns the row if it measured.

        Args:
            loss: of this step; ``train_loss`` is the mean since the row before. A tensor stays on its device.
            at: the number of steps done, where somebody else counts them.
        """
        if not self._running:
            raise RuntimeError(
                "step: the monitor has not been started; use `with fk.Monitor(...) as m:` or m.start()"
            )
        self._step = self._step + 1 if at is None else _count(at, "at")
        if loss is not None:
            self._loss.add(loss)
        if self._schedule.due(self._step) and self._clock.affordable():
            return self._measure(tolerant=True)
        return None

    def measure(self) -> Row | None:
        """Measure now, whatever the schedule says.

        ``None`` where there is a row for this step already, and on all processes but the first.
        """
        return self._measure(tolerant=False)

    def _measure(self, *, tolerant: bool) -> Row | None:
        if not self._first or self._record.last_step == self._step:
            return None
        if self._record.last_step is not None and self._record.last_step > self._step:
            raise ValueError(
                f"at: step {self._step} lies before the last row's, {self._record.last_step}; training that went back "
                "to a checkpoint is continued with start(step)"
            )
        device = model_device(self._model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what training has queued is not the monitor's time
        training, begun = self._clock.training, time.perf_counter()
        try:
            with undisturbed(self._model):
                values = self._point.measure()
        except Exception as error:
            if not tolerant:
                raise
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            warnings.warn(f"flatkern: the measurement at step {self._step} failed: {told}", stacklevel=3)
            values = {"status": told}
        took = time.perf_counter() - begun
        self._clock.measured(took)
        row: Row = {
            "step": self._step,
            "seconds": training,
            "measure_seconds": took,
            "probe": self._fingerprint,
        }
        if self._loss.count:
            row["train_loss"] = self._loss.total / self._loss.count
        self._loss = RunningLoss()
        row |= values
        self._record.append(row)
        self._scalars.write(row)
        return dict(row)

    def finish(self) -> None:
        """Measure the end, unless that has been done, and close what is open. ``with`` calls this."""
        if not self._running:
            return
        self._measure(tolerant=True)
        self.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:  # weights in the middle of something are nothing to measure
            self.stop()

    def stop(self) -> None:
        """End without a measurement, as after an error; close what is open."""
        self._running = False
        self._clock.stop()
        self._scalars.stop()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, as plain numbers and lists; put it into the training's checkpoint."""
        return {
            "version": 1,
            "step": self._step,
            "probe": self._fingerprint,
            "rows": self.history,
            "training_seconds": self._clock.training,
            "measuring_seconds": self._clock.measuring,
            "loss_sum": self._loss.total,
            "losses": self._loss.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: its rows replace those here and in the file, its step count goes on."""
        missing = {"step", "probe", "rows", "training_seconds", "measuring_seconds"} - set(state)
        if missing:
            raise ValueError(f"state: not a monitor's state_dict; {', '.join(sorted(missing))} missing")
        self._check_probe([{"probe": state["probe"]}], "state")
        rows = [dict(row) for row in state["rows"]]
        if self._first:
            self._record.replace(rows)
        self._step = int(state["step"])
        self._clock.restore(state["training_seconds"], state["measuring_seconds"], _times(rows)[2])
        self._loss = RunningLoss(float(state.get("loss_sum", 0.0)), int(state.get("losses", 0)))

    def plot(self) -> Any:
        """The six panels as a matplotlib figure; bands are one standard error of the mean over the probe samples.

        Train loss (of the probe samples where none was given to :meth:`step`), NMLS, √S, log-volume (top 3), MLS and
        log local dimensionality against the step, which is logarithmic where the schedule is.
        """
        try:
            from flatkern.report.curves import six_panels
        except ImportError as error:
            raise ImportError("plot: matplotlib is not there; pip install flatkern[demo]") from error
        return six_panels(self._record.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows (``.csv``, ``.jsonl``, ``.json``) or the six panels (``.png``, ``.svg``, ``.pdf``)."""
        target = Path(path)
        if target.suffix in _FIGURES:
            self.plot().savefig(target)
        elif target.suffix in (".csv", ".jsonl", ".json"):
            write_rows(target, self._record.rows)
        else:
            raise ValueError(
                f"path: {target.name!r} must end in .csv, .jsonl, .json (rows), {', '.join(_FIGURES)} (panels)"
            )

    def _check_probe(self, rows: Sequence[Mapping[str, Any]], where: str) -> None:
        other = {str(row.get("probe")) for row in rows} - {self._fingerprint}
        if other:
            raise ValueError(
                f"{where}: measured on other probe samples ({', '.join(sorted(other))}; now {self._fingerprint}); "
                "continue with the same data, samples and seed, or begin another file"
            )


_OWN = frozenset({"step", "seconds", "measure_seconds", "probe", "train_loss", "status"})
"""Columns of every row, beside those of what is measured."""


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a number of steps from 0 on, got {value!r}")
    return value


def _times(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Seconds of training and of measuring that rows tell of, and the last measurement's."""
    if not rows:
        return 0.0, 0.0, 0.0
    spent = [float(row.get("measure_seconds", 0.0)) for row in rows]
    return float(rows[-1].get("seconds", 0.0)), sum(spent), spent[-1]
