"""The callback of the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import flatkern as fk
from flatkern.monitor.probe import choose_probe
from flatkern.rows import read_rows

pytest.importorskip("accelerate", reason="needs accelerate")
transformers = pytest.importorskip("transformers", reason="needs transformers")
from flatkern.interop.transformers import MonitorCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Images(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(40, 3, 8, 8, generator=g), torch.randint(3, (40,), generator=g)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.x[i], "labels": self.y[i]}


class Texts(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(i)
        return {"input_ids": torch.randint(20, (6,), generator=g), "labels": torch.tensor(i % 2)}


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2,
        max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def train(
    folder: Path,
    model: nn.Module,
    data: Any,
    callbacks: list[Any],
    steps: int,
    resume: str | None = None,
    **options: Any,
) -> nn.Module:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", save_strategy="steps", save_steps=options.pop("save_steps", 1000), seed=3,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_a_vit_is_measured_and_trains_as_without(tmp_path: Path) -> None:
    data = Images()
    alone = train(tmp_path / "a", vit(), data, [], 7)
    callback = MonitorCallback(loss_fn=nn.CrossEntropyLoss(), every=3, samples=6)
    watched = train(tmp_path / "b", vit(), data, [callback], 7)
    for (name, a), b in zip(alone.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert callback.monitor is not None
    rows = callback.monitor.history
    assert [row["step"] for row in rows] == [0, 3, 6, 7]
    assert all(row["mls"] > 0 and row["probe_loss"] > 0 for row in rows)
    assert [row["step"] for row in read_rows(tmp_path / "b" / "flatkern.jsonl")] == [0, 3, 6, 7]

    probe = choose_probe(data.x, data.y, 6, 0)
    assert rows[0]["sharpness"] == pytest.approx(fk.sharpness(Wrapped(vit().eval()), probe.x).value, rel=1e-5)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def test_texts_give_the_sharpness_and_resuming_continues_the_file(tmp_path: Path) -> None:
    train(tmp_path, bert(), Texts(), [MonitorCallback(every=2)], 6, save_steps=4)
    first = read_rows(tmp_path / "flatkern.jsonl")
    assert [row["step"] for row in first] == [0, 2, 4, 6]
    assert all(row["sharpness"] > 0 and "mls" not in row for row in first)
    callback = MonitorCallback(every=2)
    train(tmp_path, bert(), Texts(), [callback], 9, resume=str(tmp_path / "checkpoint-4"))
    second = read_rows(tmp_path / "flatkern.jsonl")
    assert [row["step"] for row in second] == [0, 2, 4, 6, 8, 9]
    assert second[:3] == first[:3]
    assert [row["step"] for row in read_rows(tmp_path / "flatkern.bak.jsonl")] == [0, 2, 4, 6]


def test_a_batch_without_the_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inputs: a batch has no 'pixels'; it holds .*pixel_values"):
        train(tmp_path, vit(), Images(), [MonitorCallback(inputs="pixels")], 2)
