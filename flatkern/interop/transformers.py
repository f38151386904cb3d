"""The monitor as a callback of the Hugging Face ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flatkern.monitor import Monitor

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "flatkern.interop.transformers: the package is not there; pip install transformers"
    ) from error

__all__ = ["MonitorCallback"]


class MonitorCallback(TrainerCallback):  # type: ignore[misc]
    """:class:`flatkern.Monitor` on the trainer's model, f being the logits as a function of one input.

    Steps are the trainer's ``global_step``. Rows are written to ``flatkern.jsonl`` in its ``output_dir``; training that
    resumes from a checkpoint continues the file from there, training from the start begins it anew (the old one is kept
    as ``flatkern.bak.jsonl``).

    Args:
        x, y, loss_fn, every: as for :class:`flatkern.Monitor`; ``x`` defaults to the trainer's training data.
        inputs: the model's argument that f is a function of; default ``model.main_input_name`` (``"pixel_values"``,
            ``"input_ids"``, …). Token ids give the sharpness alone.
        labels: where a batch has the targets.
        forward: (model, x) → logits, where the model needs more than that input, e.g. an attention mask for padded
            text; default ``model(**{inputs: x}).logits``.
        options: any other argument of :class:`flatkern.Monitor` but ``resume``; ``path=None`` writes no file.

    Attributes:
        monitor: the :class:`flatkern.Monitor`, from the start of training on.

    Example (docs/monitor.md has a whole one)::

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[MonitorCallback(every=200)])
    """

    def __init__(
        self,
        x: Any = None,
        y: Tensor | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        every: Any = 200,
        *,
        inputs: str | None = None,
        labels: str = "labels",
        forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        self._arguments, self._options = (x, y, loss_fn, every), options
        self._inputs, self._labels, self._forward = inputs, labels, forward
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the probe set and measure the beginning, or continue the file."""
        model = kwargs["model"]
        inputs = self._inputs or str(getattr(model, "main_input_name", "input_ids"))
        x, *others = self._arguments
        options: dict[str, Any] = {"path": Path(args.output_dir) / "flatkern.jsonl", **self._options}
        if options["path"] is not None:
            Path(options["path"]).parent.mkdir(parents=True, exist_ok=True)
        self.monitor = Monitor(
            model,
            kwargs["train_dataloader"] if x is None else x,
            *others,
            forward=self._forward or _logits_of(inputs),
            pick=_columns(inputs, self._labels),
            resume=True,
            **options,
        )
        self.monitor.start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure when one is due."""
        assert self.monitor is not None
        self.monitor.step(at=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end."""
        assert self.monitor is not None
        self.monitor.finish()


def _logits_of(inputs: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        output = model(**{inputs: x})
        return output if isinstance(output, Tensor) else output.logits

    return forward


def _columns(inputs: str, labels: str) -> Callable[[Any], tuple[Tensor, Tensor | None]]:
    def pick(batch: Any) -> tuple[Tensor, Tensor | None]:
        if not hasattr(batch, "keys") or inputs not in batch:
            held = ", ".join(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
            raise ValueError(f"inputs: a batch has no {inputs!r}; it holds {held}")
        return batch[inputs], batch.get(labels)

    return pick
