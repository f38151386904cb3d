"""``flatkern measure``: the numbers of the functions it calls, files, pages, and one-line errors."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.cli import main
from flatkern.experiments.user_model import MeasureConfig, run_measure
from flatkern.monitor.probe import choose_probe
from tests.experiments import user_problem

FILE = Path(user_problem.__file__)
MODULE = "tests.experiments.user_problem"


def run(tmp_path: Path, factory: str, *options: str) -> dict[str, Any]:
    output = tmp_path / "out"
    assert main(["measure", f"{MODULE}:{factory}", "--output", str(output), *options]) == 0
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    assert main(["measure", *arguments, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("flatkern: ")
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()
    return last


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_numbers_are_those_of_the_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "make", "--samples", "20")["points"][0]
    net, loss_fn, data = user_problem.make()
    net.eval()
    x = choose_probe(*data, 20, 0).x
    g = fk.geometry(net, x)
    expected = {
        "loss": loss_fn(net(data[0]), data[1]).item(),
        "ggn_trace": fk.ggn_trace(net, loss_fn, data).value,
        "hessian_trace": fk.hessian_trace(net, loss_fn, data, seed=0).value,
        "max_eigenvalue": fk.max_eigenvalue(net, loss_fn, data, seed=0).value,
        "gradient_norms": fk.gradient_norms(net, loss_fn, data).mean,
        "sharpness": g.sharpness.value,
        "log_volume": g.log_volume.mean,
        "log_volume_top3": g.top_log_volume(3).mean,
        "mls": g.mls.value,
        "nmls": g.nmls.value,
        "normalized_mls": g.normalized_mls.value,
        "local_dimensionality": g.local_dimensionality.mean,
    }
    values = {k: q["value"] for k, q in found["quantities"].items()}
    assert {k: values[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert found["quantities"]["mls"]["sample_stderr"] == pytest.approx(g.mls.sample_stderr, rel=1e-5)
    bounds = fk.bounds(net, x, geometry=g)
    assert found["bounds"]["MLS"]["sides"] == pytest.approx(bounds["MLS"].sides, rel=1e-5)
    out = capsys.readouterr().out
    for text in ("Tr GGN", "Tr H", "λ_max", "log volume", "NMLS", "holds", "report.html"):
        assert text in out
    row = next(csv.DictReader((tmp_path / "out" / "measurements.csv").open()))
    assert float(row["sharpness"]) == pytest.approx(expected["sharpness"], rel=1e-5)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "measurements.csv",
        "results.json",
        "report.html",
    }


def test_loaders_parameters_and_losses_of_ones_own(tmp_path: Path) -> None:
    found = run(tmp_path, "with_loader")["points"][0]["quantities"]
    net = user_problem.model().eval()
    data = (user_problem.X, user_problem.Y)
    assert found["loss"]["value"] == pytest.approx(
        nn.CrossEntropyLoss()(net(data[0]), data[1]).item(), rel=1e-5
    )
    expected = fk.ggn_trace(net, nn.CrossEntropyLoss(), data, params="0.*").value
    assert found["ggn_trace"]["value"] == pytest.approx(expected, rel=1e-5)
    found = run(tmp_path, "with_own_loss")["points"][0]["quantities"]
    assert found["loss"]["value"] == pytest.approx(
        user_problem.own_loss(net(data[0]), data[1]).item(), rel=1e-5
    )


def test_what_does_not_exist_is_said_and_the_rest_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "more_outputs_than_inputs")["points"][0]
    assert found["quantities"]["log_volume"]["value"] == "-Infinity"
    assert found["quantities"]["mls"]["value"] > 0
    found = run(tmp_path, "tokens")["points"][0]
    assert found["bounds"] is None
    assert "has no gradient" in found["quantities"]["log_volume"]["problem"]
    assert found["quantities"]["ggn_trace"]["value"] > 0
    assert "not measured" in capsys.readouterr().out
    assert "not measured" in (tmp_path / "out" / "report.html").read_text()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """A short training run, saved in the ways that people save: alone, in a dict, wrapped, as a Lightning file."""
    net = user_problem.model().eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    paths = []
    for step in range(4):
        path = tmp_path / f"step-{10 * step:03d}.pt"
        state = net.state_dict()
        kinds: list[Any] = [
            state,
            {"model": state, "optimizer": optimizer.state_dict()},
            {f"module.{k}": v for k, v in state.items()},
            {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}, "epoch": 3},
        ]
        torch.save(kinds[step], path)
        paths.append(path)
        for _ in range(10):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(net(user_problem.X), user_problem.Y).backward()
            optimizer.step()
    return paths


def test_a_series_of_checkpoints_gives_curves(tmp_path: Path, checkpoints: list[Path]) -> None:
    given = [str(checkpoints[i]) for i in (2, 0, 3, 1)]  # in any order
    found = run(tmp_path, "make", "--checkpoint", *given)["points"]
    assert [p["step"] for p in found] == [0, 10, 20, 30]
    losses = [p["quantities"]["loss"]["value"] for p in found]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4
    net = user_problem.model().eval()
    net.load_state_dict(torch.load(checkpoints[0], weights_only=True))
    assert found[0]["quantities"]["sharpness"]["value"] == pytest.approx(
        fk.sharpness(net, user_problem.X).value, rel=1e-5
    )
    output = tmp_path / "out"
    assert (output / "six-panels.png").read_bytes().startswith(b"\x89PNG")
    html = (output / "report.html").read_text()
    assert html.count("<svg") == 6
    page = Page()
    page.feed(html)
    assert len(page.ids) == len(set(page.ids))
    outside = {r for r in page.references if not r.startswith("#")}
    assert outside == {"https://arxiv.org/abs/2310.01770"}
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000", "#ffffff"}
    with (output / "measurements.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "10", "20", "30"]


def test_a_checkpoint_that_has_diverged_is_a_gap(
    tmp_path: Path, checkpoints: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (checkpoints[1], checkpoints[3]):
        state = user_problem.model().state_dict()
        state["0.weight"][0, 0] = math.nan
        torch.save(state, path)
    found = run(tmp_path, "make", "--checkpoint", *map(str, checkpoints))["points"]
    assert [p["step"] for p in found] == [0, 10, 20, 30]
    finite = [p["quantities"]["loss"]["value"] is not None for p in found]
    assert finite == [True, False, True, False]
    assert found[2]["quantities"]["sharpness"]["value"] > 0
    captured = capsys.readouterr()
    assert str(checkpoints[1]) in captured.err
    assert (tmp_path / "out" / "report.html").is_file()
    (tmp_path / "other").mkdir()
    told = fails(capsys, tmp_path / "other", f"{MODULE}:make", "--checkpoint", str(checkpoints[1]))
    assert "NaN or Inf at the weights of every checkpoint" in told


def test_a_file_beside_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("import torch\nnet = torch.nn.Linear(2, 2)\n")
    script = tmp_path / "script_of_mine.py"
    script.write_text(
        "import torch\nfrom helper_of_mine import net\n"
        "def make(): return net, torch.nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 2))\n"
    )
    result = run_measure(MeasureConfig(f"{script}:make", output=tmp_path / "out"))
    assert result.parameters == 6
    assert math.isfinite(result.last.measured.row["mls"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nowhere_at_all:make", "there is no module 'nowhere_at_all'"),
        ("tests.nowhere.at_all:make", "there is no module 'tests.nowhere'"),
        ("no/such/file.py:make", "no/such/file.py: no such file"),
        (MODULE, "expected MODULE:FUNCTION"),
        (f"{MODULE}:", "expected MODULE:FUNCTION"),
        (f"{MODULE}:mkae", "has no 'mkae'; there are model, make, with_loader"),
        (f"{MODULE}:number", "'number' is a int; expected a function"),
        (f"{MODULE}:two", "must return .*, got tuple of 2: Sequential, tuple"),
        (f"{MODULE}:no_model", r"model must be a torch\.nn\.Module, got str"),
        (f"{MODULE}:no_loss", "loss_fn must be a loss .* got str"),
        (f"{MODULE}:no_data", r"data must be a pair of tensors \(x, y\) .* got Tensor"),
        (f"{MODULE}:one_shot", "data must be .* got list_iterator"),
        (f"{MODULE}:unknown_key", "'loss_fn' is missing, 'loss' is unknown"),
        (
            f"{MODULE}:fails",
            r"the factory failed: FileNotFoundError: data\.bin is not here \(user_problem\.py, line \d+\)",
        ),
        (f"{MODULE}:wrong_shape", "the model or its loss fails on the data: mat1 and mat2"),
        (f"{MODULE}:not_finite", "the loss is nan on the data"),
        (f"{MODULE}:own_loss", "the factory failed: TypeError"),
    ],
)
def test_bad_factories(
    factory: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, fails(capsys, tmp_path, factory))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import not_installed_here\n", r"No module named 'not_installed_here' \(bad\.py, line 1\)"),
        ("def make(:\n", "SyntaxError"),
        ("x = 1 / 0\n", r"ZeroDivisionError: division by zero \(bad\.py, line 1\)"),
    ],
)
def test_modules_that_cannot_be_imported(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(text)
    found = fails(capsys, tmp_path, f"{tmp_path / 'bad.py'}:make")
    assert re.search("importing .*bad.py failed: .*" + message, found)


class Payload:
    """Anything that is not a tensor."""


def test_bad_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = user_problem.model().state_dict()
    smaller = {k: v for k, v in state.items() if k != "3.bias"} | {
        "0.weight": torch.zeros(8, 6),
        "4.weight": torch.zeros(1),
    }
    cases: dict[str, tuple[Any, str]] = {
        "missing": (smaller, r"missing: 3\.bias; not in the model: 4\.weight; of another shape: 0\.weight \[8, 6\]"),
        "ddp": ({f"module.{k}": v for k, v in smaller.items()}, "missing: 3.bias; not in the model: 4.weight"),
        "code": ({"model": Payload()}, r"holds more than weights \(.*Payload\)"),
        "list": ([1, 2], "holds a list, not a state dict"),
        "none": ({"a": 1, "net": state}, "no state dict in it; there are a, net; --key NAME"),
    }  # fmt: skip
    for name, (held, message) in cases.items():
        path = tmp_path / f"{name}.pt"
        torch.save(held, path)
        assert re.search(message, fails(capsys, tmp_path, f"{MODULE}:make", "--checkpoint", str(path))), name
    path = str(tmp_path / "none.pt")
    assert "no state dict under 'nett'; there are a, net" in fails(
        capsys, tmp_path, f"{MODULE}:make", "--checkpoint", path, "--key", "nett"
    )
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    assert "not a file that torch.save wrote" in fails(
        capsys, tmp_path, f"{MODULE}:make", "--checkpoint", str(broken)
    )
    for content in (b"junk", b"\x80\x02junk"):
        broken.write_bytes(content)
        assert str(broken) in fails(capsys, tmp_path, f"{MODULE}:make", "--checkpoint", str(broken))
    assert "--key says where" in fails(capsys, tmp_path, f"{MODULE}:make", "--key", "net")
    broken.write_bytes((tmp_path / "none.pt").read_bytes()[:800])
    assert "torch cannot read it" in fails(capsys, tmp_path, f"{MODULE}:make", "--checkpoint", str(broken))
    assert "no such file" in fails(capsys, tmp_path, f"{MODULE}:make", "--checkpoint", str(tmp_path / "x.pt"))
    assert "--device nowhere" in fails(capsys, tmp_path, f"{MODULE}:make", "--device", "nowhere")


def test_the_state_dict_under_a_key(tmp_path: Path) -> None:
    net = user_problem.model()
    with torch.no_grad():
        net[0].weight.mul_(2)
    torch.save({"a": 1, "net": net.state_dict()}, tmp_path / "a.pt")
    found = run(tmp_path, "make", "--checkpoint", str(tmp_path / "a.pt"), "--key", "net")["points"][0]
    expected = fk.sharpness(net.eval(), user_problem.X).value
    assert found["quantities"]["sharpness"]["value"] == pytest.approx(expected, rel=1e-5)
