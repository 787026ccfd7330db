"""Runs a step on CPU devices, and prints how much memory it took beside the forecast.

    python -m tests.tools.memory_run 4

A process of its own: memory that others freed in it would be taken again unnoticed.
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from experiments.lm import preflight as lm
from experiments.lm.model import DecoderConfig
from kdjax.tools import preflight
from kdjax.train import batch_axes, make_mesh, place_step, shardings

MESHES = {1: {"data": 1}, 4: {"fsdp": 2, "tensor": 2}}


def decoder(width):
    return DecoderConfig(
        vocabulary=8192,
        layers=2,
        width=width,
        heads=width // 128,
        key_value_heads=2,
        head_width=128,
        mlp_width=2 * width,
    )


def resident(name):
    """Of this process, in bytes; ``VmHWM`` is the most since it was reset."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


def on_mesh(tree, where):
    def make():
        return jax.tree.map(
            lambda leaf: (
                jax.random.key(0)
                if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else jnp.ones(leaf.shape, leaf.dtype)
            ),
            tree,
        )

    return jax.jit(make, out_shardings=where)()


def arrays(plan, mesh):
    """State, teacher and batch."""
    split = NamedSharding(mesh, batch_axes(mesh))
    return (
        on_mesh(plan.state, shardings(plan.state, mesh, plan.rules)),
        on_mesh(plan.frozen, shardings(plan.frozen, mesh, plan.teacher_rules)),
        on_mesh(dict(plan.batch), dict.fromkeys(plan.batch, split)),
    )


def run(step, plan, mesh, steps):
    state, frozen, batch = arrays(plan, mesh)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    jax.block_until_ready((state, metrics))


def main(devices):
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(MESHES[devices])
    lm.SHAPES.update(small=decoder(512), large=decoder(768))
    options = lm.Options(
        student="small",
        teacher="large",
        batch_size=8 * devices,
        context=128,
        dtype="float32",
    )
    plan = lm.plan(options, mesh, preflight.Levers())
    report = preflight.check(plan, mesh)
    rules = {"rules": plan.rules, "teacher_rules": plan.teacher_rules}
    step = place_step(plan.step, mesh, state=plan.state, frozen=plan.frozen, **rules)
    # Compiles, which takes memory too.
    run(step, plan, mesh, steps=1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(step, plan, mesh, steps=2)
    taken = resident("VmHWM") - before
    print(json.dumps({"forecast": devices * report.peak, "taken": taken}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
