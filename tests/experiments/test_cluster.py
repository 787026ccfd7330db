"""Jobs of several processes: how they start, print, agree and stop."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.digits.main import main
from experiments.jobs.cluster import Cluster, agreed
from tests.processes import ROOT, Processes, free_port

WHOLE = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"process_id": 2}, r"process-id: got 2; expected 0 to 1, .* the 2 processes"),
        ({"process_id": -1}, "process-id: got -1; expected 0 to 1"),
        ({"process_id": None}, "process-id None; expected all three"),
        ({"num_processes": None}, "num-processes None and process-id 1; expected all"),
        ({"num_processes": 0}, "num-processes: got 0; expected at least 1"),
        ({"coordinator_address": None}, "coordinator-address None"),
        ({"coordinator_address": "host"}, "address: got host; expected HOST:PORT"),
        ({"coordinator_address": "host:x"}, "got host:x; expected HOST:PORT"),
        ({"coordinator_address": ":80"}, "got :80; expected HOST:PORT"),
        ({"coordinator_address": "host:99999"}, "got host:99999; expected HOST:PORT"),
        ({"heartbeat_timeout": 1}, "heartbeat-timeout: got 1; expected at least 2"),
        ({"start_timeout": 0}, "start-timeout: got 0; expected at least 2"),
    ],
)
def test_refused_options_are_named(changed, told):
    with pytest.raises(ValueError, match=f"--cluster.*{told}"):
        Cluster(**WHOLE | changed)


def test_refused_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--cluster.num-processes", "2"])
    assert exited.value.code == 2
    told = capsys.readouterr().err
    assert "expected all three" in " ".join(told.replace("│", " ").split())
    assert "Traceback" not in told


def test_refused_where_jax_has_been_used_before(capsys):
    given = {name.replace("_", "-"): value for name, value in WHOLE.items()}
    assert main([f"--cluster.{name}={value}" for name, value in given.items()]) == 2
    assert "Refused: --cluster: jax.distributed" in capsys.readouterr().err


def test_without_a_cluster_a_process_is_alone():
    for cluster in (Cluster(), Cluster(num_processes=1)):
        cluster.join()
    assert agreed(lambda: [1]) == [1]


def arguments(out, **changed):
    options = {
        "out": out,
        "seeds": 1,
        "labels-per-class": 4,
        "steps": 12,
        "teacher-steps": 12,
        "evaluate-every": 6,
        "checkpoint-every": 4,
        **changed,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def compiled_in(cache):
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(out, cache, **changed):
    command = ["-m", "experiments.digits", *arguments(out, **changed)]
    folder = out.with_suffix(".printed")
    return Processes(command, 2, folder, **compiled_in(cache))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def newest(folder):
    steps = [int(each.name) for each in folder.glob("*") if each.name.isdigit()]
    return max(steps, default=0)


@pytest.mark.slow
def test_local_processes_do_the_whole_job_and_one_of_them_prints(tmp_path, cache):
    out = tmp_path / "out"
    script = ROOT / "experiments" / "tpu" / "local.sh"
    printed = subprocess.run(
        ["bash", script, "2", "experiments.digits", *arguments(out)],
        env=os.environ | {"PYTHON": sys.executable, "PORT": str(free_port())},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ran = subprocess.run(
        ["bash"], input=printed, env=os.environ | compiled_in(cache),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for number in range(1, 6):
        assert ran.stdout.count(f"student {number} of 5") == 1
    assert ran.stdout.count("Curves and pictures") == 1
    results = json.loads((out / "results.json").read_text())
    for runs in results["students"].values():
        assert 0 < runs[0]["scores"]["student_accuracy"] <= 1


@pytest.mark.slow
def test_sigterm_to_one_stops_all_with_143_and_they_go_on(tmp_path, cache):
    out = tmp_path / "out"
    saved = out / "teacher" / "checkpoints"
    long = {"teacher-steps": 3000, "checkpoint-every": 20}
    with start(out, cache, **long) as processes:
        while newest(saved) < 20:
            assert processes[0].poll() is None, processes.printed(0)
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        assert processes.statuses(120) == [143, 143]
        assert "saved. Run the same command" in processes.printed(0)
    step = newest(saved)
    assert 20 <= step < 3000
    with start(out, cache, **long) as processes:
        while newest(saved) <= step:
            assert processes[0].poll() is None, processes.printed(0)
            time.sleep(0.01)
        processes[0].send_signal(signal.SIGTERM)
        assert processes.statuses(120) == [143, 143]
        assert f"restored step {step}" in " ".join(processes.printed(0).split())


@pytest.mark.slow
def test_what_the_first_refuses_all_refuse(tmp_path, cache):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text('{"alpha": 7}')
    with start(out, cache) as processes:
        assert processes.statuses(120) == [2, 2]
        for number in range(2):
            assert "--alpha: 7 there, 0.1 now" in processes.printed(number)


def test_checkpoints_in_a_bucket_that_orbax_lacks_are_refused(capsys):
    assert main(["--out=s3://bucket/run"]) == 2
    assert "--out: got s3://bucket/run; expected a folder or gs://" in (
        capsys.readouterr().err
    )
