"""A small distillation that can be killed at any moment; see test_resume.py.

Usage: python resume_run.py FOLDER STEPS
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kdjax import losses, objectives, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import batches
from kdjax.io.logs import JsonLines
from kdjax.models import from_nnx
from kdjax.objectives import projectors
from kdjax.train.loop import fit
from kdjax.train.state import init_state
from kdjax.train.step import make_train_step


class Net(nnx.Module):
    """Everything with a state of its own: batch statistics and dropout's keys."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (2, 2), rngs=rngs)
        self.hidden = nnx.Linear(16, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x.reshape(-1, 2, 2, 2)).reshape(-1, 16)
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def main(folder: Path, steps: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    data = {"x": x, "label": (np.arange(200) % 4).astype(np.int32)}
    source = batches(data, batch_size=16, seed=1, transform=augment)

    student = from_nnx(Net(16, rngs=nnx.Rngs(0)), features=["conv", "norm"])
    teacher, frozen = teachers.ema(student, decay=optax.linear_schedule(0.5, 0.99, 40))
    objective = objectives.combine(
        objectives.hard_labels(weight=0.5),
        objectives.soft_labels(
            losses.forward_kl, weight=optax.linear_schedule(0.1, 1.0, 50)
        ),
        *trained_parts(),
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    parts = (student, teacher, objective, optimizer)
    state = init_state(
        *parts, frozen=frozen, batch=next(iter(source)), rng=jax.random.key(2)
    )
    source.set_state({"next_index": 0})
    step = jax.jit(
        make_train_step(student.model, teacher, objective, optimizer),
        donate_argnums=0,
    )
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, config={"steps": steps})
    log = JsonLines(folder / "metrics.jsonl")
    result = fit(
        step,
        state,
        frozen,
        source,
        steps=steps,
        evaluate=lambda state: {"norm": float(optax.tree.norm(state.params))},
        evaluate_every=25,
        checkpoints=checkpoints,
        checkpoint_every=10,
        log_every=7,
        writers=[log],
    )
    checkpoints.close()
    log.close()
    if not result.interrupted:
        np.savez(folder / "final.npz", **arrays(result.state))
    print("interrupted" if result.interrupted else "finished", result.step)


def trained_parts():
    """A projector, a generator with its random mask, and a memory bank."""
    on_map = {"student": "conv", "teacher": "conv"}
    on_vector = {"student": "norm", "teacher": "norm"}
    return (
        objectives.features(
            losses.feature_mse, projector=projectors.mlp(8), weight=0.1, **on_vector
        ),
        objectives.masked_generation(weight=0.01, **on_map),
        objectives.contrastive_memory(
            dataset_size=200, width=6, negatives=12, weight=0.01, **on_vector
        ),
    )


def augment(batch, bits):
    """Mirrors half of the examples, each by its own coin."""
    sign = np.where(bits & 1, 1, -1).astype(np.float32)
    return batch | {"x": batch["x"] * sign[:, None]}


def arrays(state):
    """All of a state by path, keys as their numbers."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
