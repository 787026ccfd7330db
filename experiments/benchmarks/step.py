"""kdjax's training step beside hand-written JAX that does the same work."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.benchmarks import report
from experiments.benchmarks.report import Figure
from kdjax import losses, models, objectives, teachers
from kdjax.train import init_state, make_train_step

HARD, SOFT, TEMPERATURE = 0.3, 0.7, 4.0
OPTIMIZER = optax.adam(1e-3)


class Size(NamedTuple):
    """Two networks, a batch, and how many steps make one measurement."""

    batch: int
    widths: tuple[int, ...]
    teacher_widths: tuple[int, ...]
    steps: int


SIZES = {
    # The device works, as it does in any real training.
    "large": Size(512, (784, 512, 512, 10), (784, 1024, 1024, 10), 10),
    # The device is done before the host is: what calling the step costs.
    "tiny": Size(8, (16, 16, 16, 10), (16, 32, 32, 10), 300),
}


def perceptron(rng: Array, widths: tuple[int, ...]) -> dict[str, dict[str, Array]]:
    keys = jax.random.split(rng, len(widths))
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, shape) / jnp.sqrt(shape[0]),
            "bias": jnp.zeros(shape[1]),
        }
        for i, (key, shape) in enumerate(
            zip(keys, itertools.pairwise(widths), strict=False)
        )
    }


def logits(params: dict[str, dict[str, Array]], batch: dict[str, Array]) -> Array:
    hidden = batch["x"]
    for i, layer in enumerate(params.values()):
        hidden = (jax.nn.relu(hidden) if i else hidden) @ layer["kernel"]
        hidden = hidden + layer["bias"]
    return hidden


class Setup(NamedTuple):
    """A compiled step with its first state and its constant arguments."""

    step: Callable[..., Any]
    state: Any
    frozen: Any
    batch: dict[str, Array]


def drawn(size: Size) -> tuple[Any, Any, dict[str, Array]]:
    """Parameters of student and teacher, and a batch."""
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "x": jax.random.normal(keys[2], (size.batch, size.widths[0])),
        "label": jax.random.randint(keys[3], (size.batch,), 0, size.widths[-1]),
    }
    student = perceptron(keys[0], size.widths)
    return student, perceptron(keys[1], size.teacher_widths), batch


def with_kdjax(size: Size) -> Setup:
    student, teacher_params, batch = drawn(size)
    net = models.from_apply(logits, student)
    teacher, frozen = teachers.frozen(models.from_apply(logits, teacher_params))
    objective = objectives.combine(
        objectives.hard_labels(weight=HARD),
        objectives.soft_labels(temperature=TEMPERATURE, weight=SOFT),
    )
    parts = teacher, objective, OPTIMIZER
    rng = jax.random.key(1)
    state = init_state(net, *parts, frozen=frozen, batch=batch, rng=rng)
    step = jax.jit(make_train_step(net.model, *parts), donate_argnums=0)
    return Setup(step, state, frozen, batch)


def by_hand(size: Size) -> Setup:
    """The same arithmetic, guard and metrics, as one would write them for one model."""
    student, frozen, batch = drawn(size)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "params": student,
        "opt_state": OPTIMIZER.init(student),
    }
    return Setup(jax.jit(_hand_step, donate_argnums=0), state, frozen, batch)


def _hand_step(state: Any, frozen: Any, batch: dict[str, Array]) -> tuple[Any, Any]:
    target = jax.lax.stop_gradient(logits(frozen, batch))

    def loss(params: Any) -> tuple[Array, dict[str, Array]]:
        shown = logits(params, batch)
        scored = batch["label"] >= 0
        hard = losses.cross_entropy(shown, batch["label"])
        hard = hard.sum(where=scored) / jnp.maximum(scored.sum(), 1)
        soft = losses.forward_kl(shown, target, temperature=TEMPERATURE).mean()
        return HARD * hard + SOFT * soft, {"hard": hard, "soft": soft}

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = OPTIMIZER.update(gradient, state["opt_state"])
    changed = optax.apply_updates(state["params"], updates), opt_state
    old = state["params"], state["opt_state"]
    params, opt_state = jax.tree.map(functools.partial(jnp.where, finite), changed, old)
    new_state = {
        "step": state["step"] + 1,
        "skipped": state["skipped"] + ~finite,
        "params": params,
        "opt_state": opt_state,
    }
    return new_state, {**terms, "loss": value, "grad_norm": norm, "skipped": ~finite}


def runner(setup: Setup, steps: int) -> Callable[[], None]:
    """Takes some steps from where it was, and waits for the last."""
    state = setup.state

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = setup.step(state, setup.frozen, setup.batch)
        jax.block_until_ready((state, metrics))

    return run


def figures(repeats: int, sizes: dict[str, Size] = SIZES) -> Iterator[Figure]:
    """Time of a step of each size."""
    for name, size in sizes.items():
        setups = {"kdjax": with_kdjax(size), "by hand": by_hand(size)}
        runs = {
            side: report.stopwatch(runner(setup, size.steps))
            for side, setup in setups.items()
        }
        samples = {
            side: [report.Sample(*(s / size.steps for s in sample)) for sample in taken]
            for side, taken in report.interleaved(runs, 2 * repeats).items()
        }
        layers = " to ".join(map(str, size.widths))
        subject = f"{name}: batch {size.batch}, {layers}"
        section = "One step: hard and soft labels, Adam, guard against NaN, metrics"
        sides = samples["kdjax"], samples["by hand"]
        yield from report.compared(section, subject, "by hand", *sides, target=1.03)
