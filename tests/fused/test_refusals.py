"""What does not fit is refused by name, before anything is computed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import fused, losses, objectives
from kdjax.types import Outputs
from tests.fused import heads

STUDENT, TEACHER = heads.head(0), heads.head(1, width=6)


def refused(
    error,
    match,
    *,
    loss=losses.forward_kl,
    student=STUDENT,
    teacher=TEACHER,
    args=(),
    **options,
):
    with pytest.raises(error, match=match):
        fused.token_mean(loss, student, teacher, *args, **options)


def test_refuses_what_is_no_head():
    refused(
        TypeError,
        "student: got .*Array.*expected a kdjax.LinearHead",
        student=jnp.ones((2, 3)),
    )
    wide = heads.head(0)._replace(hidden=jnp.ones((2, 5, 3)))
    refused(
        ValueError, r"student: got hidden \(2, 5, 3\) and kernel \(4, 8\)", student=wide
    )
    tied = TEACHER._replace(kernel=TEACHER.kernel.T)
    refused(ValueError, r"teacher: .*tied as embedding.T", teacher=tied)
    short = STUDENT._replace(bias=jnp.ones(3))
    refused(
        ValueError, r"student.bias: got shape \(3,\), expected \(8,\)", student=short
    )
    whole = STUDENT._replace(hidden=jnp.ones(STUDENT.hidden.shape, int))
    refused(TypeError, "student.hidden: got dtype int32", student=whole)


def test_refuses_other_tokens():
    fewer = heads.head(1, batch=(2, 4))
    refused(
        ValueError,
        r"teacher.hidden: got shape \(2, 4, 4\), expected \(2, 5\) first",
        teacher=fewer,
    )
    refused(
        ValueError, r"teacher: got shape \(7,\), expected \(2, 5\)", teacher=jnp.ones(7)
    )
    match = r"per_token_args\[0\]: got shape \(\), expected \(2, 5\).*functools.partial"
    refused(ValueError, match, args=(2.0,))
    refused(ValueError, r"where: got shape \(2,\)", where=jnp.ones(2, bool))
    refused(TypeError, r"where: got dtype float32", where=jnp.ones((2, 5)))
    refused(ValueError, "chunk_size: got 0, expected 1 or more", chunk_size=0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("multi_level_relation", r"\(\)"),
        ("intra_class_relation", r"\(8,\)"),
        ("binary_distillation", r"\(10, 8\)"),
    ],
)
def test_refuses_losses_that_are_not_per_token(name, shape):
    match = rf"loss: got values of shape {shape} for 10 tokens; expected one each"
    refused(ValueError, match, loss=getattr(losses, name))
    soft = objectives.soft_labels(getattr(losses, name))
    with pytest.raises(ValueError, match=match):
        soft.apply({}, {}, Outputs(STUDENT), Outputs(TEACHER), {}, jnp.int32(0))


def test_refuses_other_reports_and_vocabularies():
    def loss(student, teacher):
        return losses.forward_kl(student, teacher), {"top": student}

    with pytest.raises(ValueError, match=r"loss: got others of shape \(10, 8\)"):
        fused.token_means(loss, STUDENT, TEACHER)
    refused(
        ValueError, "student_logits .* and teacher_logits", teacher=jnp.ones((2, 5, 9))
    )


def test_refuses_forward_mode():
    def value(student):
        return heads.chunked(losses.forward_kl, student, (TEACHER,)).value()

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(value, (STUDENT,), (STUDENT,))


def test_refuses_derivatives_by_what_a_loss_closes_over():
    def value(temperature):
        loss = functools.partial(losses.forward_kl, temperature=temperature)
        return heads.chunked(loss, STUDENT, (TEACHER,)).value()

    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(value)(2.0)


def test_refuses_meshes_that_loops_cannot_run_in():
    def value(hidden):
        student = STUDENT._replace(hidden=hidden)
        return fused.token_mean(losses.forward_kl, student, TEACHER).value()[None]

    rows = PartitionSpec("data")
    for kind, told in (
        (AxisType.Auto, r"student.hidden: varies over \['data'\].*check_vma=False"),
        (AxisType.Explicit, r"student.hidden: lies on Explicit axes \('data',\)"),
    ):
        two = jax.devices()[:2]
        mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=two)
        hidden = jax.device_put(STUDENT.hidden, NamedSharding(mesh, rows))
        inner = value
        if kind == AxisType.Auto:
            inner = jax.shard_map(value, mesh=mesh, in_specs=rows, out_specs=rows)
        with pytest.raises(ValueError, match=told), jax.set_mesh(mesh):
            inner(hidden)


def test_refuses_names_and_numbers_that_are_no_such():
    refused(TypeError, r"token_axes: got 'data', .*\('data',\)", token_axes="data")
    many = STUDENT._replace(scale=jnp.ones(8))
    refused(
        ValueError, r"student.scale: got shape \(8,\), expected a scalar", student=many
    )
