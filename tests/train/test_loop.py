"""The loop with a step of a few lines, and recorders in place of files."""

import logging
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.train.loop import FitResult, fit
from kdjax.train.state import DistillState
from kdjax.types import Mean
from tests.train.recorders import Memory, Numbers, Recorder


def new_state():
    return DistillState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params={"student": jnp.zeros(2), "objective": {}},
        model_state={},
        objective_state={},
        teacher_state=(),
        opt_state=(),
        rng=jnp.zeros(2, jnp.uint32),
    )


def make_step(bad=()):
    """Adds the batch up; at the steps ``bad`` (by number) the term is NaN."""
    bad = jnp.array([-1, *bad])

    def step(state, frozen, batch):
        n = state.step + 1
        skip = jnp.any(bad == n)
        term = jnp.where(skip, jnp.nan, 0.1 * batch["x"]) * frozen
        new = state.params["student"] + jnp.where(skip, 0.0, batch["x"])
        metrics = {
            "kl": Mean.of(term, where=jnp.array([True, False]) | (n % 2 == 0)),
            "loss": Mean(term.mean(), jnp.int32(1)),
            "grad_norm": Mean(jnp.float32(1), jnp.int32(1)),
            "skipped": Mean(skip.astype(jnp.float32), jnp.int32(1)),
            "absent": Mean(jnp.float32(0), jnp.int32(0)),
        }
        changed = {
            "step": n,
            "skipped": state.skipped + skip,
            "params": state.params | {"student": new},
        }
        return type(state)(**{**vars(state), **changed}), metrics

    return jax.jit(step, donate_argnums=0)


def run(steps, *, bad=(), batches=None, **options) -> FitResult:
    batches = Numbers() if batches is None else batches
    step = options.pop("step", None) or make_step(bad)
    return fit(step, new_state(), jnp.float32(1), batches, steps=steps, **options)


def test_stops_at_its_number_of_steps_with_nothing_but_a_step():
    result = run(7)
    assert (result.step, result.interrupted) == (7, False)
    assert int(result.state.step) == 7
    np.testing.assert_array_equal(result.state.params["student"], [28.0, 28.0])


def test_records_are_exact_averages_over_the_interval():
    writer = Recorder()
    run(7, log_every=3, writers=[writer])
    train = writer.of("train")
    assert list(train) == [3, 6, 7]

    # Odd steps count one example, even steps two, of 0.1 * n in float32; sums of
    # the step's float32 totals are in float64.
    def total(n):
        one = np.float32(0.1) * np.float32(n)
        return float(one if n % 2 else one + one)

    assert train[3]["kl"] == (total(1) + total(2) + total(3)) / 4
    assert train[6]["kl"] == (total(4) + total(5) + total(6)) / 5
    assert train[7]["kl"] == total(7)
    assert train[7]["grad_norm"] == 1.0
    assert "absent" not in train[3]


def test_speed_is_measured_apart():
    writer = Recorder()
    run(20, log_every=5, writers=[writer])
    speed = writer.of("speed")
    assert list(speed) == [5, 10, 15, 20]
    for record in speed.values():
        assert record["examples_per_second"] > 0
        assert 0 < record["step_ms_p50"] <= record["step_ms_p95"]
    assert not any("examples_per_second" in r for r in writer.of("train").values())


def test_metrics_are_read_only_some_steps_later():
    """With no record due, no metric of the newest steps is fetched."""
    fetched = []

    class Watched:
        def __init__(self, n, array):
            self.n, self.array = n, array

        def copy_to_host_async(self):
            self.array.copy_to_host_async()

        def is_ready(self):
            return self.array.is_ready()

        def __array__(self, dtype=None, copy=None):
            fetched.append(self.n)
            return np.asarray(self.array)

    inner, dispatched = make_step(), []

    def step(state, frozen, batch):
        dispatched.append(None)
        n = len(dispatched)
        assert all(earlier <= n - 2 for earlier in fetched)
        state, metrics = inner(state, frozen, batch)
        return state, jax.tree.map(lambda leaf: Watched(n, leaf), metrics)

    run(9, step=step, log_every=3)
    assert sorted(set(fetched)) == list(range(1, 10))


