"""Peak memory of the named traces beside that of one gradient, what ``fk.plan`` says, and a GPT-2 of 124M parameters.

``python -m benchmarks.bench_memory`` prints the tables' numbers and writes benchmarks/results/memory.json; the part
``--part language`` needs ``transformers`` and some minutes. Tensor bytes are counted below autograd; the resident set
is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from benchmarks.bench_ggn_trace import LOSS, MODELS, digits, gradient, prepared
from benchmarks.timing import RESULTS, save
from flatkern.allocation import AllocationMeter

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def calls(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Call]:
    """What is measured on the digits: function, arguments, options."""
    return {
        "sharpness": (fk.sharpness, (model, x), {"method": "exact"}),
        "ggn_trace": (fk.ggn_trace, (model, LOSS, (x, y)), {"method": "exact"}),
        "ggn_trace, one sketch": (fk.ggn_trace, (model, LOSS, (x, y)), {"method": "sketch", "samples": 1}),
        "gradient_norms": (fk.gradient_norms, (model, LOSS, (x, y)), {}),
        "hessian_trace": (fk.hessian_trace, (model, LOSS, (x, y)), {"samples": 2}),
        "geometry": (fk.geometry, (model, x), {}),
    }


def peak(function: Callable[[], object]) -> int:
    """Tensor bytes at the peak of a call."""
    with AllocationMeter() as meter:
        function()
    return meter.peak


def on_digits(samples: int) -> list[dict[str, Any]]:
    """The ways on three models."""
    x, y = digits(samples)
    rows = []
    for name in MODELS:
        model = prepared(name, x, y, 0)
        unit = peak(lambda model=model: gradient(model, x, y))
        for way, (function, arguments, options) in calls(model, x, y).items():
            planned = fk.plan(function, *arguments, **options)
            found = peak(lambda f=function, a=arguments, o=options: f(*a, **o))
            row = {
                "part": "digits",
                "model": name,
                "way": way,
                "gradient_bytes": unit,
                "bytes": found,
                "planned_bytes": planned.bytes,
                "over_gradient": found / unit,
                "planned_over_found": planned.bytes / found,
            }
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits at all positions but the last, and the tokens that follow."""
    ids = batch["input_ids"]
    return model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]


def gpt2(length: int) -> nn.Module:
    """GPT-2 in its smallest published size (124M parameters, 50,257 tokens), random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config).eval()


def _language_gradient(model: nn.Module, batch: dict[str, Tensor]) -> None:
    output, target = next_token(model, batch)
    loss = F.cross_entropy(output.flatten(0, 1), target.flatten())
    del output
    torch.autograd.grad(loss, list(model.parameters()))


LANGUAGE: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "gradient": _language_gradient,
    "gradient_norms": lambda m, b: fk.gradient_norms(
        m, fk.losses.TokenCrossEntropyLoss(), b, forward=next_token
    ),
    "ggn_trace, one sketch": lambda m, b: fk.ggn_trace(
        m, fk.losses.TokenCrossEntropyLoss(), b, forward=next_token, method="sketch", samples=1
    ),
    "sharpness, one sketch": lambda m, b: fk.sharpness(m, b, forward=next_token, method="sketch", samples=1),
    "hessian_trace, two probes": lambda m, b: fk.hessian_trace(
        m, fk.losses.TokenCrossEntropyLoss(), b, forward=next_token, samples=2
    ),
}


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def language_once(way: str, samples: int, length: int) -> dict[str, Any]:
    """One way in this process: CPU seconds, the resident set above what model and data take."""
    torch.set_num_threads(1)
    model = gpt2(length)
    batch = {
        "input_ids": torch.randint(0, 50257, (samples, length), generator=torch.Generator().manual_seed(1))
    }
    before, highest, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.process_time()
    LANGUAGE[way](model, batch)
    seconds = time.process_time() - begun
    done.set()
    watcher.join()
    return {
        "part": "language",
        "way": way,
        "samples": samples,
        "length": length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_s": seconds,
        "resident_bytes": highest - before,
    }


def language(samples: int, length: int) -> list[dict[str, Any]]:
    """Every way in a process of its own."""
    rows = []
    for way in LANGUAGE:
        command = [sys.executable, "-m", "benchmarks.bench_memory", "--once", way]
        command += ["--sequences", str(samples), "--length", str(length)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(text.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure one part or both; a part that is not measured keeps its earlier rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["digits", "language"])
    parser.add_argument("--once", choices=list(LANGUAGE))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.once:
        print(json.dumps(language_once(options.once, options.sequences, options.length)))
        return
    path = RESULTS / "memory.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() and options.part else []
    rows = [] if options.part == "language" else on_digits(options.samples)
    rows += [r for r in kept if r["part"] != options.part]
    if options.part != "digits":
        rows += language(options.sequences, options.length)
    settings = {
        "dtype": "float32",
        "data": f"{options.samples} MNIST digits; {options.sequences} sequences of {options.length} random tokens",
        "bytes": "of tensors, counted below autograd (digits); the resident set above model and data (GPT-2)",
    }
    print("written:", save("memory", settings, rows))


if __name__ == "__main__":
    main()
