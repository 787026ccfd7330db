"""Networks with the arrays of a training: made, loaded, told apart."""

from __future__ import annotations

import zlib

import jax
import numpy as np
from etils.epath import Path

from kdjax import Adapted
from kdjax.io.checkpoints import Checkpoints
from kdjax.train import DistillState


def seeded_key(seed: int) -> jax.Array:
    """The key that the initial weights of a seed are drawn with."""
    # XLA's CPU compiler takes 10 s for three draws by the default generator in one
    # program, and 1 s for these (jax 0.10.2).
    return jax.random.key(seed, impl="rbg")


def trained(net: Adapted, state: DistillState) -> Adapted:
    """The network with the student's arrays of a training."""
    return net._replace(params=state.params["student"], model_state=state.model_state)


def load_teacher(folder: Path, net: Adapted, example: str) -> Adapted:
    """The teacher of an earlier run, from its newest checkpoint.

    Args:
      folder: of that training, or of its checkpoints.
      net: its network, with any arrays.
      example: a folder as it is expected, for the refusal.

    Raises:
      ValueError: there is no checkpoint, or one of other arrays.
    """
    inner = folder / "checkpoints"
    inner = inner if inner.is_dir() else folder
    # Opening a checkpoint folder makes it, and its steps are numbered folders.
    if not inner.is_dir() or not any(path.name.isdigit() for path in inner.iterdir()):
        raise ValueError(
            f"--teacher: found no checkpoint in {folder}; expected the folder of a "
            f"teacher that this job trained, such as {example}."
        )
    checkpoints = Checkpoints(inner)
    try:
        return checkpoints.load_student(net)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    finally:
        checkpoints.close()


def fingerprint(net: Adapted) -> str:
    """A text that differs where the arrays do."""
    checksum = 0
    for leaf in jax.tree.leaves((net.params, net.model_state)):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return f"weights {checksum:08x}"
