"""One tiny demo, run once through the Python interface."""

from dataclasses import replace
from pathlib import Path

import pytest

from flatkern.experiments.demo import run_demo
from flatkern.experiments.result import Result
from flatkern.experiments.settings import quick


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Result:
    config = replace(
        quick(),
        data="digits",
        hidden=(16, 15, 14),
        num_train=60,
        num_test=100,
        num_probe=20,
        steps=400,
        points=8,
        spectrum_samples=40,
        spectrum_probes=3,
        spectrum_steps=20,
        jobs=1,
        output=tmp_path_factory.mktemp("demo") / "out",
    )
    return run_demo(config, progress=False)


@pytest.fixture(scope="session")
def output(demo: Result) -> Path:
    return demo.config.output
