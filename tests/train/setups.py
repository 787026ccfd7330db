"""Small networks, data and steps that the tests of the core share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from kdjax import losses, metrics, models, objectives, teachers
from kdjax.train import init_state, make_train_step

CLASSES, WIDTH, EXAMPLES = 5, 6, 16


class Mlp(nnx.Module):
    """Two dense layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.out = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class Noisy(nnx.Module):
    """Two dense layers, and everything with a state of its own."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.first = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.first(nnx.relu(self.norm(self.hidden(x))))
        return self.out(self.second(x))


class LinenMlp(linen.Module):
    """The same two layers in Linen."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(8, name="hidden")(x))
        return linen.Dense(CLASSES, name="out")(x)


class LinenNoisy(linen.Module):
    """Two layers with batch statistics and dropout, in Linen."""

    @linen.compact
    def __call__(self, x, *, train: bool):
        x = linen.Dense(8, name="hidden")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = linen.Dropout(0.3, deterministic=not train)(linen.relu(x))
        return linen.Dense(CLASSES, name="out")(x)


def bare_mlp(params, batch):
    """The same two layers without a framework."""
    x = batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return jax.nn.relu(x) @ params["out"]["kernel"] + params["out"]["bias"]


def batch(seed: int = 0, examples: int = EXAMPLES) -> dict[str, np.ndarray]:
    """Random examples, a quarter of them masked, another one unlabelled."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples).astype(np.int32)
    labels[rng.random(examples) < 0.25] = -100
    return {
        "x": rng.normal(size=(examples, WIDTH)).astype(np.float32),
        "label": labels,
        "mask": rng.random(examples) < 0.75,
    }


def objective():
    """Hard and soft labels and a diagnostic, as a user would join them."""
    return objectives.combine(
        objectives.hard_labels(weight=0.3),
        objectives.soft_labels(losses.forward_kl, weight=0.7, temperature=3.0),
        objectives.monitor(metrics.agreement, name="agreement"),
    )


def training(
    net,
    optimizer=None,
    *,
    teacher_net=None,
    teacher_parts=None,
    goal=None,
    **options,
):
    """A state, its frozen teacher and a pure step."""
    optimizer = optimizer or optax.adam(1e-2)
    goal = goal or objective()
    teacher, frozen = teachers.frozen(
        teacher_net or models.from_nnx(Noisy(rngs=nnx.Rngs(7)))
    )
    if teacher_parts is not None:
        teacher = teachers.micro_batched(teacher, teacher_parts)
    state = init_state(
        net,
        teacher,
        goal,
        optimizer,
        frozen=frozen,
        batch=batch(),
        rng=jax.random.key(1),
    )
    step = make_train_step(net.model, teacher, goal, optimizer, **options)
    return state, frozen, step


def bits(tree) -> list[np.ndarray]:
    """All arrays as bytes, keys included, for comparisons bit by bit."""
    leaves = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaves.append(np.frombuffer(np.asarray(leaf).tobytes(), np.uint8))
    return leaves
