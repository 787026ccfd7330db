"""Files that are there whole or not at all, on disks and in buckets."""

from __future__ import annotations

import os

from etils import epath


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that, killed at any moment, it is there whole or not at all.

    Args:
      path: of the file; its folder is made. May be in a bucket (``gs://...`` with gcsfs
        installed, ``s3://...`` with s3fs).
      content: text, written as UTF-8, or bytes.

    Example:
      >>> import tempfile
      >>> path = epath.Path(tempfile.mkdtemp()) / "new" / "table.md"
      >>> write_whole(path, "| a |")
      >>> path.read_text()
      '| a |'
    """
    place = epath.Path(path)
    whole = content.encode() if isinstance(content, str) else content
    place.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(place):
        # What a bucket holds is never there in part.
        place.write_bytes(whole)
        return
    partial = place.with_name(place.name + ".tmp")
    with partial.open("wb") as file:
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(place)
