"""Groups of runs side by side in processes, with one progress bar and a clean way out."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flatkern.experiments.data import Dataset
from flatkern.experiments.errors import Cancelled, UserError
from flatkern.experiments.run_files import RunFile
from flatkern.experiments.settings import DemoConfig, Group
from flatkern.experiments.training import Run, train_group

__all__ = ["available_cores", "run_file", "train_all", "train_groups"]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_all(config: DemoConfig, data: Dataset, *, progress: bool = True) -> list[Run]:
    """Train every setting; runs come back in the order of ``config.settings``, then by seed.

    The numbers depend neither on the number of processes nor on the order in which they finish.
    """
    done = train_groups(config, config.groups, data, progress=progress)
    return [run for group in config.groups for run in done[group]]


def train_groups(
    config: DemoConfig,
    groups: Sequence[Group],
    data: Dataset,
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[Group, list[Run]]:
    """Train some groups, ``config.jobs`` at a time; with a ``folder`` each keeps its state there."""
    several = available_cores() if config.device == "cpu" else 1  # processes only share a GPU
    jobs = min(config.jobs or several, max(len(groups), 1))
    total = sum(len(group.seeds) for group in groups) * config.steps
    # the longest first, so that no core is left alone with a long one at the end
    order = sorted(groups, key=lambda g: (-g.setting.batch_size, -g.setting.learning_rate, g.seeds))
    with tqdm(
        total=total, unit="step", unit_scale=True, desc="training", disable=not progress, smoothing=0.05
    ) as bar:
        if jobs == 1:
            before = torch.get_num_threads()
            torch.set_num_threads(config.threads)
            try:
                return {g: _train(config, g, data, bar.update, folder) for g in order}
            finally:
                torch.set_num_threads(before)
        return _in_processes(config, order, data, folder, jobs, bar.update)


def run_file(folder: Path, group: Group) -> RunFile:
    """Where a group keeps its state."""
    s = group.setting
    seeds = "-".join(str(seed) for seed in group.seeds)
    return RunFile(folder, f"lr-{s.learning_rate!r}-batch-{s.batch_size}-seed-{seeds}")


def _train(
    config: DemoConfig, group: Group, data: Dataset, report: Callable[[int], Any], folder: Path | None
) -> list[Run]:
    return train_group(config, group, data, report, None if folder is None else run_file(folder, group))


def _in_processes(
    config: DemoConfig,
    order: list[Group],
    data: Dataset,
    folder: Path | None,
    jobs: int,
    report: Callable[[int], Any],
) -> dict[Group, list[Run]]:
    # spawn: a forked torch may hang in its thread pools
    context = multiprocessing.get_context("spawn")
    ticks: Any = context.Queue()
    stop = context.Event()
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start, initargs=(ticks, stop, config.threads)
    )
    try:
        with _interrupts_held():
            futures: dict[Future[list[Run]], Group] = {
                pool.submit(_work, config, g, data, folder): g for g in order
            }
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(ticks, report)
            for future in finished:
                future.result()  # an error of one group ends all
        _drain(ticks, report)
        return {group: future.result() for future, group in futures.items()}
    except BrokenProcessPool:
        raise UserError("a training process died; if memory ran out, --jobs 1 needs the least") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends; processes started inside never see it, not even while they import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drain(ticks: Any, report: Callable[[int], Any]) -> None:
    while True:
        try:
            report(ticks.get_nowait())
        except queue.Empty:
            return


_ticks: Any = None
_stop: Any = None


def _start(ticks: Any, stop: Any, threads: int) -> None:
    """In a fresh process: Ctrl-C is the parent's to answer, which sets ``stop``."""
    global _ticks, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ticks, _stop = ticks, stop
    torch.set_num_threads(threads)


def _work(config: DemoConfig, group: Group, data: Dataset, folder: Path | None) -> list[Run]:
    parent = multiprocessing.parent_process()

    def report(steps: int) -> None:
        if _stop.is_set() or (parent is not None and not parent.is_alive()):
            raise Cancelled
        _ticks.put(steps)

    return _train(config, group, data, report, folder)
