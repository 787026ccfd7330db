"""Folders of safetensors: in one file or in shards; what is broken is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.io.weights import load_json, load_tensors, save_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asarray(jnp.array([1.5, -2.0], jnp.bfloat16)),
    "c": np.array([7], np.int64),
}


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor)


def shards(folder, **weight_map):
    """Two files and their index."""
    for index, names in enumerate((("a",), ("b", "c")), start=1):
        save_tensors(folder, {name: TENSORS[name] for name in names})
        (folder / "model.safetensors").rename(folder / f"{index}.safetensors")
    index = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    text = json.dumps({"weight_map": index | weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_what_is_written_is_read(tmp_path):
    save_tensors(tmp_path / "new" / "folder", TENSORS)
    assert_equal(load_tensors(tmp_path / "new" / "folder"), TENSORS)


def test_a_number_stays_one(tmp_path):
    save_tensors(tmp_path, {"logit_scale": np.float32(4.6)})
    assert load_tensors(tmp_path)["logit_scale"].shape == ()


def test_transposed_arrays_are_written_as_they_read(tmp_path):
    save_tensors(tmp_path, {"a": TENSORS["a"].T, "b": jnp.ones((2, 2)).T})
    assert_equal(
        load_tensors(tmp_path), {"a": TENSORS["a"].T, "b": np.ones((2, 2), np.float32)}
    )


def test_shards_are_put_together(tmp_path):
    assert_equal(load_tensors(shards(tmp_path)), TENSORS)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_named(kept, tmp_path):
    save_tensors(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors: is damaged or was not"):
        load_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    (shards(tmp_path) / "2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2.safetensors: there is no such f"):
        load_tensors(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"1.safetensors: lacks \['d'\], which model"):
        load_tensors(shards(tmp_path, d="1.safetensors"))


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "is no JSON"), ("[]", "holds a list"), ("{}", "has no 'weight_map'")],
)
def test_an_index_that_is_none_is_named(text, match, tmp_path):
    (shards(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"index.json: {match}"):
        load_tensors(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder has nothing"):
        load_json(tmp_path / "config.json")
