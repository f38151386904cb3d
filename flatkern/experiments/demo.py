"""The demo: train five settings, measure, analyse, and write one report with the data behind it."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from flatkern.experiments.data import load
from flatkern.experiments.errors import UserError
from flatkern.experiments.output import staged
from flatkern.experiments.parallel import train_all
from flatkern.experiments.result import Clock, Result, analyse, write_data
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.spectrum import final_spectrum

__all__ = ["run_demo"]


def run_demo(
    config: DemoConfig, *, progress: bool = True, say: Callable[[str], None] = lambda _: None
) -> Result:
    """Run a demo and write its files to ``config.output``, all of them or none.

    From a script of your own call this below ``if __name__ == "__main__":``, as the settings are trained in processes
    that import the script anew (``jobs=1`` needs no processes).
    """
    from flatkern.report import write_report

    clock = Clock()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with staged(config.output) as folder:
        data = load(
            config.data,
            root=config.root,
            num_train=config.num_train,
            num_test=config.num_test,
            seed=config.data_seed,
        )
        if config.batch_sizes[-1] > len(data.train):
            raise UserError(f"batch size {config.batch_sizes[-1]} for {len(data.train)} training images")
        runs = train_all(config, data, progress=progress)
        say("statistics and the Hessian's spectrum ...")
        trained = [run for run in runs if not run.diverged]
        shown = next(
            (run for run in trained if run.setting == config.middle), trained[0] if trained else None
        )
        spectrum = None if shown is None else final_spectrum(config, shown, data)
        result = analyse(config, data, runs, started=started, clock=clock, spectrum=spectrum)
        say("figures and report ...")
        write_data(folder, result, data)
        write_report(folder, result)
    return result
