"""The records of a training: sums of metrics that arrive while the device works."""

from __future__ import annotations

import collections
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from kdjax.train.profiling import peak_flops
from kdjax.types import Batch, Mean

_logger = logging.getLogger("kdjax")

# So many steps are dispatched beyond the one whose metrics are waited for: the
# device always has work, and the host never runs far ahead of it.
_LAG = 2

# Reported by every step beside the objective's terms.
_NOT_TERMS = ("loss", "grad_norm", "skipped")


class Writer(Protocol):
    """Where metrics go; :mod:`kdjax.io.logs` has some."""

    def write(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
        """Takes a record; kinds are ``train``, ``eval`` and ``speed``."""
        ...

    def rewind(self, step: int) -> None:
        """Forgets the records after ``step``, which will be written again."""
        ...

    def flush(self) -> None:
        """Returns when the records are safe."""
        ...


class _Wait(NamedTuple):
    """For a batch: how long, and whether the device had no work left at its end."""

    seconds: float
    starved: bool


class _Pending(NamedTuple):
    """A step that may still be running."""

    n: int
    metrics: dict[str, Mean]
    examples: int
    wait: _Wait


class Records:
    """Sums up metrics without waiting for the device, and hands on the averages."""

    def __init__(
        self,
        writers: Sequence[Writer],
        progress: Mapping[str, Any],
        log_every: int,
        steps: int,
        max_skipped: int,
        flops: float | None = None,
    ):
        # A run that failed and is started again as it was has failed already.
        self._failed_after, failure = progress.get("failure", (0, None))
        self.failure: str | None = (
            failure if self._failed_after >= max_skipped else None
        )
        self._writers = writers
        self._log_every = log_every
        self._steps = steps
        self._max_skipped = max_skipped
        self._skipped_in_a_row = progress.get("skipped_in_a_row", 0)
        # By name, total and count: Python's float64 and unbounded integers.
        self._sums: dict[str, list] = progress.get("sums", {})
        self._pending: collections.deque[_Pending] = collections.deque()
        self._finished_at: float | None = None
        self._seconds: list[float] = []
        self._examples = 0
        self._flops = flops
        self._peak_flops = peak_flops()
        self._wait = _Wait(0.0, False)
        self._waits: list[_Wait] = []

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, or ``None``; notes how long it is waited for."""
        started = time.perf_counter()
        batch = next(batches, None)
        seconds = time.perf_counter() - started
        newest = self._pending[-1].metrics if self._pending else None
        starved = newest is not None and jax.tree.leaves(newest)[0].is_ready()
        self._wait = _Wait(seconds, starved)
        return batch

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs for the next record to come out the same."""
        sums = {name: list(sum_) for name, sum_ in self._sums.items()}
        failure = (
            {"failure": [self._failed_after, self.failure]} if self.failure else {}
        )
        return {"sums": sums, "skipped_in_a_row": self._skipped_in_a_row, **failure}

    def add(self, n: int, metrics: dict[str, Mean], examples: int) -> None:
        """Takes the metrics of step ``n``, which may still be running."""
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self._pending.append(_Pending(n, metrics, examples, self._wait))
        while len(self._pending) > _LAG:
            self._absorb(self._pending.popleft())

    def drain(self) -> None:
        """Waits for the steps under way and takes in their metrics."""
        while self._pending:
            self._absorb(self._pending.popleft())
        # What comes next, an evaluation say, is no part of the next step's time.
        self._finished_at = None

    def write(self, n: int, scalars: Mapping[str, float], kind: str) -> None:
        """Hands a record to all writers."""
        for writer in self._writers:
            writer.write(n, scalars, kind)

    def rewind(self, n: int) -> None:
        """Has all writers forget what came after step ``n``."""
        for writer in self._writers:
            writer.rewind(n)

    def flush(self) -> None:
        """Returns when the records of all writers are safe."""
        for writer in self._writers:
            writer.flush()

    def _absorb(self, step: _Pending) -> None:
        n = step.n
        values = jax.device_get(step.metrics)
        now = time.perf_counter()
        if self._finished_at is not None:
            self._seconds.append(now - self._finished_at)
            self._examples += step.examples
            self._waits.append(step.wait)
        self._finished_at = now
        if "skipped" in values and values["skipped"].total > 0:
            self._note_skipped(n, values)
            values = {"skipped": values["skipped"]}
        else:
            self._skipped_in_a_row = 0
        for name, mean in values.items():
            sum_ = self._sums.setdefault(name, [0.0, 0])
            sum_[0] += float(mean.total)
            sum_[1] += int(mean.count)
        if n % self._log_every == 0 or n == self._steps:
            self._record(n)

    def _note_skipped(self, n: int, values: Mapping[str, Mean]) -> None:
        culprits = [
            name
            for name, mean in values.items()
            if name not in _NOT_TERMS and not np.isfinite(mean.total)
        ]
        what = ", ".join(culprits) or "the gradient"
        self._skipped_in_a_row += 1
        _logger.warning("step %d was skipped: %s not finite", n, what)
        if self._skipped_in_a_row >= self._max_skipped and self.failure is None:
            self._failed_after = self._skipped_in_a_row
            self.failure = (
                f"step {n}: {what} not finite, in the last of "
                f"{self._skipped_in_a_row} skipped steps in a row "
                f"(max_skipped={self._max_skipped}). The parameters are those before "
                "them. Lower the learning rate, clip gradients "
                "(optax.clip_by_global_norm), or look at the inputs of what is named. "
                "To go on from its checkpoint, or over a bad stretch of data, raise "
                "max_skipped."
            )

    def _record(self, n: int) -> None:
        averages = {
            name: total / count for name, (total, count) in self._sums.items() if count
        }
        self._sums = {}
        self.write(n, averages, "train")
        if self._seconds:
            self.write(n, self._speed(), "speed")
            self._seconds, self._examples = [], 0
            self._waits = []

    def _speed(self) -> dict[str, float]:
        """What is known of the time of the steps since the last record."""
        steps, total = len(self._seconds), math.fsum(self._seconds)
        speed = {"examples_per_second": self._examples / total}
        waits = [wait.seconds for wait in self._waits]
        for name, seconds in (("step", self._seconds), ("input", waits)):
            for percent in (50, 95):
                value = 1e3 * float(np.percentile(seconds, percent))
                speed[f"{name}_ms_p{percent}"] = value
        speed["input_bound"] = sum(wait.starved for wait in self._waits) / steps
        if self._flops is not None:
            per_second = self._flops * steps / total
            speed["model_tflops_per_second"] = per_second / 1e12
            if self._peak_flops is not None:
                speed["model_flops_utilization"] = per_second / self._peak_flops
        return speed