def test_evaluates_at_its_interval_and_at_the_end():
    writer, seen = Recorder(), []

    def evaluate(state):
        seen.append(int(state.step))
        return {"score": float(state.step)}

    run(7, evaluate=evaluate, evaluate_every=3, log_every=3, writers=[writer])
    assert seen == [3, 6, 7]
    assert writer.of("eval") == {n: {"score": float(n)} for n in (3, 6, 7)}
    order = [(step, kind) for step, kind, _ in writer.records if kind != "speed"]
    assert order == [(n, kind) for n in (3, 6, 7) for kind in ("train", "eval")]


def test_saves_after_the_records_are_flushed_and_with_fresh_scores():
    events = []
    store, writer = Memory(events), Recorder(events)
    run(
        5,
        checkpoints=store,
        checkpoint_every=2,
        writers=[writer],
        log_every=1,
        evaluate=lambda state: {"score": 1.0},
        evaluate_every=4,
    )
    assert list(store.saved) == [2, 4, 5]
    scores = {step: saved[3] for step, saved in store.saved.items()}
    assert scores == {2: None, 4: {"score": 1.0}, 5: {"score": 1.0}}
    for n in (2, 4, 5):
        at = events.index(("save", n))
        assert events[at - 1] == ("flush", None)
        assert ("train", n) in events[:at]
    assert store.waits == 1


@pytest.mark.parametrize("killed_at", range(1, 12))
def test_a_killed_run_ends_like_one_left_alone(killed_at):
    options = {"log_every": 4, "checkpoint_every": 3, "bad": (4, 5)}
    alone = Recorder()
    expected = run(11, writers=[alone], checkpoints=Memory(), **options)

    class Killed(Exception):
        pass

    inner, calls = make_step(options.pop("bad")), []

    def dying(state, frozen, batch):
        calls.append(None)
        if len(calls) == killed_at:
            raise Killed
        return inner(state, frozen, batch)

    store, writer = Memory(), Recorder()
    options |= {"writers": [writer], "checkpoints": store}
    with pytest.raises(Killed):
        run(11, step=dying, **options)
    assert max(store.saved, default=0) == (killed_at - 1) // 3 * 3
    result = run(11, step=inner, **options)
    assert (result.step, int(result.state.step)) == (11, 11)
    jax.tree.map(np.testing.assert_array_equal, result.state, expected.state)
    assert writer.of("train") == alone.of("train")


def test_says_that_it_restored(caplog):
    store = Memory()
    run(3, checkpoints=store)
    with caplog.at_level(logging.INFO, "kdjax"):
        run(5, checkpoints=store)
    assert "restored step 3; going on from there to 5" in caplog.text


def test_a_finished_run_returns_at_once_and_writes_nothing():
    store, writer = Memory(), Recorder()
    run(4, checkpoints=store, writers=[writer])
    records, saved = list(writer.records), dict(store.saved)
    result = run(4, checkpoints=store, writers=[writer], step=pytest.fail)
    assert (result.step, result.interrupted) == (4, False)
    assert writer.records == records
    assert store.saved.keys() == saved.keys()


def test_steps_behind_the_state_are_refused():
    store = Memory()
    run(4, checkpoints=store)
    with pytest.raises(ValueError, match="steps: got 3, but the state is at step 4"):
        run(3, checkpoints=store)


def test_stops_after_too_many_skipped_steps_and_saves_first(caplog):
    store = Memory()
    with pytest.raises(FloatingPointError, match=r"step 6: kl not finite.*Lower"):
        run(20, bad=(2, 4, 5, 6), checkpoints=store)
    (saved,) = store.saved
    # Steps may have been under way when the sixth was found out; they are saved.
    assert 6 <= saved <= 8
    state = store.saved[saved][0]
    good = sum(n for n in range(1, saved + 1) if n not in (2, 4, 5, 6))
    np.testing.assert_array_equal(state.params["student"], [good, good])
    assert "step 2 was skipped: kl not finite" in caplog.text


