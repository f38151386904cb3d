"""The reproduction from end to end at a tiny size: what it writes, what it reuses, and its shares over processes."""

import csv
import json
import math
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flatkern.cli import main
from flatkern.experiments import reproduce as module
from flatkern.experiments.abstract import summarize
from flatkern.experiments.claims import HELD, UNDECIDED, VOLUME, Claim, check_inequalities, judge
from flatkern.experiments.correlation import correlation_star, pearson
from flatkern.experiments.errors import UserError
from flatkern.experiments.ranks import Ranks, await_files
from flatkern.experiments.reproduce import EXPERIMENTS, ReproduceConfig, reproduction, run_reproduce
from flatkern.experiments.result import Result
from flatkern.experiments.settings import Setting
from flatkern.experiments.trajectories import last_phase, trajectories
from tests.experiments.killed import TINY

NO_NETWORK = re.compile(r"""(?:src|href)=["'](?!#|https://arxiv\.org)""")


def tiny(experiment: str, output: Path, **changes: object) -> ReproduceConfig:
    return reproduction(experiment, **(TINY | {"steps": 40, "output": output} | changes))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Everything but the transformers, two seeds."""
    output = tmp_path_factory.mktemp("reproduce") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "VITS", ("vit-8-1",))
        config = tiny("all", output, seeds=2, learning_rates=(0.5, 1.0, 1.5), last_phase=1.0)
        found = run_reproduce(config, progress=False)
    assert found is not None
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_settings_are_the_papers() -> None:
    config = reproduction("all")
    assert config.settings == (
        Setting(0.05, 20),
        Setting(0.1, 20),
        Setting(0.2, 20),
        Setting(0.1, 8),
        Setting(0.1, 32),
    )
    assert (config.steps, config.hidden, config.network, config.scale) == (
        750_000,
        (500, 500, 500),
        "mlp-tanh",
        "",
    )
    assert reproduction("fig1").settings == config.rate_sweep
    assert reproduction("fig2").settings == config.batch_sweep
    assert reproduction("bounds").settings == (config.middle,)
    assert reproduction("transformers").settings == ()
    both = reproduction("fig2", "fig1")
    assert set(both.settings) == set(config.settings)
    assert both.sections == ("rate", "batch")
    assert both.elsewhere == ()
    assert reproduction("bounds", "transformers").settings == (config.middle,)
    assert reproduction("fig1", "test-samples").settings == config.settings
    assert reproduction("fig1", "test-samples").elsewhere == ("test", "misclassified")
    assert reproduction("fig1", data="cifar-2").network == "vgg10"
    small = reproduction("fig1", budget=0.01)
    assert small.steps == 7500
    assert small.scale == "7,500 iterations: 1 % of the paper's 750,000"
    assert reproduction("fig1", every=200, budget=0.001).schedule == [0, 200, 400, 600, 750]


@pytest.mark.parametrize(
    ("experiments", "arguments", "what"),
    [
        ((), {}, "experiments: none was named"),
        (("fig1", "fig3"), {}, "unknown experiment 'fig3'"),
        (("fig1",), {"budget": 0.0}, "--budget"),
        (("fig1",), {"budget": math.nan}, "--budget"),
        (("fig1",), {"seeds": 0}, "seeds must be at least 1"),
        (("fig1",), {"every": 0}, "every must be at least 1"),
        (("fig1",), {"elsewhere": ("train",)}, "unknown samples 'train'"),
        (("transformers",), {"network": "lenet"}, "--network has no effect on transformers"),
        (("fig1",), {"weights": Path("w")}, "--weights has an effect on transformers"),
    ],
)
def test_nonsense_is_refused(experiments: tuple, arguments: dict, what: str) -> None:
    with pytest.raises(UserError, match=what):
        reproduction(*experiments, **arguments)


def test_weights_are_looked_for_before_anything_is_trained(tmp_path: Path) -> None:
    config = reproduction(
        "fig1", "transformers", data="digits", budget=1e-5, weights=tmp_path / "none", output=tmp_path / "out"
    )
    with pytest.raises(UserError, match="none is not a folder"):
        run_reproduce(config, progress=False)
    assert not (tmp_path / "out").exists()


def test_orderings_say_whether_seeds_overlap_whatever_their_direction() -> None:
    from flatkern.experiments.claims import _ordering
    from flatkern.experiments.settings import Setting
    from flatkern.experiments.training import Run

    sweep = [Setting(rate, 20) for rate in (0.2, 0.1, 0.05)]

    def detail(*values: tuple[float, ...]) -> str:
        runs = [
            Run(setting, seed, [{"sqrt_sharpness": value}], {}, 0.0, 0.0)
            for setting, ours in zip(sweep, values, strict=True)
            for seed, value in enumerate(ours)
        ]
        return _ordering("sqrt_sharpness", "a higher learning rate gives a lower", sweep, runs).detail

    assert detail((1.0, 1.1), (2.0, 2.1), (3.0, 3.1)).endswith("; no overlap of seeds")
    assert detail((1.0, 2.2), (2.0, 2.1), (3.0, 3.1)).endswith("; seeds of neighbouring settings overlap")
    assert detail((3.0, 3.1), (2.0, 2.1), (1.0, 1.1)).endswith("; the other way round, no overlap of seeds")
    assert detail((3.0,), (2.0,), (1.0,)).endswith("; the other way round, one seed a setting")


def test_every_file_is_there_and_states_the_scale(result: Result) -> None:
    output = result.config.output
    figures = {
        "six-panels-learning-rate",
        "six-panels-batch-size",
        "six-panels-test-learning-rate",
        "six-panels-test-batch-size",
        "six-panels-misclassified-learning-rate",
        "six-panels-misclassified-batch-size",
        "flatness-and-volume",
        "pairs",
        "bounds",
        "transformers",
    }
    assert {p.stem for p in output.glob("*.png")} == {p.stem for p in output.glob("*.svg")} == figures
    scale = "40 iterations: 0.0053 % of the paper"
    for path in output.glob("*.svg"):
        assert scale in path.read_text(encoding="utf-8"), path
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 6 * 6 + 4 + 2 * 5 + 1 + 1
    assert page.count(scale) == page.count("<svg") + 2  # the head, and how it was made
    assert not NO_NETWORK.search(page)
    assert "prefers-color-scheme: dark" in page
    for section in ("claims", "rate", "batch", "on-test", "on-misclassified", "bounds", "correlations"):
        assert f'<section id="{section}">' in page
    for claim in result.claims:
        assert claim.detail.split(";")[0] in page.replace("&#39;", "'").replace("&gt;", ">").replace(
            "&lt;", "<"
        )


def test_the_table_is_tidy(result: Result) -> None:
    rows = rows_of(result.config.output / "measurements.csv")
    points = len(result.config.schedule)
    assert Counter(row["samples"] for row in rows) == {
        "train": 10 * points,
        "test": 10 * points,
        "misclassified": 10 * points,
    }
    keys = Counter((r["learning_rate"], r["batch_size"], r["seed"], r["step"], r["samples"]) for r in rows)
    assert set(keys.values()) == {1}
    saved = json.loads((result.config.output / "results.json").read_text(encoding="utf-8"))
    assert len(saved["runs"]) == 10
    assert saved["scale"] == result.config.scale


def test_measurements_elsewhere_are_of_those_samples(result: Result) -> None:
    import flatkern as fk
    from flatkern.experiments.data import load
    from flatkern.experiments.networks import network_from

    data = load("digits", num_train=60, num_test=40)
    run = result.runs[3]
    model = network_from("mlp-tanh", data.shape, result.config.hidden, run.weights)
    wrong = (model(data.test.x).argmax(1) != data.test.labels).nonzero()[:8, 0]
    for where, x in (("test", data.test.x[:8]), ("misclassified", data.test.x[wrong])):
        row = run.on(where).rows[-1]
        assert row["count"] == len(x)
        assert row["mls"] == pytest.approx(fk.max_sensitivity(model, x).mean, rel=1e-5)
        assert row["sharpness"] == pytest.approx(fk.sharpness(model, x).value, rel=1e-5)
    assert run.rows[-1]["mls"] == pytest.approx(fk.max_sensitivity(model, data.train.x[:8]).mean, rel=1e-5)


def test_inequalities_are_counted_by_decade(result: Result) -> None:
    points = len(result.config.schedule)
    for check in result.inequalities:
        assert (check.checked, check.violated) == (10 * points, 0)
        assert sum(check.decades.values()) == check.checked
        low, _, high = check.looseness
        assert math.floor(low) == min(check.decades)
        assert math.floor(high) == max(check.decades)
    assert {c.samples for c in result.inequalities} == {"training", "test", "misclassified"}
    # one false row is found, on the samples it belongs to
    run = result.runs[0]
    bad = {k: [dict(r) for r in rows] for k, rows in run.elsewhere.items()}
    bad["test"][2]["status_nmls"] = "violated"
    checks = check_inequalities([replace(run, elsewhere=bad)])
    assert [(c.name, c.samples) for c in checks if c.violated] == [("nmls", "test")]
    rows = rows_of(result.config.output / "inequalities.csv")
    assert len(rows) == len(result.inequalities)


def test_trajectories_are_correlations_over_the_last_phase(result: Result) -> None:
    run = result.runs[1]
    losses = run.column("train_loss")
    threshold = losses[1] * 1.0001
    start = last_phase(run, threshold)
    assert losses[start] < threshold <= min([math.inf, *losses[:start]])
    found = next(t for t in trajectories([run], threshold) if t.key == "mls")
    a, b = (np.array(run.column(k)[start:]) for k in ("sqrt_sharpness", "mls"))
    assert found.coefficients == [pytest.approx(float(pearson(a, b)))]
    assert math.isnan(found.low)
    assert trajectories([run], 0.0)[0].coefficients == []
    many = trajectories(result.runs, 1.0)
    assert all(len(t.coefficients) == 10 and t.low <= t.mean <= t.high for t in many)


def test_claims_follow_the_trajectories(result: Result) -> None:
    config, (volume, *_) = result.config, result.trajectories
    for low, high, verdict in ((0.2, 0.9, HELD), (-0.2, 0.9, UNDECIDED), (-0.9, -0.2, "did not hold")):
        claims = judge(config, result.runs, [], [replace(volume, low=low, high=high)])
        (claim,) = [c for c in claims if "Over the checkpoints" in c.statement]
        assert claim.verdict == verdict
    dimension = next(t for t in result.trajectories if t.key == "local_dimensionality")
    for low, verdict in ((0.2, "did not hold"), (-0.2, UNDECIDED)):
        claims = judge(config, result.runs, [], [replace(dimension, low=low, high=0.9)])
        (claim,) = [c for c in claims if "Over the checkpoints" in c.statement]
        assert claim.verdict == verdict
    statements = [c.statement for c in result.claims]
    for where in ("test", "misclassified"):
        assert sum(s.startswith(f"On {where} samples: across runs") for s in statements) == 4
    assert statements[-1].startswith("Across transformers")


def test_the_abstracts_claims_hold_only_if_all_of_their_statements_do() -> None:
    def verdict(*verdicts: str) -> str:
        claims = [Claim(f"statement {i}", v, f"number {i}", VOLUME) for i, v in enumerate(verdicts)]
        (found,) = summarize([*claims, Claim("another", "did not hold", "", "")])
        assert found.detail.startswith(f"of {len(verdicts)} statements")
        assert f"statement {verdicts.index(found.verdict)}: number" in found.detail
        return found.verdict

    assert verdict(HELD, HELD) == HELD
    assert verdict(HELD, UNDECIDED, HELD) == UNDECIDED
    assert verdict(HELD, UNDECIDED, "did not hold") == "did not hold"


def test_the_report_answers_every_claim_of_the_abstract(result: Result) -> None:
    page = (result.config.output / "report.html").read_text(encoding="utf-8")
    found = summarize(result.claims)
    assert len(found) == 6
    for claim in found:
        assert claim.statement in page
    bounds = {c.topic: c.verdict for c in found}
    assert bounds["volume bound"] == bounds["sensitivity bound"] == HELD


def test_links_elsewhere_hold_sharpness_of_the_training_samples(result: Result) -> None:
    root = [run.final("sqrt_sharpness") for run in result.runs]
    for where, links in result.elsewhere.items():
        assert len(links) == 4
        for c in links:
            other = [float(run.elsewhere[where][-1][c.second]) for run in result.runs]
            assert c.pearson.value == pytest.approx(float(pearson(np.array(root), np.array(other))))
            assert c.pearson.p_holm >= c.pearson.p_value


def test_correlation_star_corrects_over_its_own_pairs() -> None:
    generator = np.random.default_rng(0)
    x, y, z = (generator.normal(size=12) for _ in range(3))
    one = correlation_star(("x", x), {"y": y})[0]
    two = correlation_star(("x", x), {"y": y, "z": z})
    assert one.pearson.p_holm == one.pearson.p_value
    assert [(c.first, c.second) for c in two] == [("x", "y"), ("x", "z")]
    smallest = min(two, key=lambda c: c.pearson.p_value)
    assert smallest.pearson.p_holm == pytest.approx(min(1.0, 2 * smallest.pearson.p_value))


def test_transformers_are_measured_on_their_final_weights(result: Result) -> None:
    found = result.transformers
    assert found is not None
    assert len(found.rows) + found.diverged == 3 * 2
    x = np.log10([float(r["adaptive_sharpness"]) for r in found.rows])
    y = np.log10([float(r["normalized_mls"]) for r in found.rows])
    assert found.pearson.value == pytest.approx(float(pearson(x, y)))
    assert len(rows_of(result.config.output / "transformers.csv")) == len(found.rows)


def test_finished_runs_are_reused_and_other_settings_keep_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("fig1", tmp_path / "out")
    state = torch.get_rng_state()
    first = run_reproduce(config, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None
    files = {p: p.stat().st_mtime_ns for p in config.runs_folder.iterdir()}
    assert len(files) == 3
    (config.runs_folder / "lr-0.2-batch-20-seed-0.pt").unlink()
    said: list[str] = []
    again = run_reproduce(config, progress=False, say=said.append)
    assert again is not None
    assert "mlp-tanh: 2 of 3 runs were finished before" in said
    unchanged = [p for p, at in files.items() if p.stat().st_mtime_ns == at]
    assert len(unchanged) == 2
    for a, b in zip(first.runs, again.runs, strict=True):
        assert a.column("step") == b.column("step")
        assert a.column("mls") == pytest.approx(b.column("mls"), rel=1e-5)
    # the middle setting serves the other sweep, too; other iterations, widths or images do not mix with it
    assert tiny("fig2", tmp_path / "out").runs_folder == config.runs_folder
    for change in ({"steps": 41}, {"hidden": (12, 12)}, {"num_train": 59}, {"network": "mlp-relu"}):
        assert tiny("fig1", tmp_path / "out", **change).runs_folder != config.runs_folder


def test_ranks_share_the_runs_and_the_first_gathers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run_reproduce(tiny("fig1", tmp_path / "alone"), progress=False)
    config = tiny("fig1", tmp_path / "shared")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_reproduce(config, progress=False) is None
    assert len(list(config.runs_folder.iterdir())) == 1  # of three
    assert not (config.output / "report.html").exists()
    monkeypatch.setenv("RANK", "0")
    result = run_reproduce(config, progress=False)
    assert alone is not None
    assert result is not None
    assert (config.output / "report.html").exists()
    for a, b in zip(alone.runs, result.runs, strict=True):
        assert a.name == b.name
        assert a.column("mls") == pytest.approx(b.column("mls"), rel=1e-5)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK 2"):
        run_reproduce(config, progress=False)


def test_shares_are_disjoint_and_complete() -> None:
    items = list(range(11))
    for world in (1, 2, 5, 20):
        shares = [Ranks(rank, world).share(items) for rank in range(world)]
        assert sorted(i for share in shares for i in share) == items


def test_waiting_ends_when_all_are_ready_or_nothing_moves(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]

    def write() -> None:
        for path in paths:
            for text in ("half", "done"):
                time.sleep(0.03)
                path.write_text(text)

    writer = threading.Thread(target=write)
    writer.start()
    await_files(paths, lambda p: p.read_text() == "done", patience=20, interval=0.005)
    writer.join()
    with pytest.raises(UserError, match="nothing has changed"):
        await_files([tmp_path / "c"], lambda _: True, patience=0.02, interval=0.005)


@pytest.mark.parametrize("network", ["mlp-relu", "vgg10"])
def test_other_networks_run(network: str, tmp_path: Path) -> None:
    result = run_reproduce(tiny("bounds", tmp_path / "out", network=network, steps=4), progress=False)
    assert result is not None
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert result.sizes == ((64, 10) if network == "vgg10" else (64, 12, 11, 10))
    for check in result.inequalities:
        assert check.violated == 0
        if network == "vgg10":  # shared weights: what goes position by position holds, and what asks nothing
            holds = check.name == "pointwise_dv" or check.name.endswith("per_position")
            assert check.not_applicable == (0 if holds else len(result.config.schedule))
    assert ("vgg10" if network == "vgg10" else "ReLU MLP 64-12-11-10") in page


def test_the_command_line_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = [
        "reproduce",
        "bounds",
        "--data",
        "digits",
        "--budget",
        "4e-6",
        "--train",
        "40",
        "--seeds",
        "1",
    ]
    arguments += ["--probe", "4", "--every", "2", "--jobs", "1", "--network", "vit-8-1"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "Scaled down: 3 iterations" in capsys.readouterr().out
    assert [r["step"] for r in rows_of(output / "measurements.csv")] == ["0", "2", "3"]
    for wrong, what in (
        (["--network", "resnet"], "unknown network"),
        (["--train", "10"], "batch size 20 for 10"),
        (["--data", "cifar-10"], "--root"),
    ):
        assert main([*arguments, "--output", str(output), *wrong]) == 2
        assert what in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*arguments, "--output", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    for bad in (["reproduce"], ["reproduce", "fig9"], ["reproduce", "fig1", "--budget", "2"]):
        with pytest.raises(SystemExit):
            main(bad)
    from flatkern import cli

    assert cli._EXPERIMENTS == EXPERIMENTS
