"""Tokens and classes split over a mesh: the same numbers, and nothing large moves."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import forms, linear_head, traffic
from kdjax import fused, losses, make_train_step, models, objectives, teachers
from kdjax.fused import _chunks
from kdjax.fused._tokens import Rows
from kdjax.train import init_state, make_mesh, place, place_step
from kdjax.types import LinearHead
from tests.fused import heads
from tests.losses import cases
from tests.losses.running import mesh_of
from tests.marks import rest_slow

LOSS = functools.partial(losses.knowledge_distillation, temperature=2.0, alpha=0.3)
BATCH = (8, 3)
STUDENT = heads.head(0, batch=BATCH)
TEACHER = heads.head(1, width=6, batch=BATCH)
LABELS = heads.labels(batch=BATCH)


@functools.cache
def expected():
    run = jax.jit(heads.with_gradient(heads.plain, LOSS))
    return run(STUDENT, (TEACHER, LABELS), heads.mask(BATCH))


MESHES = [
    {"data": 1},
    {"data": 2},
    {"data": 4},
    {"data": 8},
    {"model": 8},
    {"data": 2, "model": 4},
    {"data": 2, "fsdp": 2, "model": 2},
]


def split_over(mesh, *given):
    """Tokens over all axes but ``model``, which classes are split over."""
    tokens = tuple(name for name in mesh.axis_names if name != "model")
    classes = "model" if "model" in mesh.axis_names else None

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    def split(part):
        if not isinstance(part, LinearHead):
            return put(part, tokens)
        return part._replace(
            hidden=put(part.hidden, tokens),
            kernel=put(part.kernel, None, classes),
            bias=None if part.bias is None else put(part.bias, classes),
        )

    return jax.tree.map(split, given, is_leaf=lambda part: isinstance(part, LinearHead))


@pytest.mark.parametrize("axes", rest_slow(MESHES, lambda axes: axes in MESHES[-2:]))
def test_any_mesh_gives_the_same(axes):
    mesh = mesh_of(**axes)
    given = split_over(mesh, STUDENT, (TEACHER, LABELS), heads.mask(BATCH))
    run = jax.jit(heads.with_gradient(heads.chunked, LOSS, chunk_size=2))
    with jax.set_mesh(mesh):
        heads.assert_close(run(*given), expected())


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.select(lambda case: case.gives == "position"))
def test_every_loss_per_token_on_meshes(case):
    student = heads.head(0, batch=BATCH, scale=0.9, soft_cap=3.0)
    others = heads.others_of(case, TEACHER, LABELS, BATCH)
    given = student, others, heads.mask(BATCH)
    loss = functools.partial(case.loss, **case.hyper)
    expected = heads.exact(loss, *given)
    # Of this one the plain gradient is off by 7e-6 beside float64.
    cancels = case.name == "inter_class_relation"
    tolerance = 8e-6 if cancels else heads.tolerance(case)
    for axes in MESHES[1:4] + MESHES[5:6]:
        mesh = mesh_of(**axes)
        run = jax.jit(heads.with_gradient(heads.chunked, loss, chunk_size=2))
        with jax.set_mesh(mesh):
            got = run(*split_over(mesh, *given))
        heads.assert_close(got, expected, tolerance)


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "model": 4}], ids=str)
def test_any_mesh_gives_the_same_for_targets(axes):
    targets = losses.top_k_targets(TEACHER.logits(), 3)
    given = STUDENT, (targets,), heads.mask(BATCH)

    def run(mean, **options):
        of = heads.with_gradient(mean, losses.sparse_forward_kl, **options)
        return jax.jit(of)(*given)

    dense = run(heads.plain)
    mesh = mesh_of(**axes)
    classes = "model" if "model" in axes else None
    placed = STUDENT._replace(
        kernel=jax.device_put(STUDENT.kernel, NamedSharding(mesh, P(None, classes)))
    )
    given = placed, *given[1:]
    with jax.set_mesh(mesh):
        heads.assert_close(run(heads.chunked, chunk_size=2), dense)


def test_tokens_that_devices_do_not_divide():
    given = heads.head(0), (heads.head(1), heads.labels()), heads.mask()
    dense = jax.jit(heads.with_gradient(heads.plain, LOSS))(*given)
    run = heads.with_gradient(heads.chunked, LOSS)
    with jax.set_mesh(mesh_of(data=8)):
        heads.assert_close(jax.jit(run)(*given), dense)


@pytest.mark.parametrize("size", [1, 70], ids=["rows", "blocks that divide"])
def test_kernels_gradient_is_summed_block_by_block(size, monkeypatch):
    # 4 rows of 32 bytes: of 70 bytes two fit.
    monkeypatch.setattr(_chunks, "SUMMED_BYTES", size)
    given = STUDENT, (TEACHER, LABELS), heads.mask(BATCH)
    run = jax.jit(heads.with_gradient(heads.chunked, LOSS))
    with jax.set_mesh(mesh_of(data=4)):
        text = run.lower(*given).as_text()
        heads.assert_close(run(*given), expected())
    assert f"tensor<{max(1, size // 32)}x8xf32>" in text


def test_outside_of_jit():
    with jax.set_mesh(mesh_of(data=4, model=2)):
        mean = heads.chunked(LOSS, STUDENT, (TEACHER, LABELS))
    dense = heads.plain(LOSS, STUDENT, (TEACHER, LABELS))
    heads.assert_close(mean, dense)


def test_a_device_that_has_its_own_tokens_already():
    mesh = mesh_of(data=4)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False
    )
    def run(hidden):
        mean = heads.chunked(
            losses.forward_kl,
            STUDENT._replace(hidden=hidden),
            (heads.head(1, batch=(2, 3)).logits() * 0,),
        )
        return jax.tree.map(lambda each: jax.lax.psum(each, "data"), mean)

    teacher = jnp.zeros((*BATCH, heads.CLASSES))
    dense = heads.plain(losses.forward_kl, STUDENT, (teacher,))
    heads.assert_close(run(STUDENT.hidden), dense)


def net(seed, width, *, multiplied):
    """Hidden states of tokens and a head over six classes."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "body": jax.random.normal(keys[0], (3, width)),
        "head": jax.random.normal(keys[1], (width, 6)),
    }

    def apply(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["body"])
        head = LinearHead(hidden, params["head"], soft_cap=5.0)
        return head.logits() if multiplied else head

    return models.from_apply(apply, params)