@pytest.mark.parametrize("steps", [6, 20])
def test_a_run_that_failed_is_not_finished_by_starting_it_again(steps):
    store, bad = Memory(), (4, 5, 6)
    for _ in range(3):
        with pytest.raises(FloatingPointError, match="step 6: kl not finite"):
            run(steps, bad=bad, checkpoints=store)
    assert len(store.saved) == 1
    # Unless it is asked for.
    assert run(steps, bad=bad, checkpoints=store, max_skipped=4).step == steps
    assert run(20, bad=bad, checkpoints=store, max_skipped=4).step == 20
    assert run(25, bad=bad, checkpoints=store).step == 25


def test_a_gradient_that_is_not_finite_is_called_so():
    def step(state, frozen, batch):
        state, metrics = inner(state, frozen, batch)
        nan, one = jnp.float32(jnp.nan), jnp.int32(1)
        bad = {"grad_norm": Mean(nan, one), "skipped": Mean(jnp.float32(1), one)}
        return state, metrics | bad

    inner = make_step()
    with pytest.raises(FloatingPointError, match="step 3: the gradient not finite"):
        run(9, step=step)


def test_skipped_steps_stay_out_of_the_averages():
    writer = Recorder()
    run(3, bad=(2,), log_every=3, writers=[writer])
    record = writer.of("train")[3]
    assert record["skipped"] == 1 / 3
    np.testing.assert_allclose(record["kl"], 0.2, rtol=1e-6)  # (0.1 + 0.3) / 2


def test_the_count_of_skipped_steps_survives_a_restart():
    store = Memory()
    run(4, bad=(3, 4), checkpoints=store)
    with pytest.raises(FloatingPointError, match="step 5"):
        run(9, bad=(5,), checkpoints=store)


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="batches: gave no batch at all"):
        run(3, batches=Numbers(length=0))


def test_data_that_ends_early_is_saved_and_refused():
    store = Memory()
    match = "batches: ended after 5 steps, at step 5; expected 8"
    with pytest.raises(ValueError, match=match):
        run(8, batches=Numbers(length=5), checkpoints=store)
    assert list(store.saved) == [5]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"log_every": 0}, "log_every: got 0; expected at least 1"),
        ({"max_skipped": 0}, "max_skipped: got 0"),
        ({"evaluate_every": 2}, "evaluate_every: got 2 without evaluate"),
        ({"checkpoint_every": 2}, "checkpoint_every: got 2 without checkpoints"),
        (
            {"checkpoint_every": 0, "checkpoints": Memory()},
            "checkpoint_every: got 0; expected at least 1",
        ),
    ],
)
def test_intervals_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        run(3, **options)


def test_sigterm_saves_and_returns():
    inner, store, writer = make_step(), Memory(), Recorder()

    def step(state, frozen, batch):
        if int(batch["x"][0]) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(state, frozen, batch)

    before = signal.getsignal(signal.SIGTERM)
    options = {"checkpoints": store, "writers": [writer], "log_every": 3}
    result = run(9, step=step, **options)
    assert (result.step, result.interrupted) == (4, True)
    assert list(store.saved) == [4]
    assert store.waits == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(writer.of("train")) == [3]

    resumed = run(9, **options)
    assert (resumed.step, resumed.interrupted) == (9, False)
    alone = Recorder()
    run(9, writers=[alone], log_every=3)
    assert writer.of("train") == alone.of("train")


def test_sigterm_in_the_last_step_is_no_interruption():
    inner, store = make_step(), Memory()

    def step(state, frozen, batch):
        if int(batch["x"][0]) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(state, frozen, batch)

    result = run(3, step=step, checkpoints=store, evaluate=lambda state: {"a": 1.0})
    assert (result.step, result.interrupted) == (3, False)
    assert store.saved[3][3] == {"a": 1.0}


def test_runs_outside_of_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(3)))
    thread.start()
    thread.join()
    assert results[0].step == 3


def test_an_error_in_evaluate_is_passed_on_after_the_save_is_waited_for():
    store, before = Memory(), signal.getsignal(signal.SIGTERM)

    def evaluate(state):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(9, checkpoints=store, checkpoint_every=2, evaluate=evaluate)
    assert store.waits == 1
    assert list(store.saved) == [2, 4, 6, 8]
    assert signal.getsignal(signal.SIGTERM) is before
