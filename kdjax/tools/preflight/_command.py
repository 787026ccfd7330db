"""The command line of preflight."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from kdjax.io.files import write_whole
from kdjax.tools.preflight import _views
from kdjax.tools.preflight._check import Plan, slice_mesh
from kdjax.tools.preflight._levers import Levers, recommend
from kdjax.tools.report import png
from kdjax.train import make_mesh


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0 where a setting fits or the memory is not known, 1 where
      nothing fits, 2 where the settings are refused.
    """
    parser = _parser()
    mine, theirs = _parted(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(mine)
    console = Console()
    try:
        planned = _planner(options.module, theirs)
        mesh_of = _mesh_of(options.topology)
        axes = mesh_of(options.mesh).shape
        trials = []
        for trial in recommend(planned, mesh_of, axes, _levers(options)):
            trials.append(trial)
            console.rule(trial.changed or "as given")
            _views.table(trial.report).print(console)
    except (ImportError, ValueError) as error:
        print(f"Refused: {error}", file=sys.stderr)
        return 2
    if len(trials) > 1:
        console.rule("tried")
        _views.trials_table(trials).print(console)
    console.print(_views.verdict(trials))
    if options.picture is not None:
        write_whole(options.picture, png(_views.figure(trials)))
        console.print(f"Memory of each chip: {options.picture}")
    return int(trials[-1].report.fits is False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.tools.preflight",
        description="Compiles the step of an experiment for chips that need not be "
        "there, and says what it takes of each.",
        epilog="What stands behind -- goes to the experiment: -- --help lists it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("module", help="the experiment, such as experiments.lm")
    add("--topology", help="of a TPU slice, such as v5e:16x16; or this machine's")
    add("--mesh", type=_axes, help="such as data=32,tensor=8; or data over all chips")
    start = Levers()
    add("--teacher-dtype", default=start.teacher_dtype, help="of its parameters")
    add("--accumulate", type=int, default=start.accumulate, help="micro-batches")
    add("--remat", action="store_true", help="compute the student's layers again")
    add("--chunk-size", type=int, help="tokens that have logits at a time")
    add("--picture", type=Path, help="a PNG file of the memory of each chip")
    return parser


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before ``--``, and behind it."""
    if "--" not in arguments:
        return list(arguments), []
    end = list(arguments).index("--")
    return list(arguments[:end]), list(arguments[end + 1 :])


def _axes(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(size) for name, size in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected sizes by name, such as data=32,tensor=8."
        ) from error


def _levers(options: argparse.Namespace) -> Levers:
    return Levers(*(getattr(options, name) for name in Levers._fields))


def _planner(module: str, arguments: Sequence[str]) -> Callable[[Mesh, Levers], Plan]:
    found = importlib.import_module(f"{module}.preflight")
    return found.planner(arguments)


def _mesh_of(topology: str | None) -> Callable[[Mapping[str, int] | None], Mesh]:
    if topology is None:
        return make_mesh
    # Nothing runs, and the chips of this machine, if any, are left to others.
    jax.config.update("jax_platforms", "cpu")
    return functools.partial(slice_mesh, topology)
