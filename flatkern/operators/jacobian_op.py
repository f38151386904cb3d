"""The Jacobian of a model's outputs, in its parameters or its input, as a linear operator."""

from __future__ import annotations

import itertools
from typing import Literal, Self

import torch
from torch import Tensor, nn

from flatkern.operators.base import LinearOperator
from flatkern.operators.forms import Autocast, twice_differentiable
from flatkern.operators.graph_memory import graph_bytes
from flatkern.operators.identity import digest
from flatkern.operators.linearization import check_layers, vector_kind
from flatkern.operators.output_map import OutputMap
from flatkern.operators.products import LARGEST_BLOCK, Apply, BlockSize, quiet_batching
from flatkern.operators.sample_jacobians import sample_jacobians
from flatkern.operators.staleness import StaleOperatorError, WeightsWatch
from flatkern.operators.substitutes import Substitutes
from flatkern.operators.train_mode import TrainMode
from flatkern.problem import (
    DEFAULT_MAX_MEMORY,
    Layout,
    ParameterSelection,
    check_input,
    check_output,
    model_device,
    select_parameters,
)

__all__ = ["JacobianOperator", "jacobian"]


class JacobianOperator(LinearOperator):
    """∂f/∂θ [n·N, P] or ∂f/∂x [n·N, n·M]; made by :func:`jacobian`.

    Attributes:
        num_data: n.
        output_shape, input_shape: of one sample; N and M are their numbers of elements.
        wrt: ``"params"`` or ``"input"``.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        wrt: Literal["params", "input"] = "params",
        params: ParameterSelection = None,
        train_mode: bool = False,
        seed: int = 0,
    ) -> None:
        if wrt not in ("params", "input"):
            raise ValueError(f"wrt: expected 'params' or 'input', got {wrt!r}")
        if wrt == "input" and params is not None:
            raise ValueError("params: it selects parameters, so it goes with wrt='params' only")
        if wrt == "input" and train_mode:
            raise ValueError(
                "train_mode: batch statistics tie samples together, so the input Jacobian would not be block diagonal; "
                "call model.eval()"
            )
        self._train = TrainMode(train_mode, seed)
        self._train.check(model)
        check_input(x, differentiable=wrt == "input")
        self.wrt, self._model, self._x = wrt, model, x.detach().to(model_device(model))
        self.num_data, self.input_shape = len(x), x.shape[1:]
        layout = None
        if wrt == "params":
            named = select_parameters(model, params)
            dtype, device = vector_kind(named)
            layout = Layout(named)
            self._leaves: tuple[Tensor, ...] = tuple(named.values())
            check_layers(model, self._leaves)
        else:
            dtype, device = torch.promote_types(torch.float32, x.dtype), self._x.device
            self._leaves = ()
        self._autocast = Autocast(device)
        self._domain = (dtype, device, layout)
        self.refresh()

    def refresh(self) -> Self:
        """Linearize at the present weights (one forward and one backward pass) and return the operator."""
        self._watch: WeightsWatch | None = None
        self._train.check(self._model)
        with self._train.preserved(self._model), twice_differentiable(self._model):
            if self.wrt == "input":
                self._leaves = (self._x.clone().requires_grad_(),)
            # a copy: a layer may write to its input in place
            x = (self._leaves[0] if self.wrt == "input" else self._x).clone()
            with self._autocast.region(), self._train.region(self._model, 0):
                output = check_output(self._model, self._model(x), self.num_data)
            if output.dtype in (torch.bfloat16, torch.float16):
                output = output.float()
            with self._autocast.outside():
                self._map = OutputMap(self._leaves, output)
        self.output_shape = output.shape[1:]
        dtype, device, layout = self._domain
        columns = sum(leaf.numel() for leaf in self._leaves)
        super().__init__((output.numel(), columns), dtype, device, layout=layout)
        self._pushes, self._pulls = BlockSize(None), BlockSize(None)
        size = graph_bytes(self._map.roots, self._model.parameters())
        self._pushes.limit = self._pulls.limit = DEFAULT_MAX_MEMORY // max(size, 1)
        self._watch = WeightsWatch(self._model)
        return self

    def _rows(self, rows: Tensor) -> Tensor:
        return self._images(self._pushed, rows.contiguous(), self.shape[0], self._pushes)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self._images(self._pulled, rows.contiguous(), self.shape[1], self._pulls)

    def _images(self, apply: Apply, rows: Tensor, width: int, block: BlockSize) -> Tensor:
        self._check_fresh()
        out = torch.empty(len(rows), width, dtype=self.dtype, device=self.device)
        with self._autocast.outside():
            step = block.size(apply, rows)
            for start in range(0, len(rows), step):
                part = rows[start : start + step] if step > 1 else rows[start]
                torch.cat(
                    list(apply(part)), dim=-1, out=out[start : start + step] if step > 1 else out[start]
                )
        return out

    def _pushed(self, vectors: Tensor) -> list[Tensor]:
        """J v of [P] or [k, P]."""
        lead = vectors.shape[:-1]
        pieces = vectors.split([leaf.numel() for leaf in self._leaves], dim=-1)
        tangents = [p.view(lead + q.shape).to(q.dtype) for p, q in zip(pieces, self._leaves, strict=True)]
        with quiet_batching():
            change = self._map.push(tangents, batched=bool(lead))
        if change is None:
            return [vectors.new_zeros(*lead, self.shape[0])]
        return [change.reshape(*lead, -1).to(self.dtype)]

    def _pulled(self, vectors: Tensor) -> list[Tensor]:
        """Jᵀ u of [n·N] or [k, n·N]."""
        lead, output = vectors.shape[:-1], self._map.output
        with quiet_batching():
            found = self._map.pull(vectors.view(lead + output.shape).to(output.dtype), batched=bool(lead))
        return [
            vectors.new_zeros(*lead, q.numel()) if t is None else t.reshape(*lead, -1).to(self.dtype)
            for t, q in zip(found, self._leaves, strict=True)
        ]

    def per_sample(self, *, max_memory: int | None = None) -> Tensor:
        """The Jacobian of each sample as one dense tensor: [n, N, P], or [n, N, M] for ``wrt="input"``.

        Outputs and inputs are flattened per sample. Cost: N backward passes over the batch; for parameters vectorized
        over samples where ``torch.func.vmap`` takes the model, else sample by sample. Temporaries beside the result
        are as large as a few samples' Jacobians. Under ``train_mode``, where samples interact, n·N passes.

        Raises:
            ValueError: the result exceeds ``max_memory`` bytes (default 1 GiB).
        """
        n, entries = self.num_data, self.output_shape.numel()
        columns = self.shape[1] // (n if self.wrt == "input" else 1)
        size = n * entries * columns * torch.empty(0, dtype=self.dtype).element_size()
        limit = DEFAULT_MAX_MEMORY if max_memory is None else max_memory
        if size > limit:
            raise ValueError(f"max_memory: the result takes {size:,} bytes and the limit is {limit:,}")
        self._check_fresh()
        with torch.no_grad():
            result = torch.zeros(n, entries, columns, dtype=self.dtype, device=self.device)
            if self.wrt == "input":
                for start in range(0, entries, LARGEST_BLOCK):
                    some = range(start, min(start + LARGEST_BLOCK, entries))
                    units = torch.zeros(len(some), n, entries, dtype=self.dtype, device=self.device)
                    for row, c in enumerate(some):
                        units[row, :, c] = 1.0
                    found = self._adjoint_rows(units.flatten(1)).view(len(some), n, columns)
                    result[:, start : start + LARGEST_BLOCK] = found.transpose(0, 1)
            elif self._train.allowed:
                for i, c in itertools.product(range(n), range(entries)):
                    unit = torch.zeros(1, n, entries, dtype=self.dtype, device=self.device)
                    unit[0, i, c] = 1.0
                    result[i, c] = self._adjoint_rows(unit.view(1, -1))[0]
            else:
                with self._train.preserved(self._model), self._autocast.region(), Substitutes():
                    assert self.layout is not None
                    parameters = dict(zip(self.layout.names, self._leaves, strict=True))
                    sample_jacobians(self._model, parameters, self._x, result)
        return result

    def _identity(self) -> str | None:
        parameters, buffers = list(self._model.named_parameters()), list(self._model.named_buffers())
        names = () if self.layout is None else self.layout.names
        return digest("Jacobian", self.wrt, names, parameters, buffers, self._x)

    def _check_fresh(self) -> None:
        if self._watch is None:
            raise StaleOperatorError("the last J.refresh() of this operator failed; call it again")
        self._watch.check()


def jacobian(
    model: nn.Module,
    x: Tensor,
    *,
    wrt: Literal["params", "input"] = "params",
    params: ParameterSelection = None,
    train_mode: bool = False,
    seed: int = 0,
) -> JacobianOperator:
    """The Jacobian of a model's outputs as a linear operator.

    ``wrt="params"``: J = ∂f/∂θ [n·N, P]; ``wrt="input"``: J = ∂f/∂x [n·N, n·M], block diagonal over samples,
    as samples do not interact. Row i·N + c belongs to output entry c of sample i (N entries a sample,
    flattened), column i·M + d to input entry d. No normalization: the plain derivative.

    Args:
        model: any module [n, ...] → [n, ...]; in eval mode where it has batch norm or dropout. Left as found.
        x: inputs with the samples on axis 0; floating point for ``wrt="input"``.
        wrt: derivative in what.
        params: names or globs for ``wrt="params"``; default all with ``requires_grad``; tied ones count once.
        train_mode, seed: as in :func:`flatkern.operators.hessian`, for ``wrt="params"``.

    Returns:
        An operator with ``@``, ``.T`` (the adjoint product Jᵀ u), ``.per_sample()`` for the dense [n, N, P] or
        [n, N, M], and ``layout`` in parameter space. float32 vectors for bfloat16 and float16.

    Cost: one forward and one backward pass with graph at the start, which is kept; J v one or two passes
    through that graph, Jᵀ u one backward pass; several vectors in one batched pass where that is faster, timed at the
    first such product. Nothing is formed.

    Raises:
        TypeError, ValueError: input that cannot be used, naming the argument.
        StaleOperatorError: (in a product) the weights changed; ``J.refresh()`` linearizes anew.

    Example:
        >>> import torch
        >>> from flatkern.operators import jacobian
        >>> model = torch.nn.Linear(3, 2)
        >>> J = jacobian(model, torch.ones(4, 3))
        >>> J.shape, (J.T @ torch.ones(8)).shape, jacobian(model, torch.ones(4, 3), wrt="input").shape
        ((8, 8), torch.Size([8]), (8, 12))
    """
    return JacobianOperator(model, x, wrt=wrt, params=params, train_mode=train_mode, seed=seed)
