"""Adaptive sharpness against an explicit Hessian; pretrained models from local files."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.experiments.data import load
from flatkern.experiments.errors import UserError
from flatkern.experiments.networks import build_network
from flatkern.experiments.pretrained import pretrained_models
from flatkern.experiments.reproduce import reproduction, run_reproduce
from flatkern.experiments.transformers import adaptive_sharpness, measure_pretrained


def explicit(model: nn.Module, loss_fn: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    names = [name for name, _ in model.named_parameters()]
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [v.view(s) for v, s in zip(flat.split(sizes), shapes, strict=True)]
        return loss_fn(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), x), y)

    hessian = torch.func.hessian(loss)(theta)
    return float((theta.square() * hessian.diagonal()).sum())


def test_adaptive_sharpness_is_that_of_the_explicit_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    truth = explicit(model, nn.CrossEntropyLoss(), x, y)
    found = [
        adaptive_sharpness(model, nn.CrossEntropyLoss(), (x, y), samples=200, seed=seed) for seed in range(8)
    ]
    z = [(e.value - truth) / e.stderr for e in found]
    assert max(map(abs, z)) < 4.5
    assert abs(sum(z)) / len(z) ** 0.5 < 3.5


def test_adaptive_sharpness_ignores_a_rescaling_that_changes_no_output() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    before = explicit(model, nn.MSELoss(), x, y)
    sharpness = fk.sharpness(model, x).value
    with torch.no_grad():
        model[0].weight.mul_(3.0)
        model[2].weight.div_(3.0)
    assert explicit(model, nn.MSELoss(), x, y) == pytest.approx(before, rel=1e-9)
    assert fk.sharpness(model, x).value != pytest.approx(sharpness, rel=0.1)
    found = adaptive_sharpness(model, nn.MSELoss(), (x, y), samples=400)
    assert abs(found.value - before) < 4.5 * found.stderr


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_geometry_of_a_vit_is_that_of_its_jacobian(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model, x = build_network("vit-8-2", shape, ()).double(), torch.rand(3, *shape).double()
    rows = [torch.func.jacrev(lambda z: model(z[None])[0])(one).flatten(1).detach() for one in x]
    norms = torch.linalg.matrix_norm(torch.stack(rows), 2)
    g = fk.geometry(model, x)
    assert g.mls.value == pytest.approx(float(norms.mean()), rel=1e-8)
    size = x.flatten(1).square().sum(1)
    assert g.normalized_mls.value == pytest.approx(float((size * norms.square()).mean()), rel=1e-8)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "weights"
    for i, width in enumerate((8, 16)):
        torch.manual_seed(i)
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
            num_labels=4,
        )
        transformers.ViTForImageClassification(config).save_pretrained(folder / f"model-{i}")
    (folder / "model-0" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 4.0]})
    )
    return folder


def test_local_weights_are_read_and_measured(weights: Path) -> None:
    data = load("digits", num_train=20, num_test=10).as_images()
    first, second = pretrained_models(weights)
    x = first.images(data.train.x)
    assert x.shape == (20, 3, 16, 16)
    grey = nn.functional.interpolate(data.train.x, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(x[:, 2:], (grey - 0.3) / 4)
    assert second.mean == second.std == (0.5, 0.5, 0.5)
    config = reproduction("transformers", data="digits", num_train=20, num_test=10, num_probe=4)
    said: list[str] = []
    found = measure_pretrained(weights, config, data, said.append)
    assert [row["model"] for row in found.rows] == ["model-0", "model-1"]
    expected = fk.geometry(first.model, first.images(data.train.x[:4])).normalized_mls.value
    assert found.rows[0]["normalized_mls"] == pytest.approx(expected, rel=1e-6)
    assert len(said) == 2


def test_a_report_of_local_weights(weights: Path, tmp_path: Path) -> None:
    config = reproduction(
        "transformers",
        data="digits",
        num_train=20,
        num_test=10,
        num_probe=3,
        weights=weights,
        output=tmp_path / "out",
    )
    result = run_reproduce(config, progress=False)
    assert result is not None
    assert result.runs == []
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "model-1" in page
    assert "read from files" in page
    assert '<section id="rate">' not in page
    assert (tmp_path / "out" / "transformers.png").is_file()


def test_folders_without_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not a folder"):
        list(pretrained_models(tmp_path / "none"))
    with pytest.raises(UserError, match="neither"):
        list(pretrained_models(tmp_path))
    (tmp_path / "vit.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        list(pretrained_models(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="cannot make an image classifier"):
        list(pretrained_models(tmp_path))
