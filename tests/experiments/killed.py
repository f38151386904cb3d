"""Trains in a process that a test kills; every tick is saved."""

import sys
from pathlib import Path

from flatkern.experiments.data import load
from flatkern.experiments.parallel import run_file
from flatkern.experiments.reproduce import reproduction
from flatkern.experiments.training import train_group

TINY = {
    "data": "digits",
    "hidden": (12, 11),
    "num_train": 60,
    "num_test": 40,
    "num_probe": 8,
    "points": 6,
    "seeds": 1,
    "jobs": 1,
}

if __name__ == "__main__":
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    config = reproduction("test-samples", **TINY, steps=steps)
    data = load("digits", num_train=60, num_test=40)
    train_group(config, config.groups[0], data, file=run_file(folder, config.groups[0]), save_every=0.0)
