"""Checkpoints: bit-equal, kept by number and score, and never wrong when damaged."""

import json
import logging
import os
import shutil
import subprocess
import sys
from operator import attrgetter

import jax
import jax.numpy as jnp
import pytest

from kdjax.io.checkpoints import Checkpoints
from tests.io.states import bits, cut, data, make_state, save
from tests.marks import rest_slow


@pytest.fixture
def opened():
    made = []

    def make(*args, **options):
        made.append(Checkpoints(*args, **options))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close()


def test_everything_comes_back_bit_for_bit(tmp_path, opened):
    state, progress = save(opened(tmp_path, config={"lr": 0.1}), 7)
    iterator = data()
    again = opened(tmp_path, config={"lr": 0.1})
    restored, kept = again.restore(make_state(0), iterator)
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.rng.dtype == state.rng.dtype
    assert kept == progress
    assert iterator.get_state() == {"next_index": 7}


def test_an_empty_folder_has_nothing_to_restore(tmp_path, opened):
    iterator = data()
    next(iterator)
    assert opened(tmp_path / "new").restore(make_state(), iterator) is None
    assert iterator.get_state() == {"next_index": 1}


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path, opened):
    destroy = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0
    )
    make = lambda: {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}  # noqa: E731
    expected, state = bits(make()), make()
    checkpoints, iterator = opened(tmp_path), data()
    checkpoints.save(1, state, iterator, {}, None)
    next(iterator)
    for _ in range(5):
        state = destroy(state)
    restored, _ = checkpoints.restore(state, iterator)
    assert bits(restored) == expected
    assert iterator.get_state() == {"next_index": 0}


def test_shardings_are_the_templates(tmp_path, opened):
    """Saved from one device and restored to four, in a process that has them."""
    script = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kdjax.io.checkpoints import Checkpoints
from kdjax.io.input import batches
data = batches({{"x": np.arange(40)}}, batch_size=4, seed=0)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
template = {{"w": jax.device_put(jnp.zeros((8, 2)), sharding)}}
checkpoints = Checkpoints({str(tmp_path)!r})
restored, _ = checkpoints.restore(template, data)
checkpoints.close()
assert restored["w"].sharding == sharding
np.testing.assert_array_equal(restored["w"], np.arange(16.0).reshape(8, 2))
"""
    checkpoints = opened(tmp_path)
    checkpoints.save(1, {"w": jnp.arange(16.0).reshape(8, 2)}, data(), {}, None)
    checkpoints.wait()
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_the_last_and_the_best_stay(tmp_path, opened, mode, best):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: None, 6: 0.5, 7: 0.4}
    # Opened anew for each save: the scores have to be read from the checkpoints.
    for step, score in scores.items():
        checkpoints = opened(tmp_path, keep=2, best="acc", mode=mode)
        save(checkpoints, step, None if score is None else {"acc": score})
    assert checkpoints.steps() == [best, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == [
        str(step) for step in (best, 6, 7)
    ]


@pytest.mark.parametrize(
    ("saved", "current", "match"),
    [
        ({"lr": 0.1}, {"lr": 0.2}, "  lr: checkpoint has 0.1, this run has 0.2"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "  a/b/1: checkpoint has 2, this"),
        ({"a": None}, {"a": 1}, "  a: checkpoint has null, this run has 1"),
        ({}, {"name": "x"}, '  name: checkpoint has nothing, this run has "x"'),
        ({"name": "x"}, {}, '  name: checkpoint has "x", this run has nothing'),
    ],
)
def test_another_configuration_is_refused(tmp_path, opened, saved, current, match):
    save(opened(tmp_path, config=saved), 1)
    opened(tmp_path, config=saved).restore(make_state(), data())
    iterator = data()
    with pytest.raises(ValueError, match=match) as refused:
        opened(tmp_path, config=current).restore(make_state(), iterator)
    assert str(tmp_path / "1") in str(refused.value)
    assert iterator.get_state() == {"next_index": 0}
    assert (tmp_path / "1").exists()


def test_tuples_in_a_configuration_are_lists(tmp_path, opened):
    save(opened(tmp_path, config={"sizes": (1, 2)}), 1)
    again = opened(tmp_path, config={"sizes": (1, 2)})
    assert again.restore(make_state(), data()) is not None


def test_another_state_is_refused_by_path(tmp_path, opened):
    checkpoints, iterator = opened(tmp_path), data()
    saved = {"a": jnp.zeros(3), "b": jnp.zeros(2), "k": jax.random.key(0)}
    checkpoints.save(1, saved, iterator, {}, None)
    template = {"a": jnp.zeros((3, 1)), "c": jnp.int32(0), "k": jnp.zeros(2)}
    with pytest.raises(ValueError, match="state: the checkpoint") as refused:
        checkpoints.restore(template, iterator)
    for line in (
        "a: checkpoint has float32[3], this run has float32[3,1]",
        "b: checkpoint has float32[2], this run has nothing",
        "c: checkpoint has nothing, this run has int32[]",
        "k: checkpoint has key<fry>[], this run has float32[2]",
    ):
        assert f"  {line}\n" in str(refused.value)


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with steps 1 and 2, and what they hold."""
    folder = tmp_path_factory.mktemp("two") / "run"
    checkpoints = Checkpoints(folder, config={"lr": 0.1})
    held = {step: save(checkpoints, step, {"acc": 0.5}) for step in (1, 2)}
    checkpoints.close()
    return folder, held


