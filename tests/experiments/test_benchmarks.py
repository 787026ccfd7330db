"""The benchmarks compare like with like, and run. No time is asserted on."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    cores,
    driver,
    forms,
    linear_head,
    losses,
    report,
    step,
    traffic,
)
from experiments.benchmarks.inputs import LOSSES, draw


@pytest.mark.parametrize("name", LOSSES)
def test_both_forms_agree(name):
    inputs = draw(8, 50)
    value, gradient = jax.jit(forms.mean_and_gradient(forms.KDJAX[name]))(*inputs)
    expected = jax.jit(forms.mean_and_gradient(forms.OPTAX[name]))(*inputs)
    # Optax's forms are differences of logarithms near 10: a few units of 1e-7 each.
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)


def test_inputs_are_the_same_for_every_process():
    for one, other in zip(draw(4, 10), draw(4, 10), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_both_steps_do_the_same():
    size = step.SIZES["tiny"]
    sides = [step.with_kdjax(size), step.by_hand(size)]
    shown = []
    for setup in sides:
        state, metrics = setup.state, {}
        for _ in range(5):
            state, metrics = setup.step(state, setup.frozen, setup.batch)
        shown.append({name: float(mean.value()) for name, mean in metrics.items()})
    # The same programs up to the order of additions.
    assert shown[0] == pytest.approx(shown[1], rel=1e-5)


def test_all_loops_take_the_same_steps():
    sides = driver.Sides(arrays=9, steps=2)
    samples = sides.samples(repeats=1)
    assert {name: len(taken) for name, taken in samples.items()} == {
        "fit": 1,
        "placed": 1,
        "jit": 1,
    }
    # One run before the round, then there and back.
    states = sides.states
    assert {name: int(state.step) for name, state in states.items()} == {
        "fit": 6,
        "placed": 6,
        "jit": 6,
    }
    assert len(jax.tree.leaves(states["fit"].opt_state)) == 7


def test_sides_are_run_in_turns():
    order = []

    def run(name):
        order.append(name)
        return report.Sample(float(len(order)), 2.0)

    runs = {name: lambda name=name: run(name) for name in "ab"}
    samples = report.interleaved(runs, repeats=2)
    # One run before the first round, then there and back.
    assert order == list("ab" + "abba" + "abba")
    means = [4.5, 8.5]
    assert samples == {
        name: [report.Sample(mean, 2.0) for mean in means] for name in "ab"
    }


def test_sides_are_compared_two_by_two():
    order = []

    def run(name, wall):
        order.append(name)
        return report.Sample(wall, wall)

    walls = {"kdjax": 2.0, "a": 4.0, "b": 1.0}
    ours, *others = (lambda name=name: run(name, walls[name]) for name in walls)
    others = dict(zip("ab", others, strict=True))
    figures = [*report.beside(1, "", "", ours, others, {"a": 0.7})]
    assert order == [
        *("kdjax", "a", "kdjax", "a", "a", "kdjax"),
        *("kdjax", "b", "kdjax", "b", "b", "kdjax"),
    ]
    found = [(each.against, each.measure, each.ratio, each.met) for each in figures]
    assert found == [
        ("a", "time", 0.5, True),
        ("a", "core time", 0.5, None),
        ("b", "time", 2.0, None),
        ("b", "core time", 2.0, None),
    ]


def test_ratio_is_of_neighbouring_runs():
    ours = [report.Sample(1.0, 1.0), report.Sample(2.0, 1.0), report.Sample(9.0, 1.0)]
    theirs = [report.Sample(2.0, 1.0), report.Sample(4.0, 1.0), report.Sample(9.0, 1.0)]
    time, core = report.compared("", "", "", ours, theirs, target=0.7)
    assert (time.ratio, time.met) == (0.5, True)
    assert (core.ratio, core.met) == (1.0, None)


@pytest.mark.parametrize(
    ("flags", "vectors", "bits"),
    [
        ("fma avx2 avx512f ssse3", "widest", 512),
        ("fma avx2 ssse3", "widest", 256),
        ("fma avx2 avx512f ssse3", "default", 256),
    ],
)
def test_programs_may_use_the_vectors_that_there_are(
    flags, vectors, bits, tmp_path, monkeypatch
):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags} \n")
    monkeypatch.setattr(cores, "CPUINFO", cpuinfo)
    assert f"vectors of {bits} bits" in cores.described(vectors)
    program = cores.compiled(jnp.negative, jnp.ones(3), vectors=vectors)
    assert program(jnp.ones(3)).tolist() == [-1.0] * 3


@pytest.mark.slow
def test_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traffic, "available", lambda: False)
    tiny = {"tiny": step.SIZES["tiny"]._replace(steps=2)}
    monkeypatch.setattr(step.figures, "__defaults__", (tiny,))
    path = tmp_path / "figures.json"
    config = losses.Config(tokens=4, vocabulary=16, repeats=2, json=path)
    figures = losses.main(config)
    printed = capsys.readouterr().out
    assert "traffic: skipped" in printed
    for name in LOSSES:
        assert name in printed
    saved = json.loads(path.read_text())
    assert len(saved["figures"]) == len(figures) == len(LOSSES) * 3 + 3
    # The same figures once more, for a README.
    report.show(figures, ["a note"], markdown=True)
    printed = capsys.readouterr().out
    assert "| " + " | ".join(report.HEADER) + " |" in printed
    assert all(" | ".join(figure.cells()) in printed for figure in figures)
    assert printed.endswith("targets met\n")


@pytest.mark.slow
def test_linear_head_runs(capsys, monkeypatch):
    monkeypatch.setattr(traffic, "available", lambda: False)
    small = {"vocabulary": 16, "large_vocabulary": 24, "width": 4}
    config = linear_head.Config(
        tokens=4, **small, repeats=1, losses=("knowledge_distillation",), chunk_size=3
    )
    # Both sides are compared before they are timed.
    assert len(linear_head.main(config)) == 2 * 5
    assert "slice: skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="losses: got"):
        linear_head.Config(losses=("forward",))


def test_a_python_without_torch_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    config = losses.Config(tokens=2, vocabulary=4, repeats=1, torch=python)
    with pytest.raises(RuntimeError, match="gave up"):
        list(losses.of_losses(config))


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"repeats": 0}, {"slice_vocabulary": 40}, {"torch": "/none"}],
)
def test_refuses_wrong_options(wrong):
    (name,) = wrong
    if name == "torch":
        wrong = {name: losses.Path(wrong[name])}
    with pytest.raises(ValueError, match=name):
        losses.Config(**wrong)


@pytest.mark.skipif(not traffic.available(), reason="libtpu is not installed")
def test_traffic_on_a_slice():
    shape = 256, 2048
    figures = list(traffic.figures(*shape, losses=("forward_kl",)))
    assert len(figures) == len(traffic.LAYOUTS) * 3
    gathered = [figure for figure in figures if figure.measure.startswith("gathered")]
    assert all(figure.met for figure in gathered)


def test_command_line(capsys):
    with pytest.raises(SystemExit):
        losses.tyro.cli(losses.Config, args=["--only", "nothing"])
    assert "nothing" in capsys.readouterr().err
    assert "torch" not in sys.modules
