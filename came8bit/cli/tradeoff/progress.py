"""Progress bars: one for the study, one for the run in progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from came8bit.cli.tradeoff.config import RunSpec
from came8bit.cli.tradeoff.optimizers import label
from came8bit.cli.tradeoff.study import Study
from came8bit.cli.tradeoff.train import Progress


class ProgressBars:
    """Shows a study on standard error: bars on a terminal, one line per finished run elsewhere."""

    def __init__(self, study: Study, shown: bool = True) -> None:
        self._study = study
        self._shown = shown
        self._bars = shown and sys.stderr.isatty()
        self._all: Any = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._all is not None:
            self._all.close()

    @contextmanager
    def watch(self, spec: RunSpec, done: int) -> Iterator[Progress]:
        """Show one run; gives the function to call after each step."""
        what = "" if spec.purpose == "final" else f"({spec.purpose}) "
        name = f"{what}{spec.task.kind} {label(spec.optimizer)} lr {spec.lr:g} seed {spec.seed}"
        if self._bars:
            from tqdm import tqdm

            if self._all is None:
                self._all = tqdm(total=self._study.planned, desc="runs", unit="run", position=0)
            with tqdm(
                total=spec.task.steps, desc=name, unit="step", position=1, leave=False
            ) as bar:

                def show(step: int, loss: float) -> None:
                    bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                    bar.update(step - bar.n)

                yield show
            self._all.update(1)
        else:
            yield lambda step, loss: None
        if self._shown:
            self._say(f"[{done + 1}/{self._study.planned}] {name}: {self._outcome()}")

    def _outcome(self) -> str:
        run = self._study.runs[-1]
        if run.status != "ok":
            return f"FAILED: {run.error}"
        if run.purpose == "memory" and run.peak_memory is not None:
            return f"peak memory {run.peak_memory / 2**20:.1f} MiB"
        return f"loss {run.loss:.4f}, {run.step_ms['p50']:.0f} ms a step, {run.seconds:.0f} s"

    def _say(self, line: str) -> None:
        if self._all is not None:
            self._all.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
