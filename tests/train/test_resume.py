"""A training that is killed ends, bit for bit, like one left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("resume_run.py")
STEPS = 200


def start(folder, cache):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Restarts compile nothing: what is tested is what happens after that.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(STEPS)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.strip()


def newest(folder):
    """The step of the newest checkpoint, 0 before there is one."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def wait_for(folder, step, process):
    """Returns once a checkpoint of ``step`` or later is there."""
    while newest(folder) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(folder, cache)) == f"finished {STEPS}"
    return folder


def assert_same(folder, alone):
    with np.load(folder / "final.npz") as got, np.load(alone / "final.npz") as expected:
        assert set(got) == set(expected)
        for name in expected:
            assert got[name].dtype == expected[name].dtype
            assert got[name].tobytes() == expected[name].tobytes(), name
    metrics = "metrics.jsonl"
    assert (folder / metrics).read_bytes() == (alone / metrics).read_bytes()


def kill_and_resume(folder, alone, cache, step, seconds):
    process = start(folder, cache)
    wait_for(folder, step, process)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    killed = process.returncode == -signal.SIGKILL
    assert finish(start(folder, cache)) == f"finished {STEPS}"
    assert_same(folder, alone)
    return killed


@pytest.mark.slow
def test_the_run_trains_what_it_is_meant_to(alone):
    """Else nothing would be proved: every kind of state is there and moves."""
    with np.load(alone / "final.npz") as final:
        names = "\n".join(final)
        for part in (
            "teacher_state", "model_state", "opt_state", "params", "rng",
            "['objective']", "projector", "memory", "log_normalizer",
        ):  # fmt: skip
            assert part in names
        assert int(final[".step"]) == STEPS


@pytest.mark.slow
def test_killed_once(tmp_path, alone, cache):
    assert kill_and_resume(tmp_path / "run", alone, cache, STEPS // 4, 0.01)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(tmp_path, alone, cache):
    process = start(tmp_path, cache)
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert finish(start(tmp_path, cache)) == f"finished {STEPS}"
    assert_same(tmp_path, alone)


# Each kill is a start of Python and of JAX more, beside whatever else runs.
@pytest.mark.timeout(1500)
@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path, alone, cache):
    moments = random.Random(0)
    killed = 0
    for number in range(10):
        step, seconds = moments.randrange(0, STEPS - 20), moments.uniform(0, 0.3)
        folder = tmp_path / f"{number}"
        killed += kill_and_resume(folder, alone, cache, step, seconds)
    # The machine may be fast enough to finish before some of the moments.
    assert killed >= 5


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, alone, cache):
    moments = random.Random(1)
    for step in range(20, STEPS - 20, 40):
        process = start(tmp_path, cache)
        wait_for(tmp_path, step, process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
    assert finish(start(tmp_path, cache)) == f"finished {STEPS}"
    assert_same(tmp_path, alone)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tmp_path, alone, cache):
    process = start(tmp_path, cache)
    wait_for(tmp_path, 20, process)
    process.terminate()
    state, step = finish(process).split()
    assert state == "interrupted"
    assert 20 <= int(step) < STEPS
    assert newest(tmp_path) == int(step)
    assert finish(start(tmp_path, cache)) == f"finished {STEPS}"
    assert_same(tmp_path, alone)
