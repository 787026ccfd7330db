"""The step of the language models, compiled for meshes and slices beforehand."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.lm import preflight as lm
from experiments.lm.weights import read_config
from kdjax.tools import preflight
from kdjax.tools.preflight import Levers
from kdjax.tools.preflight._command import main

ROOT = Path(__file__).parents[3]

# What differs by tokenizer is left out.
SMALL = {
    "model_type": "llama",
    "vocab_size": 7 * 1024,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 512,
    "rms_norm_eps": 1e-5,
}
ROWS, CONTEXT = 16, 256

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A student and a teacher that are folders, as Hugging Face has them."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, changed in (("student", {}), ("teacher", {"num_hidden_layers": 5})):
        (folder / name).mkdir()
        text = json.dumps(SMALL | changed)
        (folder / name / "config.json").write_text(text)
    return lm.Options(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        batch_size=ROWS,
        context=CONTEXT,
    )


def product_flops(options):
    """Of one row: of the student with its gradients, and of the teacher.

    Two for each number that a token is multiplied with, and of its attention to all
    tokens; twice as much again backward.
    """

    def forward(folder):
        shape = read_config(Path(folder))
        attention = 4 * shape.width * shape.heads * shape.head_width
        dense = 3 * shape.width * shape.mlp_width
        scores = 2 * CONTEXT * shape.heads * shape.head_width
        layers = shape.layers * (attention + dense + scores)
        # The last token of a row has no next one.
        head = shape.width * shape.vocabulary * (CONTEXT - 1)
        return 2 * (layers * CONTEXT + head)

    return 3 * forward(options.student), forward(options.teacher)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_slice_does_the_products_that_the_shapes_ask_for(options, accumulate):
    mesh = preflight.slice_mesh("v5e:4x4", {"fsdp": 4, "tensor": 4})
    levers = Levers(teacher_dtype="bfloat16", accumulate=accumulate)
    report = preflight.check(lm.plan(options, mesh, levers), mesh)
    student, teacher = product_flops(options)
    assert report.costs.teacher_flops * 16 == pytest.approx(teacher * ROWS, rel=0.01)
    assert report.costs.student_flops * 16 == pytest.approx(student * ROWS, rel=0.01)
    assert report.gathered(SMALL["vocab_size"]) == []
    assert report.costs.unknown_loops == 0
    assert report.fits
    assert set(report.seconds) == {"products", "memory traffic", "links"}


@needs_libtpu
@pytest.mark.slow
def test_four_times_as_many_chips_do_four_times_as_much(options):
    small, large = (
        preflight.check(
            lm.plan(given, mesh, Levers(teacher_dtype="bfloat16", remat=True)), mesh
        )
        for given, mesh in (
            (options, preflight.slice_mesh("v5e:4x4", {"fsdp": 4, "tensor": 4})),
            (
                dataclasses.replace(options, batch_size=4 * ROWS),
                preflight.slice_mesh("v5e:8x8", {"fsdp": 16, "tensor": 4}),
            ),
        )
    )
    assert large.costs.flops == pytest.approx(small.costs.flops, rel=0.01)
    assert large.costs.traffic == pytest.approx(small.costs.traffic, rel=0.1)


@needs_libtpu
@pytest.mark.slow
def test_a_billion_parameters_learn_from_eight():
    mesh = preflight.slice_mesh("v5e:16x16", {"fsdp": 32, "tensor": 8})
    levers = Levers(teacher_dtype="bfloat16", accumulate=8, remat=True)
    report = preflight.check(lm.plan(lm.Options(), mesh, levers), mesh)
    assert report.fits
    assert report.gathered(128_256) == []
    # 32 layers with attention to 4096 tokens, and the head, for as many on each chip.
    layer = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336 + 2 * 4096 * 4096
    teacher = 2 * 4096 * (32 * layer + 4096 * 128_256)
    assert report.costs.teacher_flops == pytest.approx(teacher, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measured as Linux does"
)
@pytest.mark.parametrize("devices", [1, 4])
def test_the_memory_foretold_is_what_a_step_takes(devices):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.tools.memory_run", str(devices)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["forecast"] == pytest.approx(found["taken"], rel=0.1)


@pytest.mark.slow
def test_the_command_line_says_what_a_step_takes(options, tmp_path, capsys):
    given = ["--student", options.student, "--teacher", options.teacher]
    size = ["--batch-size", "8", "--context", "16"]
    picture = tmp_path / "memory.png"
    levers = ["--teacher-dtype", "bfloat16", "--remat", "--picture", str(picture)]
    assert main(["experiments.lm", *levers, "--", *given, *size]) == 0
    told = capsys.readouterr().out
    for text in ("student", "optimizer", "teacher", "peak memory", "all-reduce"):
        assert text in told
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compiled_is_refused(capsys):
    for arguments, told in (
        (["experiments.nowhere"], "No module named"),
        (["experiments.lm", "--mesh", "data=3"], "is for 3 devices, but there are 8"),
        (["experiments.lm", "--topology", "v5e:3x5"], "topology: got 'v5e:3x5'"),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
    for arguments, told in (
        (["--mesh", "data"], "expected sizes by name, such as data=32,tensor=8"),
        (["--", "--method", "gkd"], "--method: got 'gkd'; expected one of forward_kl"),
    ):
        with pytest.raises(SystemExit) as exited:
            main(["experiments.lm", *arguments])
        assert exited.value.code == 2
        assert told in " ".join(capsys.readouterr().err.split())
