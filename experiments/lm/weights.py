"""Llama and Qwen folders of Hugging Face's format: config.json and safetensors."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.lm.model import Decoder, DecoderConfig
from experiments.lm.rotary import RopeScaling
from kdjax.io.files import write_whole
from kdjax.io.weights import load_json, load_tensors, save_tensors
from kdjax.types import PyTree

_CONFIG_FILE = "config.json"

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Settings of which the decoder knows one value.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}

# Of the scaling of rotary positions, in the order of RopeScaling.
_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)

# What the format calls the parameters of the decoder: those it has once, ...
_NAMES = {
    ("embedding", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}
# ... and those of each layer, whose parameters the decoder stacks.
_LAYER_NAMES = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "query", "kernel"): "self_attn.q_proj.weight",
    ("attention", "query", "bias"): "self_attn.q_proj.bias",
    ("attention", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "key", "kernel"): "self_attn.k_proj.weight",
    ("attention", "key", "bias"): "self_attn.k_proj.bias",
    ("attention", "key_norm", "scale"): "self_attn.k_norm.weight",
    ("attention", "value", "kernel"): "self_attn.v_proj.weight",
    ("attention", "value", "bias"): "self_attn.v_proj.bias",
    ("attention", "out", "kernel"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}


def load(folder: Path) -> tuple[DecoderConfig, PyTree]:
    """Reads a decoder.

    Args:
      folder: with ``config.json`` of a Llama, Qwen 2 or Qwen 3 model, and its weights
        in one safetensors file or in shards with their index.

    Returns:
      The decoder's config and its parameters, in the dtype of the files.

    Raises:
      FileNotFoundError: a file or a shard is missing.
      ValueError: the architecture is another or has what this decoder lacks; a key, a
        tensor or a part of a file is missing; a tensor has another shape or is not
        expected.
    """
    config = read_config(folder)
    tensors = _without_derived(folder, config, load_tensors(folder))
    shapes = _shapes(config)
    names = {path: _names(config, path) for path in shapes}
    expected = {name for each in names.values() for name in each}
    missing = sorted(expected - tensors.keys())
    unexpected = sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the tensors are not those of a model with its config.json; "
            f"missing: {missing or 'none'}; unexpected: {unexpected or 'none'}."
        )
    params = {}
    for path, shape in shapes.items():
        # Taken out of the dict, so that few are held twice.
        layers = [
            _from_file(tensors.pop(name), path, shape, f"{folder}: {name}")
            for name in names[path]
        ]
        params[path] = jnp.asarray(np.stack(layers) if _stacked(path) else layers[0])
    return config, unflatten_dict(params)


def save(folder: Path, config: DecoderConfig, params: PyTree) -> None:
    """Writes a decoder as a Llama, Qwen 2 or Qwen 3 folder, whichever it fits.

    Copy the tokenizer's files and ``generation_config.json`` beside them: a decoder
    does not know which tokens begin and end a text.

    Args:
      folder: made if need be.
      config: the decoder's.
      params: its parameters, stored in the dtype they have.

    Raises:
      ValueError: the decoder has both norms and biases of queries and keys, as no
        architecture of the format has.
    """
    values = _config_values(config)
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        array = np.asarray(leaf)
        layers = array if _stacked(path) else array[None]
        for name, layer in zip(_names(config, path), layers, strict=True):
            tensors[name] = _to_file(layer, path)
    save_tensors(folder, tensors)
    write_whole(folder / _CONFIG_FILE, json.dumps(values, indent=2) + "\n")


def _without_derived(
    folder: Path, config: DecoderConfig, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Leaves out what some files hold and follows from the rest."""
    head, embedding = _NAMES["head",], _NAMES["embedding", "embedding"]
    if config.tied and {head, embedding} <= tensors.keys():
        if not np.array_equal(tensors[head], tensors[embedding]):
            raise ValueError(
                f"{folder}: {head} differs from {embedding}, while config.json has "
                "'tie_word_embeddings'."
            )
        del tensors[head]
    return {
        name: each
        for name, each in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def _shapes(config: DecoderConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Of every parameter, in one layer where they are stacked."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params = flatten_dict(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    return {
        path: leaf.shape[1:] if _stacked(path) else leaf.shape
        for path, leaf in params.items()
    }


def _stacked(path: tuple[str, ...]) -> bool:
    return path[0] == "blocks"


def _names(config: DecoderConfig, path: tuple[str, ...]) -> list[str]:
    """What the format calls a parameter: in every layer, where they are stacked."""
    if not _stacked(path):
        return [_NAMES[path]]
    name = _LAYER_NAMES[path[1:]]
    return [f"model.layers.{index}.{name}" for index in range(config.layers)]


def _is_kernel(path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "head")


def _to_file(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """As PyTorch has it: kernels ``[outputs, inputs]``, all heads along one axis."""
    if _is_kernel(path):
        inputs = 2 if "out" in path else 1
        return array.reshape(math.prod(array.shape[:inputs]), -1).T
    return array.reshape(-1) if path[-1] == "bias" else array


def _from_file(
    array: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...], name: str
) -> np.ndarray:
    """As the decoder has it; ``name`` is for the refusal."""
    expected = _to_file(np.empty(shape, bool), path).shape
    if array.shape != expected:
        raise ValueError(f"{name}: has shape {array.shape}; expected {expected}.")
    return (array.T if _is_kernel(path) else array).reshape(shape)


def read_config(folder: Path) -> DecoderConfig:
    """The decoder that a ``config.json`` describes.

    Args:
      folder: that has it.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it lacks a key, or describes what this decoder is not.
    """
    path = folder / _CONFIG_FILE
    values = load_json(path)
    kind = _required(values, "model_type", path)
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: got model_type {kind!r}; expected one of {list(_ARCHITECTURES)}."
        )
    for key, known in _ONLY.items():
        if values.get(key, known) != known:
            raise ValueError(
                f"{path}: got {key} {values[key]!r}; this decoder has {known!r} alone."
            )
    # Transformers 5 has the base of the frequencies beside their scaling.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    width, heads = (
        _required(values, key, path) for key in ("hidden_size", "num_attention_heads")
    )
    settings = {
        "vocabulary": _required(values, "vocab_size", path),
        "layers": _required(values, "num_hidden_layers", path),
        "width": width,
        "heads": heads,
        "key_value_heads": values.get("num_key_value_heads", heads),
        "head_width": values.get("head_dim") or width // heads,
        "mlp_width": _required(values, "intermediate_size", path),
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
        "rope_scaling": _scaling(rope, path),
        "norm_epsilon": _required(values, "rms_norm_eps", path),
        "tied": values.get("tie_word_embeddings", False),
        "query_key_norm": kind == "qwen3",
        "attention_bias": kind == "qwen2",
        "dtype": values.get("dtype") or values.get("torch_dtype") or "float32",
    }
    try:
        return DecoderConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _required(values: dict[str, Any], key: str, path: Path) -> Any:
    if values.get(key) is None:
        raise ValueError(f"{path}: lacks {key!r}.")
    return values[key]


def _scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{path}: got rope_type {kind!r}; expected 'default' or 'llama3'."
        )
    return RopeScaling(*(_required(rope, key, path) for key in _SCALING))


def _config_values(config: DecoderConfig) -> dict[str, Any]:
    """What :func:`read_config` reads, as Transformers 4 writes and 5 still reads it."""
    if config.query_key_norm and config.attention_bias:
        raise ValueError(
            "config: has query_key_norm, as Qwen 3, and attention_bias, as Qwen 2; "
            "expected one of them at most, for a folder of a known architecture."
        )
    kind = "qwen3" if config.query_key_norm else "llama"
    kind = "qwen2" if config.attention_bias else kind
    scaling = None
    if config.rope_scaling is not None:
        factors = dataclasses.astuple(config.rope_scaling)
        scaling = {"rope_type": "llama3", **dict(zip(_SCALING, factors, strict=True))}
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    } | _ONLY
