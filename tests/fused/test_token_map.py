"""Any function of the logits, token by token: what is kept of them, and no more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import fused, losses
from kdjax.types import LinearHead, SparseTargets
from tests.fused import heads
from tests.losses.running import mesh_of
from tests.marks import rest_slow

HEAD = heads.head(0, scale=0.9, soft_cap=3.0)
TOP = functools.partial(losses.top_k_targets, k=3, temperature=2.0)
KEYS = jax.random.split(jax.random.key(0), heads.BATCH)


def draw(logits, keys):
    return losses.sampled_targets(keys, logits, 6, proposal_temperature=1.5)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 10, None])
def test_targets_are_those_of_all_logits(chunk_size):
    @jax.jit
    def run(head):
        return fused.token_map(TOP, head, chunk_size=chunk_size), TOP(head.logits())

    got, expected = run(HEAD)
    assert isinstance(got, SparseTargets)
    assert got.temperature == 2.0
    assert_same(got, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_what_is_drawn_does_not_depend_on_the_chunks(chunk_size):
    got = fused.token_map(draw, HEAD, KEYS, chunk_size=chunk_size)
    expected = losses.sampled_targets(
        jax.random.key(0), HEAD.logits(), 6, proposal_temperature=1.5
    )
    assert_same(got, expected)


def test_further_heads_and_trees():
    def compare(logits, others):
        right = jnp.take_along_axis(logits, others["labels"][:, None], -1)[:, 0]
        return {"right": right, "gap": losses.forward_kl(logits, others["logits"])}

    labels = jnp.maximum(heads.labels(), 0)
    teacher = heads.head(1, width=6)
    trees = {"labels": labels, "logits": teacher.logits()}
    got = fused.token_map(compare, HEAD, trees, chunk_size=4)
    assert_same(got, compare_all(compare, trees))
    agree = fused.token_map(losses.forward_kl, HEAD, teacher, chunk_size=4)
    assert_same(agree, losses.forward_kl(HEAD.logits(), teacher.logits()))


def compare_all(compare, trees):
    flat = jax.tree.map(lambda each: each.reshape(10, *each.shape[2:]), trees)
    found = compare(HEAD.logits().reshape(10, -1), flat)
    return jax.tree.map(lambda each: each.reshape(heads.BATCH), found)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_few_tokens(batch):
    head = heads.head(0, batch=batch)
    got = fused.token_map(TOP, head)
    assert got.indices.shape == (*batch, 3)
    assert_same(got, TOP(head.logits()))


def test_there_is_no_gradient():
    def total(head):
        return fused.token_map(TOP, head, chunk_size=4).log_probs.sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(HEAD)):
        np.testing.assert_array_equal(leaf, 0)


MESHES = [{"data": 4}, {"data": 8}, {"data": 2, "fsdp": 2, "model": 2}]


@pytest.mark.parametrize("axes", rest_slow(MESHES, lambda axes: "model" in axes))
def test_any_mesh_gives_the_same(axes):
    mesh = mesh_of(**axes)
    classes = "model" if "model" in axes else None
    specs = LinearHead(P(), P(None, classes), P(classes), P(), P())
    head = jax.tree.map(
        lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)),
        jax.tree.map(jnp.asarray, HEAD),
        specs,
    )

    @jax.jit
    def run(head, keys):
        top = fused.token_map(TOP, head, chunk_size=1)
        return top, fused.token_map(draw, head, keys, chunk_size=1)

    expected = TOP(HEAD.logits()), draw(HEAD.logits(), KEYS)
    # Ten tokens, which neither four nor eight devices divide.
    with jax.set_mesh(mesh):
        assert_same(run(head, KEYS), expected)


def test_all_logits_never_exist():
    tokens, width, classes, size = 512, 8, 4096, 16
    head = LinearHead(
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, classes), jnp.float32),
    )
    run = jax.jit(functools.partial(fused.token_map, TOP, chunk_size=size))
    memory = run.lower(head).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 4 * size * classes


def test_refuses_what_does_not_fit():
    def refused(error, match, function, *given, **options):
        with pytest.raises(error, match=match):
            fused.token_map(function, *given, **options)

    refused(TypeError, r"head: got .*Array.*kdjax.LinearHead", TOP, jnp.ones((2, 3)))
    refused(ValueError, "chunk_size: got 0", TOP, HEAD, chunk_size=0)
    match = r"per_token_args\[0\]: got shape \(3,\), expected \(2, 5\) first"
    refused(ValueError, match, draw, HEAD, KEYS.ravel()[:3])
    match = r"per_token_args\[0\]\['a'\]: got shape \(3,\)"
    refused(ValueError, match, draw, HEAD, {"a": jnp.ones(3)})
    match = r"function: got an array of shape \(\) for 10 tokens"
    refused(ValueError, match, lambda logits: logits.sum(), HEAD)
