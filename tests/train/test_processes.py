"""Real processes: killed, told to stop, and other ones that go on with their work."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes import Processes
from tests.train.test_resume import assert_same, newest

SCRIPT = Path(__file__).with_name("many_run.py")
STEPS = 400
METRICS = "metrics.jsonl"
HEARTBEAT = 8
# After its heartbeats are missed, a process that died is told of, and the stacks of
# the others are written.
BOUND = HEARTBEAT + 10

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def start(folder, cache, count=2, devices=1, steps=STEPS, **options):
    given = {"folder": folder, "steps": steps, **options}
    return Processes(
        [SCRIPT, *(f"--{name}={value}" for name, value in given.items())],
        count,
        folder.with_suffix(".printed"),
        devices=devices,
        heartbeat=HEARTBEAT,
        # Restarts compile nothing: what is tested is what happens after that.
        JAX_ENABLE_X64="1",
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def wait_for(folder, step, processes):
    """Returns once there is a checkpoint of ``step`` or later."""
    while not (folder / "checkpoints").exists() or newest(folder) < step:
        assert processes[0].poll() is None, processes.printed(0)
        assert processes[1].poll() is None, processes.printed(1)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with start(folder, cache) as processes:
        processes.finish()
    return folder


# Each kill is a start of Python and of JAX more, beside whatever else runs.
@pytest.mark.timeout(1500)
def test_one_of_two_is_killed_ten_times(tmp_path, cache, alone):
    """The other ends in time with a message; the next two go on where they were."""
    moments, folder = random.Random(0), tmp_path / "run"
    for number in range(10):
        victim = moments.randrange(2)
        with start(folder, cache) as processes:
            # At the first time before there is any checkpoint.
            wait_for(folder, 30 * number, processes)
            time.sleep(moments.uniform(0, 0.1))
            processes[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            status = processes[1 - victim].wait(BOUND)
            took = time.monotonic() - killed
            printed = processes.printed(1 - victim)
        assert status not in (0, 143), number
        assert took < BOUND
        assert "another task died" in printed or "Gloo" in printed
    with start(folder, cache) as processes:
        processes.finish()
    assert_same(folder, alone)


@pytest.mark.parametrize("told", [[1], [0, 1]])
def test_sigterm_to_any_saves_on_both_at_the_same_step(tmp_path, cache, alone, told):
    folder = tmp_path / "run"
    with start(folder, cache) as processes:
        wait_for(folder, 20, processes)
        for number in told:
            processes[number].send_signal(signal.SIGTERM)
        assert processes.statuses(60) == [143, 143]
        ends = [processes.printed(number).split()[-2:] for number in range(2)]
    assert ends[0] == ends[1] == ["interrupted", str(newest(folder))]
    with start(folder, cache) as processes:
        processes.finish()
    assert_same(folder, alone)


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory, cache):
    """Two processes of two devices, on a mesh that splits weights over both."""
    folder = tmp_path_factory.mktemp("two-by-two") / "run"
    with start(folder, cache, devices=2, steps=40, tensor=2) as processes:
        processes.finish()
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "devices", "tensor"), [(1, 4, 1), (4, 1, 2), (1, 1, 1)]
)
def test_other_processes_and_meshes_go_on(
    tmp_path, cache, two_by_two, count, devices, tensor
):
    folder = tmp_path / "run"
    shutil.copytree(two_by_two, folder)
    for step in (30, 40):
        shutil.rmtree(folder / "checkpoints" / str(step))
    (folder / "final.npz").unlink()
    with start(folder, cache, count, devices, 40, tensor=tensor) as processes:
        processes.finish()
    got, expected = map(records, (folder, two_by_two))
    for record, other in zip(got, expected, strict=True):
        # Those of the first 20 steps were not written again. Calibration is summed up
        # in float32.
        tolerance = 1e-9 if other["kind"] == "train" else 1e-6
        tolerance = tolerance if other["step"] > 20 else 0
        for name, value in other.items():
            if name != "kind":
                value = pytest.approx(value, rel=tolerance, abs=1e-12)
            assert record[name] == value, (name, other)
    with (
        np.load(folder / "final.npz") as ours,
        np.load(two_by_two / "final.npz") as its,
    ):
        for name in its:
            np.testing.assert_allclose(ours[name], its[name], 1e-9, 1e-9, err_msg=name)
