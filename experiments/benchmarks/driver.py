"""Times what the host does for a step with very many arrays, apart from the device.

    python -m experiments.benchmarks.driver

The step changes a counter and nothing else, so that a device has nothing to do. Time is
that of the thread that calls it: of kdjax.train.fit with a placed step, of the placed
step alone, and of a plain jax.jit of the same function in a bare loop. CPU devices run
such small programs in the thread that calls them, which makes it a bound from above.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from jax.sharding import NamedSharding

from experiments.benchmarks import report
from experiments.benchmarks.report import Figure, Sample
from kdjax.train import (
    DistillState,
    batch_axes,
    fit,
    make_mesh,
    make_placed,
    place_step,
)
from kdjax.types import Batch, Mean

LIMIT = 5e-3
"""Seconds of the host for a step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    arrays: int = 1000
    """Of the state, a third each parameters and Adam's two moments."""
    devices: int = 1
    """CPU devices, each with a copy of every array."""
    steps: int = 100
    """Of one run."""
    repeats: int = 5
    """Rounds, in which each side runs twice; medians are shown, with quartiles."""
    markdown: bool = False
    """Print tables for a README."""


class Same:
    """One batch again and again, without any work of its own."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._batch

    def get_state(self) -> Any:
        return {}

    def set_state(self, state: Any) -> None:
        del state


def counted(
    state: DistillState, frozen: Any, batch: Batch
) -> tuple[DistillState, dict[str, Mean]]:
    """A step without work, with the metrics of one."""
    one = jnp.ones((), jnp.int32)
    names = "hard", "soft", "loss", "grad_norm"
    metrics = {name: Mean(batch["x"].sum(), one) for name in names}
    skipped = Mean(jnp.zeros(()), one)
    return dataclasses.replace(state, step=state.step + 1), {
        **metrics,
        "skipped": skipped,
    }


def state_of(arrays: int) -> DistillState:
    """Small parameters, so many that with Adam's moments there are enough arrays."""
    layers = -(-arrays // 3)
    params: dict[str, dict[str, Array]] = {
        "student": {f"layer_{index}": jnp.ones(8) for index in range(layers)},
        "objective": {},
    }
    zero = jnp.zeros((), jnp.int32)
    opt_state = optax.adam(1e-3).init(params)
    key = jax.random.key(0)
    return DistillState(zero, zero.copy(), params, {}, {}, (), opt_state, key)


class Sides:
    """The three loops over one kind of state, each with a state of its own."""

    def __init__(self, arrays: int, steps: int, rows: int = 8):
        self._steps = steps
        mesh = make_mesh()
        batch: Any = {"x": np.ones((rows * mesh.size, 4), np.float32)}
        self._host, self._placed = batch, counted_step(arrays, mesh)
        split = NamedSharding(mesh, batch_axes(mesh))
        self._on_device = jax.device_put(batch, split)
        self._plain = jax.jit(counted, donate_argnums=0)
        self.states = {
            name: make_placed(lambda: state_of(arrays), mesh) for name in self.runs()
        }

    def runs(self) -> dict[str, Callable[[], None]]:
        return {"fit": self._fit, "placed": self._loop_placed, "jit": self._loop_plain}

    def _fit(self) -> None:
        state = self.states["fit"]
        end = int(state.step) + self._steps
        result = fit(
            self._placed,
            state,
            {},
            Same(self._host),
            steps=end,
            log_every=self._steps,
        )
        self.states["fit"] = result.state

    def _loop_placed(self) -> None:
        for _ in range(self._steps):
            state = self.states["placed"]
            self.states["placed"], _ = self._placed(state, {}, self._host)

    def _loop_plain(self) -> None:
        for _ in range(self._steps):
            self.states["jit"], _ = self._plain(self.states["jit"], {}, self._on_device)

    def samples(self, repeats: int) -> dict[str, list[Sample]]:
        """Seconds of one step; what cores do is that of the calling thread alone."""
        timed = {name: self._stopwatch(run) for name, run in self.runs().items()}
        return report.interleaved(timed, repeats)

    def _stopwatch(self, run: Callable[[], None]) -> Callable[[], Sample]:
        def timed() -> Sample:
            jax.block_until_ready(self.states)
            wall, own = time.perf_counter(), time.thread_time()
            run()
            own = time.thread_time() - own
            jax.block_until_ready(self.states)
            wall = time.perf_counter() - wall
            return Sample(wall / self._steps, own / self._steps)

        return timed


def counted_step(arrays: int, mesh: jax.sharding.Mesh) -> Any:
    state = jax.eval_shape(lambda: state_of(arrays))
    return place_step(counted, mesh, state=state, frozen={})


def figures(config: Config) -> Iterator[Figure]:
    """Time of the host for a step of each loop, beside the limit and the plain one."""
    samples = Sides(config.arrays, config.steps).samples(config.repeats)
    own = {name: np.array([s.cpu for s in taken]) for name, taken in samples.items()}
    section = f"The host, for {config.arrays} arrays on {config.devices} CPU devices"
    for name in ("fit", "placed"):
        for against, theirs, target in (
            ("limit", np.full(config.repeats, LIMIT), 1.0),
            ("jax.jit", own["jit"], None),
        ):
            low, ratio, high = np.quantile(own[name] / theirs, (0.25, 0.5, 0.75))
            yield Figure(
                section,
                name,
                "thread time",
                f"{1e3 * np.median(own[name]):.2f} ms",
                against,
                f"{1e3 * np.median(theirs):.2f} ms",
                float(ratio),
                target,
                (float(low), float(high)),
            )


def main(config: Config) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", config.devices)
    notes = [f"jax {jax.__version__}, {config.repeats} runs of {config.steps} steps"]
    report.show(figures(config), notes, markdown=config.markdown)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
