"""Checksums of the files of a checkpoint, and what they tell of damage."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath

_FILE = "files/checksums.json"


class Checksums(ocp.CheckpointHandler):
    """An item that lists the files of all items, with their sizes and checksums."""

    def save(self, directory: epath.Path, args: SaveChecksums) -> None:
        """Nothing: the other files are not there yet."""

    def restore(self, directory: epath.Path, args: SaveChecksums) -> None:
        """Nothing: damage is looked for before anything is restored."""

    def finalize(self, directory: epath.Path) -> None:
        """Called when the files are complete, before the checkpoint gets its name."""
        if jax.process_index() > 0:
            return
        # What several processes save is large, and this one would read back all of it.
        # Storage that many hosts share has checksums of its own; sizes still tell a
        # file cut short.
        checksum = _checksum if jax.process_count() == 1 else lambda path: None
        root = directory.parent
        listed = {
            str(path.relative_to(root)): [path.stat().length, checksum(path)]
            for path in _files(root)
            if path.parent != root
        }
        (directory / _FILE.split("/")[1]).write_text(json.dumps(listed))


@ocp.args.register_with_handler(Checksums, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveChecksums(ocp.args.CheckpointArgs):
    """What Orbax calls for to save an item; this one needs nothing."""


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _checksum(path: epath.Path) -> int:
    """CRC of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def damage_of(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint, or ``None``."""
    # Orbax would notice most of it, but its threads go on failing after the error.
    try:
        listed = json.loads((folder / _FILE).read_text())
    except (OSError, ValueError) as error:
        return f"{_FILE}: {error}"
    for name, (size, checksum) in listed.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if (length := path.stat().length) != size:
            return f"{name} has {length} bytes and had {size}"
        if checksum is not None and _checksum(path) != checksum:
            return f"{name} has changed"
    return None
