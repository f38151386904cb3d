"""The numbers in the files and figures are those of the networks, checked by an independent way."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import flatkern as fk
from flatkern.experiments.claims import HELD
from flatkern.experiments.data import load
from flatkern.experiments.quantities import CORRELATED, PANELS, QUANTITIES
from flatkern.experiments.result import Result
from flatkern.experiments.sgd import mlp_from
from flatkern.report.panels import MLS_CHAIN, bound_panel, scatter_panel, spectrum_panel, sweep_panel
from flatkern.report.tables import number, spread, summary_table


@pytest.fixture(scope="module")
def rows(output: Path) -> list[dict[str, str]]:
    with (output / "measurements.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def saved(output: Path) -> dict:
    return torch.load(output / "final_weights.pt", weights_only=True)


def last(rows: list[dict[str, str]], lr: float, batch: int, seed: int) -> dict[str, str]:
    return [
        r
        for r in rows
        if (float(r["learning_rate"]), int(r["batch_size"]), int(r["seed"])) == (lr, batch, seed)
    ][-1]


def test_every_run_and_point_is_there(demo: Result, rows: list[dict[str, str]]) -> None:
    assert len(demo.runs) == 10
    steps = demo.runs[0].column("step")
    assert steps[0] == 0
    assert steps[-1] == 400
    assert len(rows) == 10 * len(steps)


def test_final_rows_equal_explicit_jacobians(demo: Result, rows: list[dict[str, str]], saved: dict) -> None:
    """Per sample, in float64, by autograd: nothing of fk.geometry is used."""
    for run in demo.runs[::3]:
        model = mlp_from(saved["sizes"], saved["weights"][run.name]).double()
        names = [n for n, _ in model.named_parameters()]
        values = tuple(p.detach() for p in model.parameters())

        def output(x, *params, model=model, names=names):
            return torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,))

        top, logs, full, dims, squares = [], [], [], [], []
        for x in saved["probe"].double():
            jacobians = torch.autograd.functional.jacobian(output, (x, *values))
            sigma = torch.linalg.svdvals(jacobians[0])
            top.append(sigma[0])
            logs.append(sigma[:3].log().sum())
            full.append(sigma.log().sum())
            dims.append(sigma.square().sum() ** 2 / sigma.pow(4).sum())
            squares.append(sum(j.square().sum() for j in jacobians[1:]))
        row = last(rows, run.setting.learning_rate, run.setting.batch_size, run.seed)
        expected = {
            "mls": top,
            "log_volume_top3": logs,
            "log_volume": full,
            "local_dimensionality": dims,
            "sharpness": squares,
        }
        for key, per_sample in expected.items():
            values_ = torch.stack(per_sample)
            assert float(row[key]) == pytest.approx(float(values_.mean()), rel=2e-5, abs=2e-5), key
            error = float(values_.std() / len(values_) ** 0.5)
            assert float(row[f"{key}_stderr"]) == pytest.approx(error, rel=1e-3), key
        assert float(row["sqrt_sharpness"]) == pytest.approx(math.sqrt(float(row["sharpness"])))


def test_final_rows_equal_geometry_and_bounds(demo: Result, rows: list[dict[str, str]], saved: dict) -> None:
    run = demo.runs[-1]
    model = mlp_from(saved["sizes"], saved["weights"][run.name])
    g = fk.geometry(model, saved["probe"])
    row = last(rows, run.setting.learning_rate, run.setting.batch_size, run.seed)
    assert float(row["nmls"]) == pytest.approx(g.nmls.value, rel=1e-6)
    assert float(row["normalized_mls"]) == pytest.approx(g.normalized_mls.value, rel=1e-6)
    sides = fk.bounds(model, saved["probe"], geometry=g)["MLS"].sides
    sides = sides | {"√S": 0.5 * math.log(g.sharpness.value)}
    for key, label in MLS_CHAIN:
        assert float(row[key]) == pytest.approx(sides[label] / math.log(10), abs=1e-6)
    assert float(row["log10_mls_a"]) == pytest.approx(math.log10(float(row["mls"])), abs=1e-9)
    assert row["status_mls"] == "holds"


def test_losses_are_those_of_the_saved_weights(demo: Result, rows: list[dict[str, str]], saved: dict) -> None:
    config = demo.config
    data = load("digits", num_train=config.num_train, num_test=config.num_test)
    run = demo.runs[2]
    model = mlp_from(saved["sizes"], saved["weights"][run.name])
    row = last(rows, run.setting.learning_rate, run.setting.batch_size, run.seed)
    with torch.no_grad():
        mse = float(torch.nn.MSELoss()(model(data.train.x), data.train.targets))
        test = 0.5 * float((model(data.test.x) - data.test.targets).square().sum(1).mean())
        right = float((model(data.test.x).argmax(1) == data.test.labels).float().mean())
    assert float(row["train_mse"]) == pytest.approx(mse, rel=1e-5)
    assert float(row["train_loss"]) == pytest.approx(5 * mse, rel=1e-5)
    assert float(row["test_accuracy"]) == pytest.approx(right)
    assert float(row["generalization_gap"]) == pytest.approx(test - 5 * mse, rel=1e-4)


def test_six_panels_show_the_measurements(demo: Result, rows: list[dict[str, str]]) -> None:
    for sweep in (demo.config.rate_sweep, demo.config.batch_sweep):
        for key in PANELS:
            ax = Figure().add_subplot()
            sweep_panel(ax, demo, sweep, key)
            lines = [line for line in ax.lines if len(line.get_xdata()) > 1]
            assert len(lines) == 3
            for setting, line, band in zip(sweep, lines, ax.collections, strict=True):
                chosen = [
                    r for r in rows
                    if float(r["learning_rate"]) == setting.learning_rate
                    and int(r["batch_size"]) == setting.batch_size and int(r["step"]) > 0
                ]  # fmt: skip
                values = np.array([[float(r[key]) for r in chosen if int(r["seed"]) == k] for k in (0, 1)])
                mean = np.sqrt(values[0] * values[1]) if QUANTITIES[key].log_axis else values.mean(0)
                np.testing.assert_allclose(line.get_ydata(), mean, rtol=1e-9)
                steps = [int(r["step"]) for r in chosen if r["seed"] == "0"]
                np.testing.assert_array_equal(line.get_xdata(), steps)
                edge = band.get_paths()[0].vertices[:, 1]
                assert edge.min() == pytest.approx(values.min())
                assert edge.max() == pytest.approx(values.max())


def test_bound_and_scatter_panels_show_the_measurements(demo: Result) -> None:
    setting = demo.config.middle
    runs = [r for r in demo.runs if r.setting == setting]
    ax = Figure().add_subplot()
    bound_panel(ax, demo, setting, MLS_CHAIN, (1e-3, 1e3))
    for (key, _), line in zip(MLS_CHAIN, ax.lines, strict=True):
        expected = np.mean([r.column(key)[1:] for r in runs], axis=0)
        np.testing.assert_allclose(np.log10(line.get_ydata()), expected, atol=1e-9)
    assert [t.get_text() for t in ax.texts] == ["A", "B", "C", "D", "√S"]
    ax = Figure().add_subplot()
    scatter_panel(ax, demo, "mls")
    assert sorted(v for line in ax.lines for v in line.get_ydata()) == pytest.approx(
        sorted(r.final("mls") for r in demo.runs)
    )


def test_correlations_are_those_of_the_final_values(demo: Result, output: Path) -> None:
    with (output / "correlations.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(CORRELATED) * (len(CORRELATED) - 1) // 2
    found = next(r for r in table if (r["first"], r["second"]) == ("sqrt_sharpness", "log10_mls_d"))
    bound = [10 ** r.final("log10_mls_d") for r in demo.runs]
    expected = np.corrcoef([r.final("sqrt_sharpness") for r in demo.runs], bound)[0, 1]
    assert float(found["pearson"]) == pytest.approx(expected)
    assert float(found["pearson_low"]) <= expected <= float(found["pearson_high"])


def test_spectrum_equals_the_explicit_hessian(demo: Result, saved: dict) -> None:
    s = demo.spectrum
    assert s is not None
    config = demo.config
    data = load("digits", num_train=config.num_train, num_test=config.num_test)
    part = data.train.first(config.spectrum_samples)
    model = mlp_from(saved["sizes"], saved["weights"][s.run]).double()
    shapes = [(n, p.shape, p.numel()) for n, p in model.named_parameters()]

    def loss(theta):
        pieces = theta.split([k for *_, k in shapes])
        state = {n: t.reshape(shape) for (n, shape, _), t in zip(shapes, pieces, strict=True)}
        out = torch.func.functional_call(model, state, (part.x.double(),))
        return torch.nn.functional.mse_loss(out, part.targets.double())

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta))
    assert s.parameters == len(theta)
    np.testing.assert_allclose(s.largest, eigenvalues.flip(0)[:5].numpy(), rtol=2e-3)
    assert abs(s.trace - float(eigenvalues.sum())) < 5 * s.trace_stderr + 1e-6
    step = s.grid[1] - s.grid[0]
    assert float(s.density.sum() * step) == pytest.approx(1, abs=0.02)
    ax = Figure().add_subplot()
    spectrum_panel(ax, s)
    assert ax.lines[0].get_ydata().max() == pytest.approx(s.density.max() * s.parameters)


def test_json_repeats_the_csv(demo: Result, output: Path, rows: list[dict[str, str]]) -> None:
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    flat = [row for run in found["runs"] for row in run["measurements"]]
    assert [r["sharpness"] for r in flat] == [float(r["sharpness"]) for r in rows]
    assert found["environment"]["torch"] == torch.__version__
    assert found["settings"]["steps"] == 400
    assert found["wall_seconds"] > 0
    assert found["cpu_seconds"] > 0
    assert len(found["spectrum"]["density"]) == len(found["spectrum"]["grid"])


def test_every_inequality_held_everywhere(demo: Result) -> None:
    assert {c.name for c in demo.inequalities} >= {"mls", "nmls", "lvr", "ma_ying", "normalized_mls"}
    for check in demo.inequalities:
        assert (check.violated, check.not_applicable) == (0, 0)
        assert check.checked == sum(len(r.rows) for r in demo.runs)
        assert check.looseness[0] >= 0
    bounded = [c for c in demo.claims if "ounded" in c.statement or "ound on" in c.statement]
    assert len(bounded) == len(demo.inequalities)
    assert all(c.verdict == HELD for c in bounded)


def test_summary_is_mean_and_deviation_over_seeds(demo: Result) -> None:
    table = summary_table(demo)
    column = [title for title, _ in table.headings].index("MLS")
    for setting, row in zip(demo.config.settings, table.rows, strict=True):
        values = [r.final("mls") for r in demo.runs if r.setting == setting]
        assert row[column].sort == pytest.approx(np.mean(values))
        assert row[column].text == spread(values)


def test_numbers_read_well() -> None:
    assert number(21.52) == "21.5"
    assert number(-0.7413) == "−0.741"
    assert number(2.23e-5) == "2.2e−5"
    assert number(0.0) == "0.00"
    assert number(math.nan) == "–"
    assert number(-math.inf) == "−∞"
    assert spread([21.3, 21.9, 20.7]) == "21.3 ± 0.6"
    assert spread([0.412, 0.408, 0.481]) == "0.43 ± 0.04"
    assert spread([2e-5, 4e-5]) == "(3.0 ± 1.4)e−5"
    assert spread([1.5]) == "1.50"
    assert spread([math.nan]) == "–"
