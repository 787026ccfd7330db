"""Times kdjax's losses and step beside the same work in Optax, PyTorch and plain JAX.

    python -m experiments.benchmarks.losses --torch ~/torch/bin/python

The README beside this file says what is measured and what came out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks import cores, forms, report, step, traffic
from experiments.benchmarks.cores import Vectors
from experiments.benchmarks.inputs import LOSSES, draw
from experiments.benchmarks.report import Figure, Sample
from experiments.jobs import processes
from experiments.jobs.processes import Ask

TORCH = "PyTorch, compiled"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    tokens: int = 4096
    """Rows of the logits."""
    vocabulary: int = 32000
    """Classes of each row."""
    repeats: int = 5
    """Rounds, in which each side runs twice; medians are shown, with quartiles."""
    only: Literal["losses", "traffic", "step"] | None = None
    """One of the three parts; all by default (traffic where libtpu is installed)."""
    torch: Path | None = None
    """A Python that has torch and NumPy, such as ~/torch/bin/python."""
    vectors: Vectors = "widest"
    """That XLA's programs may use: the widest of these cores, as PyTorch's compiler
    takes them, or XLA's own choice, 256 bits."""
    slice_tokens: int = 65536
    """Rows of the logits on the TPU slice, over all chips."""
    slice_vocabulary: int = 32768
    """Classes on the TPU slice."""
    markdown: bool = False
    """Prints tables for a README."""
    json: Path | None = None
    """Also writes the figures to this file."""

    def __post_init__(self) -> None:
        for name in ("tokens", "vocabulary", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected 1 or more."
                )
        # 16 chips share them evenly.
        for name in ("slice_tokens", "slice_vocabulary"):
            if getattr(self, name) < 1 or getattr(self, name) % 16:
                number = getattr(self, name)
                raise ValueError(f"{name}: got {number}, expected a multiple of 16.")
        if self.torch is not None and not self.torch.expanduser().is_file():
            raise ValueError(f"torch: {self.torch} is no file; expected a Python.")


def main(config: Config) -> list[Figure]:
    """Measures and prints; returns what was printed."""
    parts = [config.only] if config.only else ["losses", "traffic", "step"]
    figures: list[Figure] = []
    notes = [cores.described(config.vectors)]
    if "losses" in parts:
        figures += of_losses(config)
    if "traffic" in parts:
        if traffic.available():
            shape = config.slice_tokens, config.slice_vocabulary
            figures += traffic.figures(*shape)
        else:
            notes.append("traffic: skipped, libtpu is not installed (extra `tpu`).")
    if "step" in parts:
        figures += step.figures(config.repeats)
    report.show(figures, notes, markdown=config.markdown)
    if config.json is not None:
        report.save(figures, notes, config.json)
    return figures


def of_losses(config: Config) -> Iterator[Figure]:
    """Time and temporary memory of each loss with its gradient by the student."""
    shape = f"[{config.tokens}, {config.vocabulary}] float32"
    section = f"Value and gradient by the student, {shape}"
    arrays = jax.device_put(tuple(draw(config.tokens, config.vocabulary)))

    def compiled(form: forms.Loss) -> Any:
        function = forms.mean_and_gradient(form)
        return cores.compiled(function, *arrays, vectors=config.vectors)

    def timed(program: Any) -> Callable[[], Sample]:
        return report.stopwatch(functools.partial(run, program, arrays))

    ours = {name: compiled(forms.KDJAX[name]) for name in LOSSES}
    beside = functools.partial(report.beside, config.repeats, section)
    # First, since Optax' gigabytes are on their way back to the system for a while.
    if config.torch is not None:
        size = {"tokens": config.tokens, "vocabulary": config.vocabulary}
        with asked(config.torch, "torch_losses", **size) as ask:
            for name, program in ours.items():
                _agree(name, program(*arrays), Answer(*ask(name)))
                theirs = functools.partial(_time_of, ask, name)
                yield from beside(name, timed(program), {TORCH: theirs}, {TORCH: 1.0})
    for name, program in ours.items():
        optax = compiled(forms.OPTAX[name])
        sides = {"Optax": timed(optax)}
        yield from beside(name, timed(program), sides, {"Optax": 0.7})
        yield _memory(section, name, program, optax)


def run(program: Any, arrays: Any) -> Any:
    """Runs a compiled program to its end."""
    return jax.block_until_ready(program(*arrays))


def _time_of(ask: Ask, name: str) -> Sample:
    wall, cpu, *_ = ask(name)
    return Sample(wall, cpu)


def _memory(section: str, name: str, ours: Any, optax: Any) -> Figure:
    mine, theirs = (
        program.memory_analysis().temp_size_in_bytes for program in (ours, optax)
    )
    sides = f"{mine / 1e6:.1f} MB", "Optax", f"{theirs / 1e6:.1f} MB"
    return Figure(section, name, "temporaries", *sides, mine / theirs, target=0.5)


class Answer(NamedTuple):
    """One run of PyTorch's, and what came out."""

    wall: float
    cpu: float
    value: float
    largest: float


def _agree(name: str, ours: tuple[Any, Any], theirs: Answer) -> None:
    """Both sides compute the same thing, or their times say nothing."""
    value, gradient = ours
    mine = float(value), float(jnp.abs(gradient).max())
    expected = theirs.value, theirs.largest
    np.testing.assert_allclose(mine, expected, rtol=1e-4, err_msg=f"{name} in torch")


def asked(
    torch: Path, module: str, **options: object
) -> contextlib.AbstractContextManager[Ask]:
    """A process of PyTorch with as many threads as there are cores."""
    module = f"experiments.benchmarks.{module}"
    return processes.asked(torch, module, **options, threads=cores.count())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
