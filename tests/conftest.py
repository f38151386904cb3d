"""Shared settings of the tests: few threads, fixed seeds, no CUDA tests without a GPU."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "flatkern", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("flatkern")

# a process started in the background of a shell inherits an ignored SIGINT, which the tests of Ctrl-C need to arrive
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the tests' problems are tiny: a second thread only waits for the first
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
