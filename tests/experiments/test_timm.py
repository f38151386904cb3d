"""Classifiers of timm from local weights; its own small test models, so that nothing is looked up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flatkern as fk
from flatkern.experiments.data import load
from flatkern.experiments.errors import UserError
from flatkern.experiments.pretrained import pretrained_models
from flatkern.experiments.reproduce import reproduction, run_reproduce
from flatkern.experiments.transformers import adaptive_sharpness

timm = pytest.importorskip("timm")
NAMES = ("test_efficientnet", "test_vit")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        state = timm.create_model(name).state_dict()
        if seed:
            save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{name}.safetensors")
        else:
            torch.save(state, folder / f"{name}.pth")
    return folder


def test_models_are_those_of_the_files(weights: Path) -> None:
    data = load("digits", num_train=4, num_test=4)
    images = data.train.x.view(-1, 1, 8, 8)
    for seed, (name, found) in enumerate(zip(NAMES, pretrained_models(weights), strict=True)):
        torch.manual_seed(seed)
        model = timm.create_model(name).eval()
        assert found.name == name
        assert not found.model.training
        x = found.images(images)
        assert (
            tuple(x.shape[1:])
            == found.size
            == tuple(timm.data.resolve_model_data_config(model)["input_size"])
        )
        with torch.no_grad():
            torch.testing.assert_close(found.model(x), model(x))


def test_quantities_of_a_vision_transformer(weights: Path) -> None:
    found = list(pretrained_models(weights))[1]
    x = found.images(load("digits", num_train=2, num_test=4).train.x.view(-1, 1, 8, 8))
    with torch.no_grad():
        labels = found.model(x).argmax(1)
    sharp = adaptive_sharpness(found.model, torch.nn.CrossEntropyLoss(), (x, labels), samples=4)
    assert sharp.stderr > 0
    trace = fk.hessian_trace(found.model, torch.nn.CrossEntropyLoss(), (x, labels), samples=24, seed=0)
    reference = fk.trace(
        fk.hessian(found.model, torch.nn.CrossEntropyLoss(), (x, labels)),
        samples=24,
        method="hutchinson",
        seed=1,
    )
    assert abs(trace.value - reference.value) < 4 * (trace.stderr**2 + reference.stderr**2) ** 0.5


def test_a_report_of_the_files(weights: Path, tmp_path: Path) -> None:
    config = reproduction(
        "transformers",
        data="digits",
        num_train=20,
        num_test=10,
        num_probe=2,
        weights=weights,
        output=tmp_path,
    )
    result = run_reproduce(config, progress=False)
    assert result is not None
    assert result.transformers is not None
    assert [row["model"] for row in result.transformers.rows] == list(NAMES)
    assert "test_vit" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "no_such_model.pth").write_bytes(b"")
    with pytest.raises(UserError, match="must be that of a model of timm"):
        list(pretrained_models(tmp_path))