def batch():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(*BATCH, 3)).astype(np.float32),
        "label": np.minimum(LABELS, 5),
        "mask": np.asarray(heads.mask(BATCH)),
    }


def trained(multiplied, place_on=None, *, steps=2, **options):
    """Parameters and metrics after some steps."""
    student, teacher_net = (
        net(*given, multiplied=multiplied) for given in ((0, 4), (1, 6))
    )
    teacher, frozen = teachers.frozen(teacher_net)
    goal = objectives.combine(
        objectives.hard_labels(weight=0.3, label_smoothing=0.1),
        objectives.soft_labels(
            losses.jensen_shannon, weight=0.7, temperature=lambda step: 1.0 + step
        ),
    )
    parts = teacher, goal, optax.sgd(0.5)
    state = init_state(
        student, *parts, frozen=frozen, batch=batch(), rng=jax.random.key(0)
    )
    step = make_train_step(student.model, *parts, **options)
    if place_on is None:
        run = jax.jit(step)
    else:
        rules = [("head", P(None, "model"))]
        placing = {"rules": rules, "teacher_rules": rules}
        run = place_step(step, place_on, state=state, frozen=frozen, **placing)
        state, frozen = (place(tree, place_on, rules) for tree in (state, frozen))
    for _ in range(steps):
        state, metrics = run(state, frozen, batch())
    return jax.device_get((state.params, metrics))


@functools.cache
def trained_dense():
    return trained(True)


def test_step_with_a_head_equals_the_dense_one():
    heads.assert_close(trained(False), trained_dense(), 2e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_placed_step_with_a_head_equals_the_dense_one(accumulate, monkeypatch):
    seen = []
    token_means = fused.token_means

    def watched(*args, **options):
        seen.append(dict(jax.sharding.get_abstract_mesh().shape))
        return token_means(*args, **options)

    monkeypatch.setattr(fused, "token_means", watched)
    mesh = make_mesh({"data": 4, "model": 2})
    got = trained(False, mesh, accumulate=accumulate)
    heads.assert_close(got, trained_dense(), 2e-6)
    # init_state knows of no mesh and needs none.
    assert {"data": 4, "model": 2} in seen


TOKENS, SLOTS, WIDTH, CHUNK = 4096, 16384, 256, 64


@pytest.mark.skipif(not traffic.available(), reason="libtpu is not installed")
@pytest.mark.parametrize("shards", [1, 4], ids=["tokens", "classes too"])
def test_a_slice_gathers_nothing(shards):
    mean = linear_head.chunked(forms.KDJAX["forward_kl"], CHUNK)
    ways = 16 // shards, shards
    compiled = linear_head.compiled(mean, ways, TOKENS, SLOTS, WIDTH)
    assert traffic.program(compiled).moved == 0
    sent = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled.as_text())
    shapes = [
        tuple(int(size) for size in shape.split(",") if size)
        for each in sent
        for shape in re.findall(r"\w+\[([\d,]*)\]", each)
    ]
    # The kernel's gradient, once; where classes are split also the gradient of the
    # hidden states, and sums of rows in the loop.
    kernel = WIDTH, SLOTS // shards
    assert shapes.count(kernel) == 1
    rest = [math.prod(shape) for shape in shapes if shape != kernel]
    assert max(rest) <= (1 if shards == 1 else TOKENS // 4 * WIDTH)
    # The kernel's gradient in float32 as it is summed and as it is sent, and a chunk.
    gradient, chunk = (4 * size * kernel[1] for size in (WIDTH, CHUNK))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 2.5 * gradient + 4 * chunk


def test_the_default_chunk_keeps_to_its_memory_or_its_least_rows():
    def chunk(classes):
        hidden = np.zeros((8, 2), np.float32)
        kernel = np.zeros((2, classes), np.float32)
        head = LinearHead(hidden, kernel)
        return Rows.of((8,), fused.TOKEN_AXES).chunk_of(head)

    assert chunk(20000) == fused.CHUNK_BYTES // (3 * 4 * 20000) == 279
    assert chunk(150000) == fused.LEAST_TOKENS_ON_CPU
    # Axes that split no tokens split the classes.
    mesh = mesh_of(data=2, model=4)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert chunk(20000) == 4 * 279
        assert chunk(150000) == 4 * fused.LEAST_TOKENS_ON_CPU
    # It is the mesh that tells what a program is compiled for.
    chip = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    slice_of = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(slice_of):
        assert chunk(150000) == fused.LEAST_TOKENS
