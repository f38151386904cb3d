"""What the Hessian and the Gauss-Newton operator share: batches, their weights, kept graphs, staleness."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flatkern.losses import Reduction
from flatkern.operators.base import LinearOperator
from flatkern.operators.batches import (
    Forward,
    OperatorData,
    fingerprint,
    num_samples,
    reading,
    same_fingerprint,
    tensors_in,
)
from flatkern.operators.choosing import ProgramTrial, program_block
from flatkern.operators.determinism import CHANGED_DATA, check_output_again, check_second_pass
from flatkern.operators.evaluation import OWN_LOSS, evaluate, resolve
from flatkern.operators.forms import Autocast, twice_differentiable
from flatkern.operators.gradient_tape import GradientTape, noting
from flatkern.operators.graph_memory import graph_bytes
from flatkern.operators.identity import describe_loss, digest
from flatkern.operators.linearization import (
    KeptBatch,
    Linearization,
    OperatorInfo,
    check_layers,
    vector_kind,
)
from flatkern.operators.products import (
    BlockSize,
    Mode,
    Parts,
    accumulate,
    forward_is_faster,
    images,
    resolve_mode,
)
from flatkern.operators.staleness import StaleOperatorError, WeightsWatch, modes_of
from flatkern.operators.train_mode import TrainMode
from flatkern.problem import (
    DEFAULT_MAX_MEMORY,
    Layout,
    ParameterSelection,
    all_finite,
    check_input,
    model_device,
    preserve_state,
    select_parameters,
)
from flatkern.tape import UnsupportedError

__all__ = ["CurvatureOperator"]


class CurvatureOperator(LinearOperator):
    """A curvature matrix of the loss, summed over batches, over the denominator of the whole data set.

    Symmetric [P, P] in the flat parameter space given by ``layout``. See :func:`flatkern.operators.hessian`
    and :func:`flatkern.operators.ggn`.

    Attributes:
        num_data: number of samples over all batches.
        denominator: what the summed loss numerators are divided by: 1 for a sum, for a mean the number of
            samples, of output entries, or the summed weights of the kept labels (see
            :class:`flatkern.losses.Loss`).
        info: how products are done, as an :class:`OperatorInfo`.
    """

    layout: Layout
    splits_at_output: ClassVar[bool] = True
    """Whether the operator needs the model's output and not only the loss."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: object,
        data: Any,
        *,
        params: ParameterSelection = None,
        reduction: Reduction | None = None,
        max_memory: int | None = None,
        forward: Forward | None = None,
        check_determinism: bool = True,
        mode: Mode = "auto",
        block_size: int | None = None,
        train_mode: bool = False,
        seed: int = 0,
        linearize: bool = True,
    ) -> None:
        self._train = TrainMode(train_mode, seed)
        self._train.check(model)
        if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 0):
            raise ValueError(f"max_memory: expected bytes from 0 (keep no graph) on, got {max_memory!r}")
        self._loss = resolve(loss_fn, reduction, forward)
        if self._loss.name == OWN_LOSS and self.splits_at_output:
            raise ValueError(
                "loss_fn: with None only the loss is known, and this matrix is split at the model's output; give "
                "loss_fn and forward=(model, batch) -> (output, target), or take fk.hessian"
            )
        self._forward, self._loss_fn = forward, loss_fn
        self._check_loss()
        self._model = model
        self._named = select_parameters(model, params)
        self._parameters = tuple(self._named.values())
        dtype, device = vector_kind(self._named)
        layout = Layout(self._named)
        super().__init__((layout.size, layout.size), dtype, device, symmetric=True, layout=layout)
        self._data = OperatorData(data, model_device(model), forward)
        self._max_memory = DEFAULT_MAX_MEMORY if max_memory is None else max_memory
        supported = forward is None and not self.splits_at_output
        self._max_memory = resolve_mode(mode, self._max_memory, forward_supported=supported)
        left_over = mode in ("kept", "linearized") or (mode == "auto" and not supported)
        self._mode: Mode = "rebuilt" if left_over else mode
        # whether kept batches are tangent programs and not graphs, and whether that may change
        self._linearized, self._trial = mode == "linearized", ProgramTrial() if mode == "auto" else None
        self._asked_size = block_size
        self._block = program_block(block_size, 1) if self._linearized else BlockSize(block_size)
        self._autocast = Autocast(device)
        self._products = self._coming = 0
        self._untried = check_determinism  # whether data and model are still to be asked twice
        self._unchecked = self._loss.callable  # a callable's reduction is compared with two halves once
        self._watch: WeightsWatch | None = None
        if linearize:
            self.refresh()

    # -- to implement ------------------------------------------------------------------------------
    @property
    def method(self) -> str:
        """How a product is done, in words."""
        raise NotImplementedError

    def _linearize(
        self, output: Tensor, target: Tensor, index: int, tape: GradientTape | None
    ) -> Linearization:
        """The map of batch ``index``, from the model's output with its graph, or with a tape as a program."""
        raise NotImplementedError

    def _without_graph(self, batch: Any, index: int) -> Linearization | None:
        """The map of a batch that keeps no graph, where there is one."""
        return None

    def _check_loss(self) -> None:
        """Refuse losses that this operator is not defined for."""

    # -- linearizing -------------------------------------------------------------------------------
    def refresh(self) -> Self:
        """Linearize at the present weights (one pass over the data) and return the operator."""
        try:
            self._refresh()
        except UnsupportedError as error:
            if self._trial is None:
                raise ValueError(
                    f"mode: 'linearized' is not for this model ({error}); take 'auto'"
                ) from error
            self._linearized, self._block = False, BlockSize(self._asked_size)
            self._refresh()
        return self

    def _refresh(self) -> None:
        start = time.perf_counter()
        self._train.check(self._model)
        check_layers(self._model, self._parameters)
        self._watch = None  # until this has succeeded, there is nothing to multiply with
        self._batches: list[KeptBatch] = []
        self._kept_bytes = 0
        self.num_data = 0
        total_weight: Tensor | float = 0.0
        largest, keeping = 0, True
        # the outer guards cover what reading the data does: a DataLoader draws a seed from the global
        # generator
        with preserve_state(self._model, allow_random=True), reading(self._data.source):
            for index, batch in enumerate(self._data):
                linear, weight, scale = self._build(batch, index, first=True, linearized=self._linearized)
                total_weight = total_weight + weight
                self.num_data += num_samples(batch)
                size = graph_bytes(linear.roots, self._model.parameters())
                largest = max(largest, size)
                keeping = keeping and self._kept_bytes + size <= self._max_memory
                self._kept_bytes += size if keeping else 0
                self._batches.append(KeptBatch(scale, fingerprint(batch), linear if keeping else None))
                del linear
                if not keeping:
                    self._make_room(largest)
            self._block.limit = self._max_memory // max(largest, 1)
            if self._untried:
                sums = [batch.sums for batch in self._batches]
                # batch statistics and masks belong to the batches as they were composed
                strict = self._train.allowed or not keeping
                check_second_pass(self._data, sums, order_matters=strict)
                self._untried = False
        self.denominator = self._loss.denominator(total_weight)
        for batch in self._batches:
            batch.scale /= self.denominator
        self._watch, self._modes = WeightsWatch(self._model), modes_of(self._model)
        self._seconds = time.perf_counter() - start

    def _make_room(self, largest: int) -> None:
        """Drop kept graphs, the latest first, until a rebuilt one fits into the budget beside the rest."""
        for batch in reversed(self._batches):
            if self._kept_bytes + largest <= self._max_memory:
                return
            if batch.kept is not None:
                self._kept_bytes -= graph_bytes(batch.kept.roots, self._model.parameters())
                batch.kept = None

    def _build(
        self, batch: Any, index: int, *, first: bool, linearized: bool = False
    ) -> tuple[Linearization, Tensor, float]:
        """Forward pass and linearization of one batch, of the per-sample mean (a loss's usual magnitude).

        ``linearized``: as a tangent program and not as a graph.

        Returns the map, the batch's part of the denominator, and what the map's products are to be
        multiplied with.
        """
        if first:
            self._check_batch(batch, index)
        samples, own = num_samples(batch), self._loss.name == OWN_LOSS
        tape = GradientTape(self._parameters) if linearized else None
        with (
            self._train.preserved(self._model),
            twice_differentiable(self._model),
            ExitStack() as stack,
        ):
            with self._autocast.region(), self._train.region(self._model, index), noting(tape):
                output, y = evaluate(self._model, batch, self._forward, own_loss=own, samples=samples)
            stack.enter_context(self._autocast.outside())
            if output.dtype in (torch.bfloat16, torch.float16):
                with noting(tape):
                    output = output.float()
            if self._unchecked and len(output) > 1:
                if isinstance(y, Tensor) and y.ndim and len(y) == len(output):
                    self._loss.check_reduction(output.detach(), y)
                self._unchecked = False
            linear = self._linearize(output, y, index, tape)
            weight = self._loss.weight(output.detach(), y).detach() if first else output.new_zeros(())
        if first and index == 0 and self._untried:
            with (
                self._train.preserved(self._model),
                twice_differentiable(self._model),
                self._autocast.region(),
                self._train.region(self._model, index),
                torch.no_grad(),
            ):
                again, _ = evaluate(self._model, batch, self._forward, own_loss=own, samples=samples)
            check_output_again(output, again)
        return linear, weight, float(len(output))

    def _check_batch(self, batch: Any, index: int) -> None:
        if self._forward is None:
            check_input(batch[0], differentiable=False, name=f"data: x of batch {index}")
        for tensor in tensors_in(batch):
            if tensor.is_floating_point() and not all_finite(tensor):
                what = "y" if self._forward is None else "a tensor"
                raise ValueError(f"data: {what} of batch {index} holds NaN or Inf")

    def _numerator(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss's numerator over the batch's number of samples, checked."""
        value = self._loss.numerator(output, target) / len(output)
        if not bool(torch.isfinite(value)):
            raise ValueError(
                "loss_fn: the loss is NaN or Inf on finite outputs; check the targets and the loss's weights"
            )
        return value

    # -- products ----------------------------------------------------------------------------------
    def _once(self, v: Tensor) -> Tensor:
        """The product with v [P] or [P, k] in one pass over the data; nothing is kept."""
        self._check_vectors(v)
        rows = v.detach()[None] if v.ndim == 1 else v.detach().mT
        check_layers(self._model, self._parameters)
        parts = Parts(self._parameters, range(len(self._parameters)), self.dtype)
        rows = rows.contiguous()
        total = torch.zeros(len(rows), self.shape[0], dtype=self.dtype, device=self.device)
        weights: Tensor | float = 0.0
        with (
            torch.no_grad(),
            preserve_state(self._model, allow_random=True),
            reading(self._data.source),
        ):
            for index, batch in enumerate(self._data):
                linear, weight, scale = self._build(batch, index, first=True)
                weights = weights + weight
                with self._autocast.outside():
                    accumulate(total, linear, rows, parts, scale, block_size=1)
        total /= self._loss.denominator(weights)
        return total[0] if v.ndim == 1 else total.mT

    def _rows(self, rows: Tensor) -> Tensor:
        return self._block_rows(rows, self.layout.names)

    def _block_rows(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        position = {name: i for i, name in enumerate(self.layout.names)}
        wanted = [position[name] for name in names]
        if self._watch is None:
            raise StaleOperatorError("the last H.refresh() of this operator failed; call it again")
        self._watch.check()
        rows = rows.contiguous()
        parts = Parts(self._parameters, wanted, self.dtype)
        if self._trial is not None and len(wanted) == len(self._parameters):
            self._try_programs(rows, parts)
        kept = [batch for batch in self._batches if batch.kept is not None]
        make = torch.empty if kept else torch.zeros
        with torch.inference_mode(False), torch.no_grad(), self._autocast.outside():
            total = make(rows.shape, dtype=self.dtype, device=self.device)
            for i, batch in enumerate(kept):
                assert batch.kept is not None
                size = self._block.size(partial(images, batch.kept, parts=parts), rows)
                accumulate(total, batch.kept, rows, parts, batch.scale, block_size=size, fresh=i == 0)
            if len(kept) < len(self._batches):
                self._accumulate_rebuilt(total, rows, parts)
        self._products += len(rows)
        return total

    def _try_programs(self, rows: Tensor, parts: Parts) -> None:
        """Replace the kept graphs by tangent programs where those are faster for such vectors.

        The data are read again for them; where these differ from the first pass, the graphs stay.
        """
        assert self._trial is not None
        first = next((i for i, batch in enumerate(self._batches) if batch.kept is not None), None)
        if self._linearized or first is None or not self._trial.due(len(rows), self._products + self._coming):
            return
        if self._modes != modes_of(self._model):
            return
        graph = self._batches[first].kept
        assert graph is not None
        program = next(self._programs(first, first + 1), None)
        if program is None:
            self._trial.refused = True
            return
        size = graph_bytes(program.roots, self._model.parameters())
        kept = sum(batch.kept is not None for batch in self._batches)
        block = program_block(self._asked_size, self._max_memory // max(size, 1))
        if size * kept + self._kept_bytes // kept > self._max_memory:
            return
        with torch.inference_mode(False), torch.no_grad(), self._autocast.outside():
            if not self._trial.faster(graph, program, rows, parts, self._block, block):
                return
        del graph
        self._take_programs(kept, block)

    def _take_programs(self, count: int, block: BlockSize) -> None:
        """Programs for the kept batches, which are the first ``count``."""
        done = 0
        for batch, program in zip(self._batches, self._programs(0, count), strict=False):
            assert batch.kept is not None
            owned = list(self._model.parameters())
            self._kept_bytes += graph_bytes(program.roots, owned) - graph_bytes(batch.kept.roots, owned)
            batch.kept = program
            done += 1
        if done == count:
            self._linearized, self._block = True, block
        elif self._trial is not None:
            self._trial.refused = True

    def _programs(self, start: int, end: int) -> Iterator[Linearization]:
        """The tangent programs of some batches, as far as the data are those of the first pass."""
        with preserve_state(self._model, allow_random=True), reading(self._data.source):
            for index, batch in enumerate(itertools.islice(self._data, end)):
                if index < start:
                    continue
                if not same_fingerprint(self._batches[index].sums, fingerprint(batch)):
                    return
                try:
                    linear, _, _ = self._build(batch, index, first=False, linearized=True)
                except Exception:  # whatever goes wrong on this way, there is another
                    return
                yield linear

    def _rebuilt(self, batch: Any, index: int) -> Linearization:
        return self._build(batch, index, first=False)[0]

    def _accumulate_rebuilt(self, total: Tensor, rows: Tensor, parts: Parts) -> None:
        if self._modes != modes_of(self._model):
            raise StaleOperatorError(
                "the model was switched between train and eval mode since this operator was linearized, and some "
                "of its batches are rebuilt in every product; switch it back, or call H.refresh()"
            )
        with preserve_state(self._model, allow_random=True), reading(self._data.source):
            count = 0
            for index, batch in enumerate(self._data):
                count += 1
                if index >= len(self._batches):
                    break
                known = self._batches[index]
                if known.kept is not None:
                    continue
                if not same_fingerprint(known.sums, fingerprint(batch)):
                    raise RuntimeError(CHANGED_DATA.format(f"batch {index} differs"))
                if self._mode == "auto":
                    rebuild = partial(self._rebuilt, batch, index)
                    faster = forward_is_faster(
                        rebuild, partial(self._without_graph, batch, index), rows, parts
                    )
                    self._mode = "forward" if faster else "rebuilt"
                linear = self._without_graph(batch, index) if self._mode == "forward" else None
                if linear is None:
                    linear = self._rebuilt(batch, index)
                size = (
                    self._block.size(partial(images, linear, parts=parts), rows)
                    if self._mode != "forward"
                    else 1
                )
                accumulate(total, linear, rows, parts, known.scale, block_size=size)
            if count != len(self._batches):
                raise RuntimeError(CHANGED_DATA.format("the number of batches differs"))

    # -- recognising it in another process ---------------------------------------------------------
    def _settings(self) -> tuple[Any, ...]:
        """What distinguishes operators of one class on the same model, loss and data."""
        return ()

    def _identity(self) -> str | None:
        return digest(
            type(self).__name__,
            self._settings(),
            self._loss.name,
            self._loss.reduction,
            describe_loss(self._loss_fn),
            self.layout.names,
            list(self._model.named_parameters()),
            list(self._model.named_buffers()),
            [batch.sums for batch in self._batches],
            self.denominator,
        )

    def _engine(self) -> dict[str, Any]:
        kept = sum(batch.kept is not None for batch in self._batches)
        return {
            "mode": self._mode,
            "block_size": self._block.chosen,
            "kept_batches": kept,
            "linearized": self._linearized,
            "open": self._trial is not None,
        }

    def _expect(self, products: int) -> None:
        self._coming = products

    def _freeze_engine(self) -> None:
        self._trial = None

    def _use_engine(self, state: Mapping[str, Any]) -> None:
        kept = self._engine()["kept_batches"]
        if kept != state["kept_batches"]:
            raise ValueError(
                f"max_memory: {kept} batches are kept, {state['kept_batches']} were in the earlier run, so sums would "
                "round differently; make the operator with the same max_memory"
            )
        if state.get("linearized", False) != self._linearized:
            self._linearized, self._block = not self._linearized, BlockSize(self._asked_size)
            self.refresh()
        self._mode, self._trial = state["mode"], ProgramTrial() if state.get("open", False) else None
        if state["block_size"] is not None:
            self._block.fix(state["block_size"])

    @property
    def info(self) -> OperatorInfo:
        """How products are done at present."""
        kept = sum(batch.kept is not None for batch in self._batches)
        return OperatorInfo(
            method=self.method,
            mode=("linearized" if self._linearized else "kept") if kept == len(self._batches) else self._mode,
            block_size=self._block.chosen,
            batches=len(self._batches),
            kept_batches=kept,
            kept_bytes=self._kept_bytes,
            max_memory=self._max_memory,
            products=self._products,
            linearize_seconds=self._seconds,
        )
