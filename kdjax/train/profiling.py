"""Where the time of a training goes: traces of steps, and the share of the peak."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterable

import jax

from kdjax.train.chips import chip_of
from kdjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Trace:
    """Steps that are recorded, for XProf (in TensorBoard) and Perfetto.

    Attributes:
      folder: where to; every process writes a file of its own below it.
      steps: how many, one after the other.
      skip: steps of this run before them, such as the one that waits for the compiler.
    """

    folder: str | os.PathLike[str]
    steps: int = 3
    skip: int = 5

    def __post_init__(self):
        for name, least in (("steps", 1), ("skip", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; expected at least {least}."
                )


def traced(
    numbers: Iterable[int], trace: Trace | None, wait: Callable[[], None]
) -> Generator[int, None, None]:
    """Goes through the numbers of steps, and records some of them.

    Args:
      numbers: of steps.
      trace: which are recorded; ``None`` records none.
      wait: returns when the device has done all steps so far, so that none but those
        asked for are in the trace.
    """
    if trace is None:
        yield from numbers
        return
    with contextlib.ExitStack() as recording:
        for count, n in enumerate(numbers):
            if count == trace.skip:
                wait()
                recording.enter_context(jax.profiler.trace(trace.folder))
            with jax.profiler.StepTraceAnnotation("step", step_num=n):
                yield n
            if count == trace.skip + trace.steps - 1:
                wait()
                recording.close()


def token_flops(student: PyTree, teacher: PyTree | None = None) -> int:
    """What a token costs to learn from, by the rule of thumb for decoders.

    Two floating-point operations for each parameter in a forward pass, and four in a
    backward pass: six for the student's N parameters and two for the teacher's,
    6 N + 2 M. Attention comes on top, and grows with the context; an embedding that is
    no head is counted, though nothing is multiplied with it.

    Args:
      student: its parameters, arrays or their shapes.
      teacher: likewise; ``None`` if there is none.

    Example:
      >>> token_flops({"kernel": jnp.ones((4, 3))}, {"kernel": jnp.ones((8, 3))})
      120

    Reference:
      Kaplan et al., Scaling Laws for Neural Language Models, 2020, table 1.
      arXiv:2001.08361
    """
    return 6 * _size(student) + 2 * _size(teacher)


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def peak_flops() -> float | None:
    """Of all devices together in bfloat16, per second; ``None`` if it is not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops * jax.device_count()
