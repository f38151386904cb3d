"""What is trained, on what, how long, and how it is measured; and the three sizes a demo comes in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from flatkern.experiments.data import CLASSES
from flatkern.experiments.devices import check_name
from flatkern.experiments.errors import UserError
from flatkern.experiments.schedule import log_schedule

__all__ = ["ELSEWHERE", "DemoConfig", "Group", "Setting", "for_data", "full", "paper", "quick"]

ELSEWHERE = ("test", "misclassified")
"""Test samples, and those of them that the network of the moment gets wrong."""


@dataclass(frozen=True, order=True)
class Setting:
    """One choice of the two knobs whose effect on the minimum is looked at."""

    learning_rate: float
    batch_size: int

    @property
    def label(self) -> str:
        """Short name in tables and legends."""
        return f"lr {self.learning_rate:g}, batch {self.batch_size}"


@dataclass(frozen=True)
class Group:
    """Networks of one setting that are trained together, in one process."""

    setting: Setting
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides the numbers of a demo or a reproduction, and where they go."""

    preset: str
    learning_rates: tuple[float, float, float]
    """Three rates, at the middle batch size."""
    batch_sizes: tuple[int, int, int]
    """Three batch sizes, at the middle rate."""
    hidden: tuple[int, ...]
    num_train: int | None
    num_test: int | None
    num_probe: int
    """Training samples that the geometry is measured on, the same at every point."""
    steps: int
    points: int
    """Measurement points on the logarithmic schedule, about."""
    seeds: int
    spectrum_samples: int
    """Training samples of the loss whose Hessian's spectrum is shown."""
    spectrum_probes: int
    spectrum_steps: int
    data: str = "digits-mnist"
    root: Path | None = None
    network: str = "mlp-tanh"
    """Of :data:`flatkern.experiments.networks.NETWORKS`, or ``vit-WIDTH-DEPTH``."""
    every: int | None = None
    """Measure every so many iterations, instead of on the logarithmic schedule."""
    elsewhere: tuple[str, ...] = ()
    """Where geometry and bounds are taken besides the training samples: of :data:`ELSEWHERE`."""
    jobs: int | None = None
    """Processes at a time; default one a core, at most one a setting."""
    threads: int = 1
    """Threads of each process."""
    device: str = "cpu"
    """Where networks are trained and measured: ``cpu``, ``cuda`` or ``cuda:N``."""
    ensemble: bool | None = None
    """Whether the seeds of a setting train as one batched ensemble; default on a GPU. A step of an ensemble rounds
    otherwise than its networks do alone."""
    data_seed: int = 0
    converged: float = 1e-4
    """Training loss below which a run counts as interpolating."""
    last_phase: float = 1e-2
    """Training loss below which the last phase of learning is taken to have begun."""
    output: Path = field(default=Path("flatkern-demo"))

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is."""
        for name in ("num_probe", "steps", "points", "seeds", "threads", "jobs", "every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        check_name(self.device)
        for name in self.elsewhere:
            if name not in ELSEWHERE:
                raise UserError(f"unknown samples {name!r}; there are {', '.join(ELSEWHERE)}")

    @property
    def schedule(self) -> list[int]:
        """The iterations that are measured, ascending, the first and the last among them."""
        if self.every is None:
            return log_schedule(self.steps, self.points)
        return sorted({*range(0, self.steps + 1, self.every), self.steps})

    @property
    def batched(self) -> bool:
        """Whether seeds train as one ensemble, whatever the network."""
        return self.device != "cpu" if self.ensemble is None else self.ensemble

    @property
    def groups(self) -> tuple[Group, ...]:
        """What is trained together: all seeds of a setting."""
        return tuple(Group(setting, tuple(range(self.seeds))) for setting in self.settings)

    @property
    def sections(self) -> tuple[str, ...]:
        """What the report shows."""
        return ("rate", "batch", "bounds", "scatter", "correlations")

    @property
    def scale(self) -> str:
        """What every figure says of how far the iterations were cut down; empty where they were not."""
        return ""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The five settings; the middle one belongs to both sweeps."""
        return tuple(dict.fromkeys((*self.rate_sweep, *self.batch_sweep)))

    @property
    def rate_sweep(self) -> tuple[Setting, ...]:
        """Three learning rates at the middle batch size."""
        return tuple(Setting(rate, self.batch_sizes[1]) for rate in self.learning_rates)

    @property
    def batch_sweep(self) -> tuple[Setting, ...]:
        """Three batch sizes at the middle learning rate."""
        return tuple(Setting(self.learning_rates[1], batch) for batch in self.batch_sizes)

    @property
    def middle(self) -> Setting:
        """The setting both sweeps share."""
        return Setting(self.learning_rates[1], self.batch_sizes[1])

    def sizes(self, pixels: int) -> tuple[int, ...]:
        """Layer sizes of the network for images of so many pixels."""
        return (pixels, *self.hidden, CLASSES)


def full() -> DemoConfig:
    """500 digits and width 100: reaches the last phase of learning, where the paper's claim lives, in minutes."""
    return DemoConfig(
        preset="full",
        learning_rates=(0.5, 1.0, 2.0),
        batch_sizes=(8, 20, 32),
        hidden=(100, 100, 100),
        num_train=500,
        num_test=2000,
        num_probe=200,
        steps=45_000,
        points=45,
        seeds=3,
        spectrum_samples=500,
        spectrum_probes=8,
        spectrum_steps=80,
    )


def quick() -> DemoConfig:
    """The same in seconds: fewer digits (so that they are fitted sooner), a narrower network, two seeds."""
    return DemoConfig(
        preset="quick",
        learning_rates=(0.5, 1.0, 2.0),
        batch_sizes=(8, 20, 32),
        hidden=(60, 60, 60),
        num_train=100,
        num_test=1000,
        num_probe=50,
        steps=4_000,
        points=25,
        seeds=2,
        spectrum_samples=100,
        spectrum_probes=6,
        spectrum_steps=50,
    )


def paper() -> DemoConfig:
    """The network, rates and batch sizes of the paper, on all images there are. Hours."""
    return DemoConfig(
        preset="paper",
        learning_rates=(0.05, 0.1, 0.2),
        batch_sizes=(8, 20, 32),
        hidden=(500, 500, 500),
        num_train=None,
        num_test=None,
        num_probe=200,
        steps=750_000,
        points=80,
        seeds=2,
        spectrum_samples=1000,
        spectrum_probes=8,
        spectrum_steps=60,
    )


def for_data(config: DemoConfig, name: str) -> DemoConfig:
    """A preset with the rates and iterations that reach the last phase of learning on other images.

    Fashion-MNIST has brighter images, on which a rate of 2 diverges. The 8×8 digits have a twelfth of the pixels: a
    step moves the outputs less and costs less. The paper's preset stays as it is.
    """
    config = replace(config, data=name)
    if (config.preset, name) not in _OTHER_IMAGES:
        return config
    rates, steps = _OTHER_IMAGES[config.preset, name]
    # the 8×8 digits are 1,797 in all
    num_test = min(config.num_test or 1000, 1000) if name == "digits" else config.num_test
    return replace(config, learning_rates=rates, steps=steps, num_test=num_test)


_OTHER_IMAGES: dict[tuple[str, str], tuple[tuple[float, float, float], int]] = {
    ("full", "fashion-mnist"): ((0.5, 1.0, 1.5), 50_000),
    ("quick", "fashion-mnist"): ((0.5, 1.0, 1.5), 6_000),
    ("full", "digits"): ((0.75, 1.5, 3.0), 225_000),
    ("quick", "digits"): ((0.75, 1.5, 3.0), 40_000),
}
