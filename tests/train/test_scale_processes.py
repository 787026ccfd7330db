"""The same losses and parameters by several processes as by one."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.processes import Processes
from tests.train import scale
from tests.train.test_scale import alone, assert_same

SCRIPT = Path(__file__).with_name("scale_run.py")


def loaded(path):
    with np.load(path) as file:
        by_part = lambda part: [  # noqa: E731
            file[f"{part}.{index}"]
            for index in range(sum(name.startswith(part) for name in file))
        ]
        return scale.Run(file["losses"], by_part("params"), by_part("statistics"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "cases"),
    [
        (2, 1, [("jit", {"data": 2}, "float64"), ("pmap", {"data": 2}, "float64")]),
        (2, 2, [("jit", {"fsdp": 2, "tensor": 2}, "float64"),
                ("shard_map", {"data": 4}, "float64")]),
        (2, 4, [("jit", {"data": 2, "fsdp": 2, "tensor": 2}, "float64"),
                ("jit", {"data": 8}, "float32")]),
        (4, 1, [("jit", {"fsdp": 4}, "float64"),
                ("shard_map", {"fsdp": 4}, "float64"),
                # Each two processes have the same examples.
                ("jit", {"fsdp": 2, "tensor": 2}, "float64")]),
        (4, 2, [("jit", {"fsdp": 4, "tensor": 2}, "float64"),
                ("pmap", {"data": 8}, "float64"),
                ("jit", {"fsdp": 8}, "float32")]),
    ],
    ids=["2x1", "2x2", "2x4", "4x1", "4x2"],
)  # fmt: skip
def test_processes(tmp_path, processes, devices, cases):
    command = [SCRIPT, f"--out={tmp_path}", f"--cases={json.dumps(cases)}"]
    with Processes(command, processes, tmp_path, devices=devices) as started:
        started.finish()
    for number, (_, _, dtype) in enumerate(cases):
        assert_same(
            loaded(tmp_path / f"{number}.npz"), alone(np.dtype(dtype)), np.dtype(dtype)
        )
