"""What kdjax.tools.preflight compiles of this experiment: one step of one method.

    python -m kdjax.tools.preflight experiments.lm --topology v5e:16x16 -- \
        --student llama-3.2-1b --teacher llama-3.1-8b --context 4096

Shapes alone are made: teachers of any size need no memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.sharding import Mesh

from experiments.lm import weights
from experiments.lm.config import Config
from experiments.lm.methods.logits import LOGITS
from experiments.lm.methods.setup import Setup
from experiments.lm.model import Decoder, DecoderConfig
from experiments.lm.networks import INPUTS
from experiments.lm.placement import rules
from experiments.lm.rollouts import Continuation
from experiments.lm.rotary import RopeScaling
from kdjax import Adapted, make_train_step, teachers
from kdjax.models import from_nnx
from kdjax.tools.preflight import Levers, Plan
from kdjax.train import init_state
from kdjax.types import Batch, PyTree

_LLAMA = functools.partial(
    DecoderConfig,
    vocabulary=128_256,
    heads=32,
    key_value_heads=8,
    rope_theta=500_000.0,
    norm_epsilon=1e-5,
)

# As in the config.json of these models.
SHAPES = {
    "llama-3.2-1b": _LLAMA(
        layers=16,
        width=2048,
        head_width=64,
        mlp_width=8192,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        tied=True,
    ),
    "llama-3.1-8b": _LLAMA(
        layers=32,
        width=4096,
        head_width=128,
        mlp_width=14_336,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which step is compiled."""

    student: str = "llama-3.2-1b"
    """A shape by name, or a folder with the config.json of a Llama or Qwen."""
    teacher: str = "llama-3.1-8b"
    """Likewise, of the same vocabulary."""
    method: str = "forward_kl"
    """One of those on the logits of the data's tokens."""
    batch_size: int = 256
    """Rows of a step, over all chips."""
    context: int = 4096
    """Tokens of a row."""
    dtype: str = "bfloat16"
    """What both compute in; the student's parameters are float32."""

    def __post_init__(self) -> None:
        if self.method not in LOGITS:
            raise ValueError(
                f"--method: got {self.method!r}; expected one of {', '.join(LOGITS)}."
            )

    def shape(self, name: str, *, remat: bool = False) -> DecoderConfig:
        """The decoder of this name or folder."""
        known = SHAPES.get(name)
        config = weights.read_config(Path(name)) if known is None else known
        return dataclasses.replace(config, dtype=self.dtype, remat=remat)


def planner(arguments: Sequence[str]) -> Callable[[Mesh, Levers], Plan]:
    """Reads the command line behind preflight's own.

    Returns:
      ``(mesh, levers) -> plan``, which :func:`kdjax.tools.preflight.recommend` takes.
    """
    prog = "python -m kdjax.tools.preflight experiments.lm --"
    return functools.partial(plan, tyro.cli(Options, args=arguments, prog=prog))


def plan(options: Options, mesh: Mesh, levers: Levers) -> Plan:
    """One step of a method, and the shapes that it works on."""
    shape = options.shape(options.student, remat=levers.remat)
    shape_of_teacher = options.shape(options.teacher)
    student, given = _network(shape), _network(shape_of_teacher)
    setup = Setup(
        student=shape,
        teacher=shape_of_teacher,
        temperature=1.0,
        own_share=1.0,
        go_on=Continuation(prompt=1, stop=0),
        byte_pairs=None,
        chunk_size=levers.chunk_size,
    )
    teacher, _ = teachers.frozen(given)
    parts = (
        teacher,
        LOGITS[options.method](setup).objective,
        Config().optimizer_for(1e-4, 10_000),
    )
    size = options.batch_size, options.context
    batch = dict.fromkeys(INPUTS, jax.ShapeDtypeStruct(size, jnp.int32))

    def arrays(student_params: PyTree, teacher_params: PyTree, batch: Batch) -> Any:
        _, frozen = teachers.frozen(
            given._replace(params=teacher_params), dtype=jnp.dtype(levers.teacher_dtype)
        )
        state = init_state(
            student._replace(params=student_params),
            *parts,
            frozen=frozen,
            batch=batch,
            rng=jax.random.key(0),
        )
        return state, frozen

    state, frozen = jax.eval_shape(arrays, student.params, given.params, batch)
    return Plan(
        make_train_step(student.model, *parts, accumulate=levers.accumulate),
        state,
        frozen,
        batch,
        rules(mesh.axis_names, tied=shape.tied),
        rules(mesh.axis_names, tied=shape_of_teacher.tied),
    )


def _network(config: DecoderConfig) -> Adapted:
    """A decoder whose parameters are shapes."""
    return from_nnx(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), inputs=INPUTS
    )
