"""A state of every kind of leaf, saved and compared."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.io.input import batches
from kdjax.train.state import DistillState


def data():
    return batches({"x": np.arange(40)}, batch_size=4, seed=0)


def make_state(seed=0):
    """Every kind of leaf: dtypes, scalars, empty parts, NaN, typed and old keys."""
    keys = jax.random.split(jax.random.key(seed), 4)
    student = {
        "kernel": jax.random.normal(keys[0], (5, 3)),
        "half": jax.random.normal(keys[1], (4,), jnp.bfloat16),
        "special": jnp.array([jnp.nan, -jnp.inf, -0.0, 1e-45]),
    }
    return DistillState(
        step=jnp.int32(seed),
        skipped=jnp.int32(0),
        params={"student": student, "objective": {}},
        model_state={"flags": jnp.array([True, False])},
        objective_state={"bank": jax.random.bits(keys[2], (3,), jnp.uint8)},
        teacher_state=(),
        opt_state=({"mu": jax.random.normal(keys[3], (5, 3)), "nu": None}, ()),
        rng=jax.random.key(seed, impl="rbg"),
    )


def bits(tree):
    """Each leaf as bytes, by path, so that NaN and -0.0 are compared too."""
    return {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, raw(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def raw(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def save(checkpoints, step, metrics=None):
    progress = {"sums": {"a": [0.1 * step, step]}, "skipped_in_a_row": 0}
    state = make_state(step)
    iterator = data()
    iterator.set_state({"next_index": step})
    checkpoints.save(step, state, iterator, progress, metrics)
    checkpoints.wait()
    return state, progress


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
