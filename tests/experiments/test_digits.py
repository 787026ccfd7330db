"""The main job: what it writes and refuses, and that killing it changes nothing."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.digits.config import Config
from experiments.digits.data import load, shift
from experiments.digits.kinds import KINDS
from experiments.digits.main import main
from experiments.digits.model import student_net, teacher_net
from experiments.jobs.data import hide_labels, labelled_only
from experiments.jobs.interruption import Interrupted, Sigterm
from kdjax import losses

ROOT = Path(__file__).parents[2]

TINY = {
    "seeds": 1,
    "labels-per-class": 3,
    "steps": 12,
    "teacher-steps": 12,
    "evaluate-every": 6,
    "checkpoint-every": 4,
}

RUNS = ["teacher", *(f"{kind.name}/seed-0" for kind in KINDS)]


def arguments(out, **changed):
    options = TINY | {name.replace("_", "-"): value for name, value in changed.items()}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [f"--out={out}", *given]


def start(out, cache, **changed):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.digits", *arguments(out, **changed)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A folder with all runs, and what was printed."""
    out = tmp_path_factory.mktemp("digits") / "out"
    return out, finish(start(out, cache))


def arrays(run):
    """All that the last checkpoint of a run holds, as bytes by path."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(run / "checkpoints" / "12" / "state")
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if "rng" in jax.tree_util.keystr(path) else leaf
        ).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same(out, expected):
    for run in RUNS:
        for name in ("metrics.jsonl", "test_logits.npy"):
            there = (expected / run / name).read_bytes()
            assert (out / run / name).read_bytes() == there, (run, name)
        assert arrays(out / run) == arrays(expected / run), run


def test_the_parts_share_no_image_and_every_class_is_spread_evenly():
    parts = load()
    counts = [np.bincount(part["label"]) for part in parts]
    assert sum(map(sum, counts)) == 1797
    whole = sum(counts)
    for count, share in zip(counts, (0.6, 0.2, 0.2), strict=True):
        assert np.all(np.abs(count - share * whole) <= 1)
    # scikit-learn's set holds no image twice.
    images = np.concatenate([part["x"].reshape(-1, 64) for part in parts])
    assert len(np.unique(images, axis=0)) == 1797


def test_labels_are_hidden_but_for_so_many_per_class():
    train = load().train
    few = hide_labels(train, 3, seed=1)
    kept = labelled_only(few)
    assert np.bincount(kept["label"]).tolist() == [3] * 10
    assert set(few["label"]) == {losses.UNSCORED, *range(10)}
    shown = few["label"] >= 0
    np.testing.assert_array_equal(few["label"][shown], train["label"][shown])
    other = hide_labels(train, 3, seed=2)["label"]
    assert (other != few["label"]).any()


def test_a_shift_moves_by_the_bits_of_its_example():
    x = np.zeros((2, 8, 8, 1), np.float32)
    x[:, 3, 3] = 1
    # bits % 3 is 1 for the row, bits // 3 % 3 for the column; 1 is the middle.
    moved = shift({"x": x}, np.array([4, 0], np.uint64))["x"]
    assert moved[0, 3, 3, 0] == 1
    assert moved[1, 4, 4, 0] == 1
    assert moved.sum() == 2


def test_the_student_has_at_most_a_twentieth_of_the_parameters():
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(net.params))
        for net in (teacher_net(0), student_net(0))
    ]
    assert sizes == [58_634, 1_898]
    assert 20 * sizes[1] <= sizes[0]


def test_table_page_and_numbers(finished):
    out, printed = finished
    assert printed.count("distilled") >= 5
    assert "58,634" in printed
    table = (out / "results.md").read_text()
    assert len(table.splitlines()) == 2 + len(RUNS)
    results = json.loads((out / "results.json").read_text())
    assert set(results["students"]) == {kind.name for kind in KINDS}
    for runs in results["students"].values():
        assert 0 <= runs[0]["scores"]["student_accuracy"] <= 1
        assert runs[0]["parameters"] == 1_898
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "3 each" in page


def test_the_metrics_file_holds_no_times(finished):
    out, _ = finished
    lines = (out / "few-distilled" / "seed-0" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    assert {record["kind"] for record in records} == {"train", "eval"}
    assert not [name for record in records for name in record if "second" in name]


def test_started_again_it_reads_the_results_and_trains_nothing(finished, capsys):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*")}
    assert main(arguments(out)) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/**/*")}


@pytest.mark.slow
def test_more_devices_and_a_loaded_teacher(finished, tmp_path, capsys):
    # This process has eight devices; the other had one.
    assert jax.device_count() == 8
    teacher = finished[0] / "teacher"
    changed = {"labels_per_class": 2, "trace_steps": 1}
    assert main(arguments(tmp_path, teacher=teacher, **changed)) == 0
    traces = list(tmp_path.rglob("few-alone/seed-0/trace/**/*.xplane.pb"))
    assert len(traces) == 1
    expected = np.load(teacher / "test_logits.npy")
    logits = np.load(tmp_path / "teacher" / "test_logits.npy")
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert "2 each" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    out, _ = finished
    assert main(arguments(out, temperature=2.0, steps=13)) == 2
    told = capsys.readouterr().err
    assert "--temperature: 4.0 there, 2.0 now" in told
    assert "--steps: 12 there, 13 now" in told
    assert "--alpha" not in told


def test_another_teacher_in_the_same_folder_is_refused(finished, capsys):
    out, _ = finished
    assert main(arguments(out, teacher=out / "teacher")) == 2
    told = capsys.readouterr().err
    assert re.search(r"--teacher: trained here there, weights [0-9a-f]{8} now", told)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seeds", "0"),
        ("steps", "-1"),
        ("temperature", "0"),
        ("temperature", "nan"),
        ("alpha", "2"),
        ("learning-rate", "inf"),
        ("batch-size", "many"),
        ("sead", "1"),
    ],
)
def test_refused_options_are_named(option, value, capsys):
    with pytest.raises(SystemExit) as exited:
        main([f"--{option}", value])
    assert exited.value.code == 2
    told = capsys.readouterr().err
    assert f"--{option}" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("labels-per-class", "500", r"got 500; expected 1 to \d+"),
        ("batch-size", "30", "multiple of the 8 device"),
        ("batch-size", "8000", "got 8000; .* at most 1"),
        ("teacher", "nowhere", "found no checkpoint in nowhere"),
        ("trace-steps", "-1", "got -1; expected a whole number of at least 0"),
    ],
)
def test_refused_before_anything_is_trained(option, value, told, tmp_path, capsys):
    assert main([f"--out={tmp_path / 'out'}", f"--{option}", value]) == 2
    errors = capsys.readouterr().err
    assert f"--{option}: " in errors
    assert re.search(told, errors)
    assert not (tmp_path / "out").exists()
    assert not Path("nowhere").exists()


def test_a_file_as_output_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([f"--out={tmp_path / 'file'}"]) == 2
    assert "--out: cannot use" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_teacher_of_another_architecture_is_refused(finished, tmp_path, capsys):
    student = finished[0] / "few-alone" / "seed-0"
    assert main([f"--out={tmp_path}", f"--teacher={student}"]) == 2
    told = capsys.readouterr().err
    assert "--teacher: " in told
    assert "params/student/conv1/kernel" in told


def test_every_option_has_a_help_line(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    for name in vars(Config()):
        option = "--" + name.replace("_", "-")
        assert re.search(rf"{option}\b.*(\n.*?)*?default", shown), option


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


@pytest.mark.slow
def test_terminated_and_killed_it_ends_the_same(finished, tmp_path, cache):
    process = start(tmp_path, cache)
    wait_for(tmp_path / RUNS[1] / "checkpoints" / "4", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "Run the same command to continue." in output

    process = start(tmp_path, cache)
    wait_for(tmp_path / RUNS[3] / "checkpoints" / "8", process)
    process.kill()
    process.communicate()

    assert "student 1 of 3" in finish(start(tmp_path, cache))
    assert_same(tmp_path, finished[0])


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_the_same(finished, tmp_path, cache):
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        process = start(tmp_path, cache)
        done = sum((tmp_path / run / "result.json").exists() for run in RUNS)
        # Anywhere in what is left, with imports before it.
        seconds = rng.uniform(2, 8 if done else 25)
        try:
            process.communicate(timeout=seconds)
            break  # it got to the end
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    finish(start(tmp_path, cache))
    assert_same(tmp_path, finished[0])


def test_a_sigterm_that_a_training_keeps_to_itself_is_noticed():
    before = signal.getsignal(signal.SIGTERM)
    with Sigterm() as sigterm:
        sigterm.check()
        # As fit does, whose last step a SIGTERM does not interrupt.
        own = signal.signal(signal.SIGTERM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, own)
        with pytest.raises(Interrupted):
            sigterm.check()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
