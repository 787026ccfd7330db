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
from kdjax.types import Mean

HARD, SOFT, TEMPERATURE = 0.3, 0.7, 4.0
OPTIMIZER = optax.adam(1e-3)


class Size(NamedTuple):
    """Two networks, a batch, and how many steps make one measurement."""

    batch: int
    widths: tuple[int, ...]
    teacher_widths: tuple[int, ...]
    steps: int
    target: float | None


SIZES = {
    # The device works, as it does in any real training.
    "large": Size(512, (784, 512, 512, 10), (784, 1024, 1024, 10), 10, 1.03),
    # The device is done before the host is: what calling the step costs. It is a few
    # hundredths of a millisecond on both sides, whatever the model, and has no target.
    "tiny": Size(8, (16, 16, 16, 10), (16, 32, 32, 10), 300, None),
}


def perceptron(rng: Array, widths: tuple[int, ...]) -> dict[str, dict[str, Array]]:
    shapes = list(itertools.pairwise(widths))
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, shape) / jnp.sqrt(shape[0]),
            "bias": jnp.zeros(shape[1]),
        }
        for i, (key, shape) in enumerate(
            zip(jax.random.split(rng, len(shapes)), shapes, strict=True)
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

    step: jax.stages.Wrapped
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
        "rng": jax.random.key(1),
        "params": student,
        "opt_state": OPTIMIZER.init(student),
    }
    return Setup(jax.jit(_hand_step, donate_argnums=0), state, frozen, batch)


def _hand_step(state: Any, frozen: Any, batch: dict[str, Array]) -> tuple[Any, Any]:
    target = jax.lax.stop_gradient(logits(frozen, batch))

    def loss(params: Any) -> tuple[Array, dict[str, Mean]]:
        shown = logits(params, batch)
        scored = batch["label"] >= 0
        hard = Mean.of(losses.cross_entropy(shown, batch["label"]), scored)
        soft = Mean.of(losses.forward_kl(shown, target, temperature=TEMPERATURE))
        terms = {"hard": hard, "soft": soft}
        return HARD * hard.value() + SOFT * soft.value(), terms

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
        "rng": state["rng"],
        "params": params,
        "opt_state": opt_state,
    }
    watched = {"loss": value, "grad_norm": norm, "skipped": 1.0 - finite}
    one = jnp.ones((), jnp.int32)
    return new_state, {**terms, **{name: Mean(x, one) for name, x in watched.items()}}


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
    """Time of a step of each size, and what the compiler counts in it."""
    section = "One step: hard and soft labels, Adam, guard against NaN, metrics"
    for name, size in sizes.items():
        setups = {"kdjax": with_kdjax(size), "by hand": by_hand(size)}
        bytes_ = [_bytes_accessed(setup) for setup in setups.values()]
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
        sides = samples["kdjax"], samples["by hand"]
        yield from report.compared(
            section, subject, "by hand", *sides, target=size.target
        )
        ours, theirs = (f"{count / 1e6:.3f} MB" for count in bytes_)
        ratio = bytes_[0] / bytes_[1]
        yield Figure(
            section, subject, "bytes accessed", ours, "by hand", theirs, ratio, 1.03
        )


def _bytes_accessed(setup: Setup) -> float:
    """By the compiled program: free of the noise of a machine."""
    program = setup.step.lower(setup.state, setup.frozen, setup.batch).compile()
    counts: Any = program.cost_analysis()
    return counts["bytes accessed"]
