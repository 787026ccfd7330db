"""A small distillation by the processes of a cluster; see test_processes.py."""

import dataclasses

import jax
import numpy as np
import optax
import tyro
from etils.epath import Path
from flax import nnx

from experiments.jobs.cluster import Cluster, is_first, together
from kdjax import losses, objectives, teachers
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import batches, padded_batches, shard_of
from kdjax.io.logs import JsonLines
from kdjax.models import from_nnx
from kdjax.train import (
    evaluate,
    fit,
    init_state,
    make_eval_step,
    make_mesh,
    make_train_step,
    place,
    place_batch,
    place_step,
)
from tests.train.resume_run import Net, arrays


@dataclasses.dataclass(frozen=True)
class Options:
    folder: Path
    steps: int
    tensor: int = 1
    cluster: Cluster = dataclasses.field(default_factory=Cluster)


def main(options: Options) -> int:
    options.cluster.join()
    sizes = {"fsdp": jax.device_count() // options.tensor, "tensor": options.tensor}
    mesh = make_mesh(sizes)
    rules = [("(hidden|head)/kernel", jax.P("fsdp", "tensor"))]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    data = {"x": x, "label": (np.arange(200) % 4).astype(np.int32)}
    source = batches(
        data, batch_size=16, seed=1, transform=mirror, shard=shard_of(mesh)
    )
    student = jax.tree.map(_wide, from_nnx(Net(16, rngs=nnx.Rngs(0))))
    teacher, frozen = teachers.ema(student, decay=optax.linear_schedule(0.5, 0.99, 40))
    objective = objectives.combine(
        objectives.hard_labels(weight=0.5),
        objectives.soft_labels(losses.forward_kl, weight=0.5),
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, options.steps))
    parts = (teacher, objective, optimizer)
    state = init_state(
        student, *parts, frozen=frozen, batch=next(source), rng=jax.random.key(2)
    )
    source.set_state({"next_index": 0})
    step = place_step(
        make_train_step(student.model, *parts),
        mesh,
        state=state,
        frozen=frozen,
        rules=rules,
    )
    held_out = [
        place_batch(batch, mesh)
        for batch in padded_batches(data, batch_size=64, shard=shard_of(mesh))
    ]
    same = jax.NamedSharding(mesh, jax.P())
    eval_step = jax.jit(make_eval_step(student.model, teacher), out_shardings=same)
    frozen = place(frozen, mesh)
    checkpoints = Checkpoints(
        options.folder / "checkpoints", keep=9, config={"steps": options.steps}
    )
    log = JsonLines(options.folder / "metrics.jsonl") if is_first() else None
    result = fit(
        step,
        place(state, mesh, rules),
        frozen,
        source,
        steps=options.steps,
        evaluate=lambda state: evaluate(eval_step, state, frozen, held_out),
        evaluate_every=25,
        checkpoints=checkpoints,
        checkpoint_every=10,
        log_every=5,
        writers=[log] if log else [],
    )
    checkpoints.close()
    whole = arrays(place(result.state, mesh))
    if log:
        log.close()
        if not result.interrupted:
            with (options.folder / "final.npz").open("wb") as file:
                np.savez(file, **whole)
    print("interrupted" if result.interrupted else "finished", result.step)
    together()
    return 143 if result.interrupted else 0


def mirror(batch, bits):
    """Half of the examples, each by its own coin."""
    return batch | {"x": np.where(bits & 1, 1, -1)[:, None] * batch["x"]}


def _wide(leaf):
    """In float64, so that another mesh changes no number that can be seen."""
    floats = isinstance(leaf, jax.Array) and leaf.dtype == np.float32
    return leaf.astype(np.float64) if floats else leaf


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
