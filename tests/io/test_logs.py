"""Writers, read back by what users would read them with."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdjax.io.logs import JsonLines, ProgressBar, TensorBoard


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_keep_full_precision_and_a_stable_order(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    log = JsonLines(path)
    log.write(1, {"b": 1 / 3, "a": np.float64(0.1)}, "train")
    log.write(2, {"a": 2}, "eval")
    log.close()
    assert path.read_text() == (
        '{"step": 1, "kind": "train", "a": 0.1, "b": 0.3333333333333333}\n'
        '{"step": 2, "kind": "eval", "a": 2.0}\n'
    )


def test_json_lines_are_valid_json_for_values_that_are_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.write(1, {"a": math.nan, "b": -math.inf, "c": np.float32("inf")}, "train")
    log.close()

    def refuse(word):
        raise AssertionError(word)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "kind": "train", "a": None, "b": None, "c": None}


def test_json_lines_leave_speed_out(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write(1, {"examples_per_second": 10.0}, "speed")
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("cut", ["", '{"step": 2, "ki', '{"step": 2, "kind": "train"}'])
def test_json_lines_rewind(tmp_path, cut):
    """Whole records up to the step stay; later ones and a cut one go."""
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in (1, 2, 3):
        log.write(step, {"a": step}, "train")
    log.close()
    with path.open("a") as file:
        file.write(cut)
    log = JsonLines(path)
    log.rewind(2)
    assert [record["step"] for record in lines(path)] == [1, 2]
    log.write(3, {"a": -1}, "train")
    log.flush()
    assert lines(path)[-1] == {"step": 3, "kind": "train", "a": -1.0}
    log.rewind(0)
    assert path.read_text() == ""
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_json_lines_rewind_to_the_end_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.write(1, {"a": 1.0}, "train")
    log.flush()
    before = path.stat()
    log.rewind(1)
    log.close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


def curves(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_hides_what_was_rewound(tmp_path):
    log = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0}, "train")
    log.write(3, {"accuracy": 0.5}, "eval")
    log.close()
    log = TensorBoard(tmp_path)
    log.rewind(2)
    log.write(3, {"loss": 2.0}, "train")
    log.flush()
    log.close()
    found = curves(tmp_path)
    assert found["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert found.get("eval/accuracy", []) == []


def test_tensorboard_writes_no_file_before_the_first_record(tmp_path):
    log = TensorBoard(tmp_path / "events")
    log.rewind(0)
    log.flush()
    log.close()
    assert not (tmp_path / "events").exists()


def test_progress_bar_shows_loss_fidelity_and_speed():
    screen = io.StringIO()
    bar = ProgressBar(20, console=Console(file=screen, width=200, force_terminal=True))
    bar.write(10, {"loss": 0.25, "kl": 3.0}, "train")
    bar.write(10, {"agreement": 0.875}, "eval")
    bar.write(10, {"examples_per_second": 1234.0, "step_ms_p50": 2.0}, "speed")
    bar.write(10, {"model_flops_utilization": 0.5}, "speed")
    bar.flush()
    bar.close()
    shown = screen.getvalue()
    for text in ("10/20", "loss 0.25", "agreement 0.875", "examples_per_second 1234"):
        assert text in shown
    assert "model_flops_utilization 0.5" in shown
    assert "kl" not in shown


def test_progress_bar_rewinds():
    screen = io.StringIO()
    bar = ProgressBar(20, console=Console(file=screen, width=160, force_terminal=True))
    bar.rewind(7)
    bar.flush()
    bar.close()
    assert "7/20" in screen.getvalue().replace(" ", "")
