"""Writers of metrics; :func:`kdjax.train.loop.fit` hands records to each of them."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Mapping
from typing import TextIO

import rich.progress
from etils import epath
from rich.console import Console
from tensorboardX import SummaryWriter

from kdjax.io.files import write_whole


class JsonLines:
    """Writes records as lines of JSON, the same bytes for the same run.

    What a run measures of its machine (kind ``speed``) is left out, and a resumed
    run first drops what lies beyond its checkpoint: the file does not tell whether
    a run was interrupted. Floats are written in full precision, and those that are
    not finite, which JSON has no word for, as ``null``.

    Args:
      path: the file; its folder is made, and lines are appended. In a bucket
        (``gs://...``, ``s3://...``) nothing can be: there it is written anew at every
        flush.

    Example:
      >>> import tempfile
      >>> path = epath.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> log = JsonLines(path)
      >>> log.write(100, {"loss": 0.5, "kl": float("nan")}, "train")
      >>> log.close()
      >>> print(path.read_text().strip())
      {"step": 100, "kind": "train", "kl": null, "loss": 0.5}
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = epath.Path(path)
        self._in_bucket = "://" in str(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()

    def write(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
        """Appends one record, unless it is of kind ``speed``."""
        if kind == "speed":
            return
        record = {"step": step, "kind": kind}
        for name in sorted(scalars):
            value = float(scalars[name])
            record[name] = value if math.isfinite(value) else None
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what was written after ``step``, and a line that was cut off."""
        self._file.close()
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_kept(line, step)]
        if kept != lines:
            write_whole(self._path, "".join(kept))
        self._file = self._opened()

    def flush(self) -> None:
        """Makes everything written so far survive a crash of the machine."""
        self._file.flush()
        if not self._in_bucket:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; nothing can be written afterwards."""
        self._file.close()

    def _opened(self) -> TextIO:
        if self._in_bucket:
            return _Object(self._path)
        return self._path.open("a", encoding="utf-8")


class _Object(io.StringIO):
    """A text in a bucket, to be appended to."""

    def __init__(self, path: epath.Path):
        super().__init__()
        self._path = path
        self.write(path.read_text(encoding="utf-8") if path.exists() else "")

    def flush(self) -> None:
        """Writes all of it."""
        write_whole(self._path, self.getvalue())

    def close(self) -> None:
        """Writes all of it, and lets it go."""
        if not self.closed:
            self.flush()
        super().close()


def _is_kept(line: str, step: int) -> bool:
    # A line without its end was cut off, even if what is there parses.
    if not line.endswith("\n"):
        return False
    try:
        return json.loads(line)["step"] <= step
    except ValueError:
        return False


class TensorBoard:
    """Writes records as TensorBoard events, tagged ``kind/name``.

    Args:
      folder: of the event files; one folder for each run.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = str(folder)
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None

    def write(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
        """Adds each value to its curve."""
        if self._writer is None:
            # Named by the second alone, a file would overwrite one just written.
            self._writer = SummaryWriter(
                self._folder,
                purge_step=self._purge_step,
                filename_suffix=f".{time.time_ns()}",
            )
        for name, value in scalars.items():
            self._writer.add_scalar(f"{kind}/{name}", float(value), step)

    def rewind(self, step: int) -> None:
        """Hides what event files hold after ``step``, from the next write on."""
        self.close()
        self._purge_step = step + 1

    def flush(self) -> None:
        """Writes the events out."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Writes the events out and closes the file; writing opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressBar:
    """Shows how far a training is, its loss, its fidelity and its speed.

    Args:
      total: steps of the whole run.
      fidelity: metric that tells how close the student is to its teacher; shown
        where a record has it.
      console: where to draw; standard output by default.
    """

    def __init__(
        self,
        total: int,
        fidelity: str = "agreement",
        *,
        console: Console | None = None,
    ):
        speed = "examples_per_second", "model_flops_utilization"
        self._shown = ("loss", fidelity, *speed)
        self._latest: dict[str, float] = {}
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def write(self, step: int, scalars: Mapping[str, float], kind: str) -> None:
        """Moves the bar to ``step`` and shows the newest values."""
        del kind
        self._latest |= {name: scalars[name] for name in self._shown if name in scalars}
        text = "  ".join(f"{name} {value:.4g}" for name, value in self._latest.items())
        self._bar.update(self._task, completed=step, description=text)

    def rewind(self, step: int) -> None:
        """Moves the bar to ``step``."""
        self._bar.update(self._task, completed=step)

    def flush(self) -> None:
        """Draws the bar."""
        self._bar.refresh()

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        self._bar.stop()
