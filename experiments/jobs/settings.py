"""Settings: refused where they are wrong, written down where the runs are."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from etils.epath import Path

from experiments.jobs.cluster import agreed
from kdjax.io.files import write_whole


def option(name: str) -> str:
    """What a field of a config is called on the command line."""
    return "--" + name.replace("_", "-")


def as_html(config: Any) -> str:
    """All fields of a config, for the page of a job."""
    fields = (html.escape(f"{name}: {value}") for name, value in vars(config).items())
    return f"<p><code>{'<br>'.join(fields)}</code></p>"


def refuse(config: Any, name: str, expected: str) -> NoReturn:
    """Raises a ``ValueError`` about a field of a config."""
    raise ValueError(f"{option(name)}: got {getattr(config, name)}; {expected}.")


def check_counts(config: Any, *names: str) -> None:
    """Refuses fields that are below 1."""
    for name in names:
        if getattr(config, name) < 1:
            refuse(config, name, "expected a whole number of at least 1")


def check_positive(config: Any, *names: str) -> None:
    """Refuses fields that are not finite and above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            refuse(config, name, "expected a finite number above 0")


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings down in the folder, or refuses it if it holds others."""
    if "://" in str(out) and not str(out).startswith("gs://"):
        raise ValueError(
            f"--out: got {out}; expected a folder or gs://..., the only buckets that "
            "Orbax saves to (0.12.8). Mount this one."
        )
    agreed(lambda: _claim(out, settings))


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / "settings.json"
    try:
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=2))
        there = json.loads(path.read_text())
        if not isinstance(there, dict):
            raise ValueError(f"{path.name} holds a {type(there).__name__}")
    except (OSError, ValueError) as error:
        raise OSError(
            f"--out: cannot use {out} ({error}); expected a folder, there or to be "
            "made, that this user may write to."
        ) from error
    differing = [
        f"  {option(name)}: {there.get(name)} there, {value} now"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--out: {out} holds runs with other settings:\n"
            + "\n".join(differing)
            + "\nGo back to those, or choose another folder."
        )
