"""``flatkern reproduce``: the paper's experiments, at its size or scaled down, on one machine or several."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flatkern.experiments.data import Dataset, load
from flatkern.experiments.devices import resolve
from flatkern.experiments.errors import UserError
from flatkern.experiments.networks import build_network, takes_vectors
from flatkern.experiments.output import staged
from flatkern.experiments.parallel import run_file, train_groups
from flatkern.experiments.pretrained import model_files
from flatkern.experiments.ranks import Ranks, await_files
from flatkern.experiments.result import Clock, Result, analyse, write_data
from flatkern.experiments.settings import ELSEWHERE, DemoConfig, Group, Setting, paper
from flatkern.experiments.training import Run
from flatkern.experiments.transformers import VITS, Transformers, measure_pretrained, measure_trained

__all__ = ["EXPERIMENTS", "ReproduceConfig", "reproduction", "run_reproduce"]

_SECTIONS: dict[str, tuple[str, ...]] = {
    "fig1": ("rate",),
    "fig2": ("batch",),
    "test-samples": ("elsewhere",),
    "bounds": ("bounds",),
    "correlations": ("scatter", "correlations", "pairs"),
    "transformers": ("transformers",),
}
EXPERIMENTS = (*_SECTIONS, "all")
_FORMAT = 1
"""Of the files with the state of a run; another number makes older ones be left alone."""


@dataclass(frozen=True)
class ReproduceConfig(DemoConfig):
    """What is trained and shown; make one with :func:`reproduction`."""

    experiments: tuple[str, ...] = ("all",)
    full_steps: int = 750_000
    """The paper's iterations, of which ``steps`` are done."""
    weights: Path | None = None
    """Folder of pretrained transformers, instead of small ones that are trained."""

    @property
    def sections(self) -> tuple[str, ...]:
        """What the report shows, in the order of :data:`EXPERIMENTS`."""
        asked = {*self.experiments}
        return tuple(s for name, found in _SECTIONS.items() if asked & {name, "all"} for s in found)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those that the experiments compare."""
        few = {
            "fig1": self.rate_sweep,
            "fig2": self.batch_sweep,
            "bounds": (self.middle,),
            "transformers": (),
        }
        every = (*self.rate_sweep, *self.batch_sweep)
        return tuple(dict.fromkeys(s for name in self.experiments for s in few.get(name, every)))

    @property
    def groups(self) -> tuple[Group, ...]:
        """One network each, so that they spread over processes and machines; all seeds of a setting as an ensemble."""
        if self.batched:
            return DemoConfig.groups.fget(self)  # type: ignore[attr-defined, no-any-return]
        return tuple(Group(setting, (seed,)) for setting in self.settings for seed in range(self.seeds))

    @property
    def scale(self) -> str:
        """How far the iterations were cut down."""
        if self.steps == self.full_steps:
            return ""
        share = 100 * self.steps / self.full_steps
        return f"{self.steps:,} iterations: {share:.2g} % of the paper's {self.full_steps:,}"

    @property
    def runs_folder(self) -> Path:
        """Where the state of the runs is kept; another one for whatever changes their numbers."""
        names = ("data", "root", "network", "hidden", "num_train", "num_test", "num_probe", "data_seed")
        held = {name: getattr(self, name) for name in (*names, "steps", "points", "every", "elsewhere")}
        if self.device != "cpu" or self.batched:  # both round otherwise
            held |= {"device": self.device.partition(":")[0], "ensemble": self.batched}
        text = json.dumps(held | {"format": _FORMAT}, sort_keys=True, default=str)
        return self.output / "runs" / f"{self.network}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def reproduction(
    *experiments: str,
    data: str = "digits-mnist",
    network: str | None = None,
    budget: float = 1.0,
    **changes: Any,
) -> ReproduceConfig:
    """The paper's settings for some of :data:`EXPERIMENTS`.

    Args:
        *experiments: what to run; they share the runs that they have in common.
        data: of :data:`flatkern.experiments.data.DATA_NAMES`.
        network: default the paper's for the images: VGG-10 for CIFAR-10, else the tanh MLP.
        budget: share of the paper's iterations, above 0 and at most 1.
        **changes: other fields of :class:`ReproduceConfig`.

    Raises:
        UserError: no experiment, an unknown one, or a budget that is none.
    """
    if unknown := [name for name in experiments if name not in EXPERIMENTS]:
        raise UserError(f"unknown experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    if not experiments:
        raise UserError(f"experiments: none was named; there are {', '.join(EXPERIMENTS)}")
    if not (math.isfinite(budget) and 0 < budget <= 1):
        raise UserError(f"--budget must be above 0 and at most 1, got {budget:g}")
    if network is not None and set(experiments) == {"transformers"}:
        raise UserError(
            "--network has no effect on transformers, which trains small ViTs of its own; leave it out"
        )
    if changes.get("weights") is not None and not {"transformers", "all"} & {*experiments}:
        raise UserError(
            "--weights has an effect on transformers (or all) alone; name that too, or leave it out"
        )
    base = paper()
    fields: dict[str, Any] = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    fields |= {
        "preset": "reproduce",
        "experiments": experiments,
        "data": data,
        "network": network or ("vgg10" if data.startswith("cifar") else "mlp-tanh"),
        "full_steps": base.steps,
        "steps": max(1, round(base.steps * budget)),
        "elsewhere": ELSEWHERE if {"test-samples", "all"} & {*experiments} else (),
        "output": Path("flatkern-reproduce"),
    }
    return ReproduceConfig(**(fields | changes))


def run_reproduce(
    config: ReproduceConfig, *, progress: bool = True, say: Callable[[str], None] = lambda _: None
) -> Result | None:
    """Train what is not trained yet, then write the report and the files beside it to ``config.output``.

    A process that was stopped or killed goes on where it was when called again with the same config; every run keeps
    its state in ``config.runs_folder``. Under ``torchrun`` each process trains its share, the first one waits for the
    others' files and writes the report, and the others return ``None``. From a script of your own call this below
    ``if __name__ == "__main__":``.

    Raises:
        UserError: data, network or output cannot be used.
    """
    from flatkern.report import write_report

    clock, ranks = Clock(), Ranks.here()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = load(
        config.data,
        root=config.root,
        num_train=config.num_train,
        num_test=config.num_test,
        seed=config.data_seed,
    )
    jobs = _jobs(config)
    for job in jobs:
        _check(job, data)
    resolve(config.device)
    if config.weights is not None:
        model_files(config.weights)  # told of before the work
    _make(config.output, [job.runs_folder for job in jobs])
    if not ranks.rank:
        with staged(config.output):  # a place that cannot take the report is told of before the work
            pass
    for job in jobs:
        _train(job, data, ranks, progress=progress and ranks.rank == 0, say=say)
    if ranks.rank:
        return None
    if ranks.world > 1:
        say("waiting for the other processes ...")
        await_files([run_file(j.runs_folder, g).path for j in jobs for g in j.groups], _finished)
    runs = {job.network: _collect(job, data) for job in jobs}
    say("statistics ...")
    with staged(config.output) as folder:
        transformers = _transformers(config, runs, data, say)
        result = analyse(
            config,
            data,
            runs[config.network] if config.settings else [],
            started=started,
            clock=clock,
            transformers=transformers,
        )
        say("figures and report ...")
        write_data(folder, result, data)
        write_report(folder, result)
    return result


def _jobs(config: ReproduceConfig) -> list[ReproduceConfig]:
    """One a network."""
    found = [config] if config.settings else []
    if "transformers" in config.sections and config.weights is None:
        vit = replace(config, experiments=("fig1",), elsewhere=(), points=min(config.points, 10), every=None)
        found += [replace(vit, network=name) for name in VITS if name != config.network]
    return found


def _check(config: ReproduceConfig, data: Dataset) -> None:
    with torch.device("meta"):  # draws no random number
        build_network(config.network, data.shape, config.hidden)
    if (largest := max(s.batch_size for s in config.settings)) > len(data.train):
        raise UserError(f"batch size {largest} for {len(data.train)} training images")


def _shaped(config: ReproduceConfig, data: Dataset) -> Dataset:
    return data if takes_vectors(config.network) else data.as_images()


def _make(output: Path, folders: Sequence[Path]) -> None:
    try:
        for folder in (output, *folders):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written to: {error.strerror or error}") from None


def _train(
    config: ReproduceConfig, data: Dataset, ranks: Ranks, *, progress: bool, say: Callable[[str], None]
) -> None:
    share = ranks.share(config.groups)
    left = [g for g in share if not _finished(run_file(config.runs_folder, g).path)]
    if len(left) < len(share):
        say(f"{config.network}: {len(share) - len(left)} of {len(share)} runs were finished before")
    if left:
        if progress:
            say(f"{config.network}: training {len(left)} networks ...")
        train_groups(config, left, _shaped(config, data), folder=config.runs_folder, progress=progress)


def _finished(path: Path) -> bool:
    from flatkern.experiments.run_files import RunFile

    held = RunFile(path.parent, path.stem).load()
    return held is not None and bool(held["done"])


def _collect(config: ReproduceConfig, data: Dataset) -> list[Run]:
    """All runs, from their files."""
    done = train_groups(
        replace(config, jobs=1),
        config.groups,
        _shaped(config, data),
        folder=config.runs_folder,
        progress=False,
    )
    return [run for group in config.groups for run in done[group]]


def _transformers(
    config: ReproduceConfig, runs: dict[str, list[Run]], data: Dataset, say: Callable[[str], None]
) -> Transformers | None:
    if "transformers" not in config.sections:
        return None
    if config.weights is not None:
        return measure_pretrained(config.weights, config, data.as_images(), say)
    say("measuring the transformers ...")
    return measure_trained({n: runs[n] for n in VITS if n in runs}, config, data.as_images())
