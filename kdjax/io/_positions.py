"""Positions in the data within a checkpoint, for any number of processes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath


class Positions(grain.checkpoint.CheckpointHandler):
    """Grain's handler, which keeps a file for each process.

    Another number of processes than saved them goes on from the position that all of
    those had. :func:`kdjax.io.input.batches` counts whole batches, the same in all.
    """

    def restore(
        self, directory: epath.Path, item: Any = None, args: Any = None
    ) -> grain.DatasetIterator:
        """Sets the iterator to the saved position.

        Raises:
          ValueError: there are other processes now, and those that saved had different
            positions.
        """
        index, count = jax.process_index(), jax.process_count()
        if (directory / f"process_{index}-of-{count}.json").exists():
            return super().restore(directory, item, args)
        saved = [path.read_text() for path in directory.glob("process_*.json")]
        if len(set(saved)) != 1:
            raise ValueError(
                f"batches: the checkpoint {directory.parent} was saved by {len(saved)} "
                "processes, each with its own position in the data, and now there are "
                f"{count}. Go on with {len(saved)}, or shard so that all have the "
                "same, as kdjax.io.input.batches does."
            )
        iterator = args.item if item is None else item
        iterator.set_state(json.loads(saved[0]))
        return iterator


@ocp.args.register_with_handler(Positions, for_save=True)
@dataclasses.dataclass
class SavePosition(ocp.args.CheckpointArgs):
    """Asks Orbax to save the position of an iterator."""

    item: Any


@ocp.args.register_with_handler(Positions, for_restore=True)
@dataclasses.dataclass
class RestorePosition(ocp.args.CheckpointArgs):
    """Asks Orbax to set an iterator to its saved position."""

    item: Any