@pytest.mark.parametrize(
    "damage",
    rest_slow(
        [cut, delete, empty, flip],
        lambda damage: damage is flip,
        name=attrgetter("__name__"),
    ),
)
def test_no_damage_to_any_file_gives_wrong_numbers(
    tmp_path, two_checkpoints, damage, caplog
):
    """Damages each file of the newest checkpoint in turn.

    Each time either its values come back, bit for bit, or those of the one before
    with a warning, the damaged one lies aside, and its step can be saved again.
    """
    folder, held = two_checkpoints
    files = [
        path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file()
    ]
    assert len(files) > 10
    fallen_back = 0
    for number, file in enumerate(sorted(files)):
        copy = tmp_path / f"{number}"
        shutil.copytree(folder, copy)
        damage(copy / file)
        caplog.clear()
        checkpoints = Checkpoints(copy, config={"lr": 0.1})
        iterator = data()
        restored, progress = checkpoints.restore(make_state(0), iterator)
        step = int(restored.step)
        state, kept = held[step]
        assert bits(restored) == bits(state), file
        assert (progress, iterator.get_state()) == (kept, {"next_index": step}), file
        if step == 1:
            fallen_back += 1
            (warning,) = (r for r in caplog.records if r.name == "kdjax")
            assert warning.levelno == logging.WARNING
            assert str(copy / "2") in warning.getMessage()
            # A changed list of checksums accuses another file.
            if damage is not flip or file.name != "checksums.json":
                assert str(file.relative_to("2")) in warning.getMessage()
            assert len(list((copy / "unreadable").iterdir())) == 1
            save(checkpoints, 2)
            assert checkpoints.steps() == [1, 2]
        checkpoints.close()
        shutil.rmtree(copy)
    assert fallen_back > 10


def test_with_every_checkpoint_damaged_the_run_starts_anew(
    tmp_path, two_checkpoints, opened, caplog
):
    shutil.copytree(two_checkpoints[0], tmp_path / "run")
    for step in (1, 2):
        empty(tmp_path / "run" / str(step) / "run" / "metadata")
    checkpoints, iterator = opened(tmp_path / "run"), data()
    assert checkpoints.restore(make_state(), iterator) is None
    assert iterator.get_state() == {"next_index": 0}
    assert len(caplog.records) == 2
    assert len(list((tmp_path / "run" / "unreadable").iterdir())) == 2
    save(checkpoints, 1)
    # A second one of the same step finds its place beside the first.
    delete(tmp_path / "run" / "1" / "progress" / "metadata")
    assert checkpoints.restore(make_state(), iterator) is None
    assert len(list((tmp_path / "run" / "unreadable").iterdir())) == 3


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path, opened):
    checkpoints = opened(tmp_path)
    state, _ = save(checkpoints, 1)
    # What Orbax writes to until a checkpoint is complete.
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    again = opened(tmp_path)
    restored, _ = again.restore(make_state(), data())
    assert bits(restored) == bits(state)
    save(again, 2)
    assert again.steps() == [1, 2]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_is_named_at_once(tmp_path, below):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / below
    with pytest.raises(
        OSError, match=r"folder: cannot write to .*file.*choose another"
    ):
        Checkpoints(folder)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"keep": 0}, ValueError, "keep: got 0; expected at least 1"),
        ({"mode": "best"}, ValueError, "mode: got 'best'; expected 'max' or 'min'"),
        ({"config": {"f": print}}, TypeError, "config: got .*values that JSON can"),
    ],
)
def test_options_are_checked(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        Checkpoints(tmp_path, **options)


def test_the_folder_tells_the_config_in_plain_json(tmp_path, opened):
    checkpoints = opened(tmp_path, config={"lr": 0.1})
    save(checkpoints, 3, {"student_accuracy": 0.5})
    run = json.loads((tmp_path / "3" / "run" / "metadata").read_text())
    assert run["config"] == {"lr": 0.1}
    assert run["metrics"] == {"student_accuracy": 0.5}
    assert run["arrays"]["params/student/kernel"] == "float32[5,3]"
