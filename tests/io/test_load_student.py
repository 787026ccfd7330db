"""The student alone out of the checkpoints of its training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.io.checkpoints import Checkpoints
from kdjax.types import Adapted, Model
from tests.io.states import bits, cut, data, make_state, save

SCORES = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.3}


def unused(params, model_state, batch, *, rng, train):
    raise AssertionError("nothing is computed")


def student_of(state):
    return Adapted(Model(unused), state.params["student"], state.model_state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, keep=2, best="acc")
    for step, score in SCORES.items():
        save(checkpoints, step, {"acc": score})
    checkpoints.close()
    return folder


@pytest.fixture
def checkpoints(folder):
    opened = Checkpoints(folder, best="acc")
    yield opened
    opened.close()


@pytest.mark.parametrize("step", [None, 3])
def test_its_arrays_come_back_bit_for_bit(checkpoints, step):
    template = student_of(make_state(0))
    found = checkpoints.load_student(template, step=step)
    assert found.model is template.model
    expected = student_of(make_state(step or 4))
    assert bits(found[1:]) == bits(expected[1:])


def test_the_best_one_is_found_in_another_process(checkpoints):
    assert checkpoints.best_step() == 2
    found = checkpoints.load_student(student_of(make_state(0)), step=2)
    assert bits(found[1:]) == bits(student_of(make_state(2))[1:])


def test_without_scores_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best_step() is None
    save(checkpoints, 1)
    assert checkpoints.best_step() is None
    checkpoints.close()


def test_a_student_of_one_array_without_a_state(tmp_path):
    params = {"student": jnp.arange(3.0), "objective": {"student": jnp.ones(2)}}
    checkpoints = Checkpoints(tmp_path)
    state = dataclasses.replace(make_state(), params=params, model_state={})
    checkpoints.save(1, state, data(), {})
    found = checkpoints.load_student(Adapted(Model(unused), jnp.zeros(3), {}))
    np.testing.assert_array_equal(found.params, [0, 1, 2])
    assert found.model_state == {}
    checkpoints.close()


def test_another_student_is_refused_by_path(checkpoints):
    other = student_of(make_state(0))
    params = {**other.params, "kernel": jnp.zeros((5, 4)), "bias": jnp.zeros(4)}
    with pytest.raises(ValueError, match="student: the checkpoint") as refused:
        checkpoints.load_student(other._replace(params=params))
    for line in (
        "params/student/bias: checkpoint has nothing, this run has float32[4]",
        "params/student/kernel: checkpoint has float32[5,3], this run has float32[5,4]",
    ):
        assert f"  {line}\n" in str(refused.value)
    assert "half" not in str(refused.value)


def test_what_is_not_there_or_damaged_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    student = student_of(make_state(0))
    with pytest.raises(ValueError, match=r"step: got None; .*checkpoints of \[\]"):
        checkpoints.load_student(student)
    save(checkpoints, 1)
    save(checkpoints, 2)
    with pytest.raises(ValueError, match=r"step: got 3; .*checkpoints of \[1, 2\]"):
        checkpoints.load_student(student, step=3)
    cut(tmp_path / "run" / "2" / "state" / "_METADATA")
    with pytest.raises(ValueError, match=r"step: .*2 is unreadable.*take another"):
        checkpoints.load_student(student, step=2)
    found = checkpoints.load_student(student)
    assert bits(found[1:]) == bits(student_of(make_state(1))[1:])
    checkpoints.close()


def test_keys_of_the_students_state_come_back(tmp_path):
    checkpoints, held = Checkpoints(tmp_path), {"dropout": jax.random.key(5)}
    state = dataclasses.replace(make_state(), model_state=held)
    checkpoints.save(1, state, data(), {})
    template = student_of(make_state(0))._replace(
        model_state={"dropout": jax.random.key(0)}
    )
    found = checkpoints.load_student(template)
    assert bits(found.model_state) == bits(held)
    checkpoints.close()
