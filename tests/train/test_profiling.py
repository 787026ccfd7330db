"""Where the time of a training goes: waits, utilization and traces."""

import dataclasses
import functools
import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from kdjax.train import Trace, profiling, token_flops
from kdjax.train.chips import Chip
from tests.train.recorders import Numbers, Recorder
from tests.train.test_loop import make_step, run

SLOW = 0.02


class SlowNumbers(Numbers):
    """Each batch takes some time to come."""

    def __next__(self):
        time.sleep(SLOW)
        return super().__next__()


def speeds(**options):
    writer = Recorder()
    run(8, log_every=4, writers=[writer], **options)
    return list(writer.of("speed").values())


def test_a_wait_for_batches_is_told_apart():
    for record in speeds(batches=SlowNumbers()):
        assert 1e3 * SLOW <= record["input_ms_p50"] <= record["input_ms_p95"]
        assert record["input_bound"] == 1


def test_batches_that_come_while_the_device_works_cost_nothing():
    inner = make_step()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, batch):
        state, metrics = inner(state, frozen, batch)
        # Some milliseconds, for which the metrics must wait.
        start = jnp.eye(64) + state.step
        work = jax.lax.fori_loop(0, 2000, lambda _, x: jnp.tanh(x @ x), start)
        kl = metrics["kl"]
        kl = dataclasses.replace(kl, total=kl.total + 0 * work.sum())
        return state, metrics | {"kl": kl}

    *_, record = speeds(step=step)
    assert record["input_bound"] == 0
    assert record["input_ms_p50"] < record["step_ms_p50"]


def test_utilization_is_of_the_peak_of_all_devices(monkeypatch):
    chip = Chip(memory=1, bandwidth=1, flops=1e12, links=1)
    monkeypatch.setattr(profiling, "chip_of", lambda kind: chip)
    for record in speeds(model_flops=1e9):
        per_second = record["model_tflops_per_second"] * 1e12
        # One example is two numbers.
        assert per_second == pytest.approx(1e9 * record["examples_per_second"] / 2)
        peak = 1e12 * jax.device_count()
        assert record["model_flops_utilization"] == pytest.approx(per_second / peak)


def test_where_the_peak_is_not_known_there_is_no_utilization():
    for record in speeds(model_flops=1e9):
        assert record["model_tflops_per_second"] > 0
        assert "model_flops_utilization" not in record
    assert "model_tflops_per_second" not in speeds()[0]


def test_six_and_two_operations_for_each_parameter():
    student, teacher = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, jnp.ones(7)
    assert token_flops(student) == 60
    assert token_flops(student, teacher) == 60 + 14


def test_a_trace_holds_the_steps_asked_for(tmp_path):
    result = run(8, trace=Trace(tmp_path, steps=2, skip=3))
    assert int(result.state.step) == 8
    (events,) = tmp_path.rglob("*.trace.json.gz")
    assert list(tmp_path.rglob("*.xplane.pb"))
    traced = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    steps = {
        event["args"]["step_num"]
        for event in traced
        if event.get("name") == "step" and "step_num" in event.get("args", {})
    }
    assert {int(step) for step in steps} == {4, 5}


def test_a_training_that_ends_early_ends_its_trace(tmp_path):
    run(3, trace=Trace(tmp_path / "first", steps=9, skip=1))
    run(3, trace=Trace(tmp_path / "second", steps=1, skip=0))
    for name in ("first", "second"):
        assert len(list((tmp_path / name).rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("skip", -1)])
def test_a_trace_without_steps_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}; expected at least"):
        Trace("anywhere", **{name: value})
