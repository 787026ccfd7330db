"""Llama and Qwen folders: read as Transformers reads them, written back, refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lm.model import from_layers, with_params
from experiments.lm.weights import load, read_config, save
from kdjax.io.weights import load_tensors, save_tensors
from tests.experiments.lm.test_model import CONFIG, QWEN, params_of
from tests.marks import rest_slow

REFERENCE = Path(__file__).parent / "reference"
MODELS = ("llama", "llama-3", "qwen-2", "qwen-3")

every_model = pytest.mark.parametrize(
    "name", rest_slow(MODELS, lambda name: name == "llama")
)


@functools.cache
def loaded(name):
    return load(REFERENCE / name)


@every_model
def test_logits_are_those_of_transformers(name):
    config, params = loaded(name)
    reference = np.load(REFERENCE / name / "logits.npz")

    @jax.jit
    def logits(params, tokens):
        return with_params(config, params)(tokens).logits()

    got = logits(params, reference["tokens"])
    np.testing.assert_allclose(got, reference["logits"], rtol=1e-4, atol=1e-4)
    assert np.abs(reference["logits"]).max() > 1


def test_between_them_the_references_have_all_there_is():
    configs = {name: loaded(name)[0] for name in MODELS}
    assert [configs[name].tied for name in MODELS] == [False, True, True, False]
    assert configs["llama"].key_value_heads == configs["llama"].heads
    assert configs["llama-3"].key_value_heads < configs["llama-3"].heads
    assert configs["llama-3"].rope_scaling is not None
    assert configs["qwen-2"].attention_bias
    assert configs["qwen-3"].query_key_norm
    assert configs["qwen-3"].head_width * configs["qwen-3"].heads != 16
    assert len(list((REFERENCE / "qwen-3").glob("model-*.safetensors"))) > 1


@every_model
def test_what_is_written_is_what_was_read(name, tmp_path):
    config, params = loaded(name)
    save(tmp_path, config, params)
    again, written = load(tmp_path)
    assert again == config
    chex.assert_trees_all_equal(written, params)
    # In the format's own terms too, but for a tied head, which need not be there.
    expected = load_tensors(REFERENCE / name)
    for tensor, array in load_tensors(tmp_path).items():
        np.testing.assert_array_equal(array, expected.pop(tensor))
    assert not expected


def test_a_student_of_some_layers_leaves_as_a_folder(tmp_path):
    config, params = from_layers(*loaded("llama"), [1])
    save(tmp_path / "student", config, params)
    again, written = load(tmp_path / "student")
    assert again == dataclasses.replace(loaded("llama")[0], layers=1)
    chex.assert_trees_all_equal(written, params)


def test_bfloat16_stays_bfloat16(tmp_path):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(CONFIG))
    save(tmp_path, config, params)
    again, written = load(tmp_path)
    assert again == config
    chex.assert_trees_all_equal(written, params)
    assert written["norm"]["scale"].dtype == jnp.bfloat16


def test_norms_and_biases_together_are_no_known_architecture(tmp_path):
    with pytest.raises(ValueError, match="query_key_norm, as Qwen 3, and attention_"):
        save(tmp_path, QWEN, params_of(QWEN))


def folder_like(name, path, tensors=None, **changed):
    """A copy with settings changed, or left out where None is given, and tensors."""
    shutil.copytree(REFERENCE / name, path, dirs_exist_ok=True)
    values = json.loads((path / "config.json").read_text()) | changed
    values = {key: value for key, value in values.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        save_tensors(path, tensors)
    return path


def test_settings_are_read_where_transformers_4_had_them(tmp_path):
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    folder = folder_like(
        "llama-3",
        tmp_path,
        rope_parameters=None,
        rope_theta=500_000.0,
        rope_scaling=scaling,
        dtype=None,
        torch_dtype="bfloat16",
    )
    expected = dataclasses.replace(loaded("llama-3")[0], dtype="bfloat16")
    assert read_config(folder) == expected


def test_what_follows_from_the_rest_may_be_there(tmp_path):
    tensors = load_tensors(REFERENCE / "qwen-2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    _, params = load(folder_like("qwen-2", tmp_path, tensors))
    chex.assert_trees_all_equal(params, loaded("qwen-2")[1])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2'; expected one of \['llama', 'q"),
        ({"model_type": None}, "lacks 'model_type'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"rms_norm_eps": None}, "lacks 'rms_norm_eps'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; this decoder has 'silu' alone"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"num_key_value_heads": 3}, "key_value_heads: got 3 for 4 heads"),
        ({"num_hidden_layers": "two"}, "not supported between"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; expected 'def"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
    ],
)
def test_a_config_of_something_else_is_refused(changed, match, tmp_path):
    folder = folder_like("llama", tmp_path, **changed)
    with pytest.raises(ValueError, match=match) as caught:
        load(folder)
    assert str(caught.value).count("config.json") == 1


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: without(t, DOWN), rf"missing: \['{DOWN}'\]; unexpected: none"),
        (lambda t: without(t, "lm_head.weight"), r"missing: \['lm_head.weight'\]"),
        (lambda t: t | {"score.weight": t[DOWN]}, r"unexpected: \['score.weight'\]"),
        (
            lambda t: t | {"model.layers.2.mlp.down_proj.weight": t[DOWN]},
            r"missing: none; unexpected: \['model.layers.2.mlp",
        ),
        (
            lambda t: t | {DOWN: t[DOWN].T},
            rf"{DOWN}: has shape \(24, 16\); expected \(16, 24\)",
        ),
        (
            lambda t: t | {"model.norm.weight": np.ones(15, np.float32)},
            r"model.norm.weight: has shape \(15,\); expected \(16,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, match, tmp_path):
    tensors = change(load_tensors(REFERENCE / "llama"))
    with pytest.raises(ValueError, match=match):
        load(folder_like("llama", tmp_path, tensors))


def test_a_head_that_is_not_the_tied_embedding_is_refused(tmp_path):
    tensors = load_tensors(REFERENCE / "qwen-2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match=r"differs from model.embed_tokens.weight"):
        load(folder_like("qwen-2", tmp_path, tensors))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: there is no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((REFERENCE / "llama/config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: there is no such"):
        load(tmp_path)
