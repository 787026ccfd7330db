"""What makes a step fit: settings that take less memory, tried one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from kdjax.fused import LEAST_TOKENS, TOKEN_AXES
from kdjax.tools.preflight._check import Plan, Report, check


class Levers(NamedTuple):
    """Settings that change the memory of a step, and not what it computes.

    All but the teacher's dtype, which rounds its parameters.

    Attributes:
      teacher_dtype: of the teacher's parameters.
      accumulate: micro-batches that a batch is split into.
      remat: whether the student's layers are computed again in the backward pass.
      chunk_size: tokens of each chip that have logits at a time; ``None`` for kdjax'
        own choice.
    """

    teacher_dtype: str = "float32"
    accumulate: int = 1
    remat: bool = False
    chunk_size: int | None = None


class Trial(NamedTuple):
    """A step that was compiled, or whose arrays alone were too large for that.

    Attributes:
      changed: the lever that was moved last; ``""`` at the start.
      axes: of the mesh.
      levers: where all of them are.
      report: what the step takes.
    """

    changed: str
    axes: Mapping[str, int]
    levers: Levers
    report: Report


def recommend(
    planned: Callable[[Mesh, Levers], Plan],
    mesh_of: Callable[[Mapping[str, int]], Mesh],
    axes: Mapping[str, int],
    levers: Levers = Levers(),  # noqa: B008
) -> Iterator[Trial]:
    """Moves one lever after the other until the step fits.

    Those that cost least time come first, and none is moved back: the teacher in
    bfloat16; parameters split over the chips that share the batch (the axis ``data``
    becomes ``fsdp``); rematerialisation, which on TPUs may even save time where much
    is kept; accumulation, straight to the first number of micro-batches that could be
    enough; smaller chunks of tokens.

    Args:
      planned: makes the step for a mesh and levers.
      mesh_of: makes the mesh for sizes of axes: :func:`~kdjax.train.make_mesh`, or
        :func:`slice_mesh` with its first argument bound.
      axes: to start from.
      levers: to start from.

    Yields:
      Trials, as soon as each is compiled. The last one fits, or nothing does.

    Raises:
      ValueError: as :func:`check`.
    """
    trial = _tried("", planned, mesh_of, axes, levers)
    yield trial
    for move in (_bfloat16, _fsdp, _remat, _accumulation, _chunks):
        while trial.report.fits is False and (moved := move(trial)):
            name, axes, levers = moved
            trial = _tried(name, planned, mesh_of, axes, levers)
            yield trial


def _tried(
    name: str,
    planned: Callable[[Mesh, Levers], Plan],
    mesh_of: Callable[[Mapping[str, int]], Mesh],
    axes: Mapping[str, int],
    levers: Levers,
) -> Trial:
    mesh = mesh_of(axes)
    return Trial(name, axes, levers, check(planned(mesh, levers), mesh))


_Moved = tuple[str, Mapping[str, int], Levers] | None
"""The lever's name and where all are then; ``None`` where it does not go further."""


def _bfloat16(trial: Trial) -> _Moved:
    if trial.levers.teacher_dtype != "float32":
        return None
    levers = trial.levers._replace(teacher_dtype="bfloat16")
    return "teacher in bfloat16", trial.axes, levers


def _fsdp(trial: Trial) -> _Moved:
    sharing = trial.axes.get("data", 1)
    if sharing == 1:
        return None
    others = {name: size for name, size in trial.axes.items() if name != "data"}
    axes = {"fsdp": sharing * others.pop("fsdp", 1), **others}
    return f"fsdp {axes['fsdp']} ways", axes, trial.levers


def _accumulation(trial: Trial) -> _Moved:
    report, now = trial.report, trial.levers.accumulate
    inside = report.memory.get("activations", 0)
    assert report.chip is not None, "only what is known not to fit is moved"
    free = report.chip.memory - (report.peak - inside)
    of_each = report.examples // math.prod(
        trial.axes.get(name, 1) for name in TOKEN_AXES
    )
    more = [k for k in range(now + 1, of_each + 1) if of_each % k == 0]
    if free <= 0 or not more:
        return None
    enough = (k for k in more if inside * now / k <= free)
    levers = trial.levers._replace(accumulate=next(enough, more[-1]))
    return f"{levers.accumulate} micro-batches", trial.axes, levers


def _remat(trial: Trial) -> _Moved:
    if trial.levers.remat:
        return None
    return "rematerialisation", trial.axes, trial.levers._replace(remat=True)


def _chunks(trial: Trial) -> _Moved:
    size = trial.levers.chunk_size
    if size is not None and size <= LEAST_TOKENS:
        return None
    levers = trial.levers._replace(chunk_size=LEAST_TOKENS)
    return f"chunks of {LEAST_TOKENS} tokens", trial.axes, levers
