"""Tensors in folders of safetensors files, as Hugging Face lays them out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from etils.epath import Path
from jax.typing import ArrayLike
from safetensors.numpy import load, load_file, save

from kdjax.io.files import write_whole

_FILE = "model.safetensors"
_INDEX_FILE = f"{_FILE}.index.json"


def load_tensors(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all tensors of a folder.

    They are in ``model.safetensors``, or in the shards that
    ``model.safetensors.index.json`` lists.

    Args:
      folder: a local one, or one in a bucket (``gs://...``), which is read as a whole.

    Returns:
      Arrays by name, on the host, in the dtype of the file (bfloat16 included).

    Raises:
      FileNotFoundError: there is neither file, or a shard is missing.
      ValueError: a file is damaged, or a shard lacks a tensor that the index says it
        has.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> save_tensors(folder, {"scale": np.ones(3)})
      >>> load_tensors(folder)
      {'scale': array([1., 1., 1.])}
    """
    files = Path(folder)
    index_file = files / _INDEX_FILE
    if not index_file.exists():
        return _read(files / _FILE)
    index = load_json(index_file).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(
            f"{index_file}: has no 'weight_map'; expected the shard of every tensor."
        )
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(index.values())):
        read = _read(files / shard)
        absent = [name for name in index if index[name] == shard and name not in read]
        if absent:
            raise ValueError(
                f"{files / shard}: lacks {absent}, which {_INDEX_FILE} says it has."
            )
        tensors |= read
    return tensors


def save_tensors(
    folder: str | os.PathLike[str], tensors: Mapping[str, ArrayLike]
) -> None:
    """Writes ``model.safetensors``, which :func:`load_tensors` and PyTorch read.

    Args:
      folder: made if need be.
      tensors: by name.
    """
    # The file gets an array's buffer, whatever its strides say (safetensors 0.8).
    arrays = {name: np.asarray(each, order="C") for name, each in tensors.items()}
    write_whole(Path(folder) / _FILE, save(arrays, metadata={"format": "pt"}))


def load_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file that comes with weights.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else.
    """
    file = Path(path)
    _check_exists(file)
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; expected names.")
    return values


def _read(path: Path) -> dict[str, np.ndarray]:
    _check_exists(path)
    try:
        # A local file is mapped, and not read twice.
        in_bucket = "://" in str(path)
        return load(path.read_bytes()) if in_bucket else load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: is damaged or was not copied in full ({error})."
        ) from error


def _check_exists(path: Path) -> None:
    if not path.is_file():
        found = sorted(each.name for each in path.parent.glob("*"))
        raise FileNotFoundError(
            f"{path}: there is no such file; its folder has {found or 'nothing'}."
        )
