"""Checkpoints of a training, on Orbax: complete, checked, and refused by other runs.

A folder holds one numbered folder per step, and ``unreadable/`` with those that were
found damaged. In a step's folder, ``state`` has the arrays, ``data`` the position in
the data, ``progress`` what the loop keeps on the host, ``run`` the configuration and
the description of the arrays, and ``files`` a checksum of every other file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from kdjax.io._checksums import SaveChecksums, damage_of
from kdjax.io._positions import RestorePosition, SavePosition
from kdjax.train.loop import Batches
from kdjax.train.state import DistillState
from kdjax.types import Adapted, PyTree

_logger = logging.getLogger("kdjax")

_UNREADABLE = "unreadable"
_RUN_FILE = "run/metadata"


class Checkpoints:
    """Keeps the last checkpoints of a run and the best one.

    Saving copies the state and returns; files are written in the background. A
    checkpoint that is damaged, by a full disk or a lost file, is noticed when it is
    restored, moved aside into ``unreadable/``, and the one before it is taken.

    Args:
      folder: of this run alone, made if need be; may be in a bucket (``gs://...``),
        with gcsfs installed.
      keep: how many of the last checkpoints stay.
      best: the evaluation metric whose best checkpoint stays as well.
      mode: whether the best is the highest (``"max"``) or the lowest (``"min"``).
      config: the run's settings, values that JSON can hold. A checkpoint saved with
        others is refused; with ``None`` any is accepted.

    Raises:
      ValueError: ``keep`` is below 1, ``mode`` is neither of its two words, or Orbax
        cannot write to such a bucket.
      TypeError: ``config`` has a value that JSON cannot hold.
      OSError: the folder cannot be written to.

    Example:
      >>> import tempfile
      >>> from kdjax.io.input import batches
      >>> checkpoints = Checkpoints(tempfile.mkdtemp(), config={"lr": 0.1})
      >>> data = batches({"x": np.arange(4)}, batch_size=2, seed=0)
      >>> state = {"w": jnp.arange(3.0)}
      >>> checkpoints.save(1, state, data, progress={}, metrics=None)
      >>> restored, progress = checkpoints.restore(state, data)
      >>> restored["w"].tolist()
      [0.0, 1.0, 2.0]
      >>> checkpoints.close()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        best: str = "student_accuracy",
        mode: Literal["max", "min"] = "max",
        config: Mapping[str, Any] | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep: got {keep}; expected at least 1.")
        if mode not in ("max", "min"):
            raise ValueError(f"mode: got {mode!r}; expected 'max' or 'min'.")
        self._folder = _writable(folder)
        self._config = None if config is None else _as_json(config)
        self._kept = _LastAndBest(keep, best, mode)
        self._manager = _manager(self._folder, self._kept)
        for step in self.steps():
            # A damaged checkpoint is dealt with when it is to be restored.
            with contextlib.suppress(OSError, ValueError):
                run = json.loads((self._folder / str(step) / _RUN_FILE).read_text())
                self._kept.note(step, run["metrics"])

    def save(
        self,
        step: int,
        state: DistillState,
        batches: Batches,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; the state may be donated as soon as this returns.

        Waits for the save before it, if that is still being written.

        Args:
          step: number of the checkpoint, larger than those saved before.
          state: the arrays.
          batches: the Grain iterator, whose position is saved.
          progress: what else to keep, values that JSON can hold.
          metrics: of an evaluation of this state, to find the best checkpoint by.

        Raises:
          ValueError: an array has no elements, which Orbax cannot save.
        """
        scores = {name: float(value) for name, value in (metrics or {}).items()}
        arrays = _described(state)
        run = {"config": self._config or {}, "arrays": arrays, "metrics": scores}
        self._kept.note(step, scores)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=SavePosition(batches),
                progress=ocp.args.JsonSave(dict(progress)),
                run=ocp.args.JsonSave(run),
                files=SaveChecksums(),
            ),
            force=True,
        )

    def restore(
        self, state: DistillState, batches: Batches
    ) -> tuple[DistillState, dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole, onto any mesh.

        Args:
          state: the template: its structure, shapes, dtypes and shardings.
          batches: the Grain iterator, which is set to the saved position.

        Returns:
          The state, bit for bit what was saved, and the progress saved with it;
          ``None`` when there is no checkpoint, and ``batches`` is left alone.

        Raises:
          ValueError: the checkpoint is whole, but of another configuration or of
            a state with other arrays; the message lists what differs.
        """
        self._manager.wait_until_finished()
        step = self._newest_whole()
        if step is None:
            return None
        folder = self._folder / str(step)
        run = json.loads((folder / _RUN_FILE).read_text())
        if self._config is not None:
            _refuse_other("config", folder, _flat(run["config"]), _flat(self._config))
        _refuse_other("state", folder, run["arrays"], _described(state))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                data=RestorePosition(batches),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["progress"]

    def load_student(self, student: Adapted, *, step: int | None = None) -> Adapted:
        """Takes the student alone out of a checkpoint, to use it or to teach with it.

        Args:
          student: the template, from an adapter: structure, shapes, dtypes, shardings.
          step: one of :meth:`steps`, such as :meth:`best_step`; ``None`` is the newest
            that is whole.

        Returns:
          The same network with the arrays that it had then, bit for bit.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or its student has
            other arrays; the message lists what differs.
        """
        self._manager.wait_until_finished()
        given, step = step, self._newest_whole() if step is None else step
        if step not in self.steps():
            raise ValueError(
                f"step: got {step}; {self._folder} has checkpoints of {self.steps()}."
            )
        folder = self._folder / str(step)
        # The newest was looked through already.
        if given is not None and (damage := damage_of(folder)):
            raise ValueError(f"step: {folder} is unreadable ({damage}); take another.")
        run = json.loads((folder / _RUN_FILE).read_text())
        wanted = {"params": {"student": student.params}}
        wanted |= {"model_state": student.model_state}
        saved = {
            name: array
            for name, array in run["arrays"].items()
            if f"{name}/".startswith(("params/student/", "model_state/"))
        }
        _refuse_other("student", folder, saved, _described(wanted))
        arguments = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(folder / "state", args=arguments)
        return student._replace(
            params=found["params"]["student"], model_state=found["model_state"]
        )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best score, ``None`` where none has one."""
        return self._kept.best_of(self.steps())

    def wait(self) -> None:
        """Returns when everything is on disk, or raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of threads and files."""
        self._manager.close()

    def _newest_whole(self) -> int | None:
        """The newest step without damage; those after it are moved aside."""
        found = -1
        # One process decides for all, since it also moves folders.
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                damage = damage_of(self._folder / str(step))
                if damage is None:
                    found = step
                    break
                self._move_aside(step, damage)
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        self._manager.reload()
        return None if found < 0 else found

    def _move_aside(self, step: int, damage: str) -> None:
        folder = self._folder / str(step)
        (self._folder / _UNREADABLE).mkdir(exist_ok=True)
        copies = (
            self._folder / _UNREADABLE / f"{step}.{copy}" for copy in itertools.count(1)
        )
        aside = next(path for path in copies if not path.exists())
        folder.rename(aside)
        self._kept.scores.pop(step, None)
        _logger.warning(
            "the checkpoint %s is unreadable (%s); moved it to %s and going back to "
            "the one before",
            folder,
            damage,
            aside,
        )


def _manager(folder: epath.Path, kept: _LastAndBest) -> ocp.CheckpointManager:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, *kinds in (
        ("state", ocp.args.StandardSave, ocp.args.StandardRestore),
        ("data", SavePosition, RestorePosition),
        ("progress", ocp.args.JsonSave, ocp.args.JsonRestore),
        ("run", ocp.args.JsonSave, ocp.args.JsonRestore),
        # Items are finalized in this order: the checksums after all the others.
        ("files", SaveChecksums),
    ):
        for kind in kinds:
            registry.add(item, kind)
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=kept, cleanup_tmp_directories=True
        ),
        handler_registry=registry,
    )


@dataclasses.dataclass
class _LastAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the last checkpoints and the one with the best score.

    Orbax's own policy reads scores from a file whose damage would keep its manager
    from starting.
    """

    keep: int
    best: str
    mode: Literal["max", "min"]
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remembers the score of a checkpoint, if it has one."""
        score = metrics.get(self.best, math.nan)
        if math.isfinite(score):
            self.scores[step] = score if self.mode == "max" else -score

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """Whether each of the checkpoints stays; they come oldest first."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.keep :], self.best_of(steps)}
        return [step in kept for step in steps]

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The one with the best score, ``None`` where none has one."""
        scored = [step for step in steps if step in self.scores]
        return max(scored, key=self.scores.__getitem__, default=None)


def _described(state: PyTree) -> dict[str, str]:
    """Each array's dtype and shape by its path, such as ``float32[3,4]``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _flat(config: Any) -> dict[str, str]:
    """Each setting as JSON by its path, such as ``optimizer/lr``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): json.dumps(value)
        for path, value in jax.tree_util.tree_leaves_with_path(
            config, is_leaf=lambda value: value is None
        )
    }


def _refuse_other(
    what: str, folder: epath.Path, saved: Mapping[str, str], current: Mapping[str, str]
) -> None:
    differing = [
        f"{name}: checkpoint has {saved.get(name, 'nothing')}, "
        f"this run has {current.get(name, 'nothing')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise ValueError(
            f"{what}: the checkpoint {folder} is of another run:\n  "
            + "\n  ".join(differing)
            + "\nGo back to what it was saved with, or choose another folder."
        )


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it will be read back: tuples are lists then, keys strings."""
    try:
        return json.loads(json.dumps(dict(config)))
    except TypeError as error:
        raise TypeError(
            f"config: got {config!r}; expected values that JSON can hold: {error}."
        ) from error


def _writable(folder: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(folder)
    if "://" in os.fspath(folder) and not os.fspath(folder).startswith("gs://"):
        raise ValueError(
            f"folder: got {folder}; expected gs://... or a folder, since Orbax writes "
            "to no other buckets (0.12.8). Mount this one, for S3 with mountpoint-s3."
        )
    # A bucket is absolute, and absolute() would make a local path of it.
    path = path if path.is_absolute() else path.absolute()
    probe = path / f".writable.{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"folder: cannot write to {path} ({error}); expected a folder, there or "
            "to be made, that this user may write to. Move what is in its way or "
            "choose another."
        ) from error
    return path
