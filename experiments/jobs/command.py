"""From the command line to the exit status of a job."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler

from experiments.jobs.cluster import Cluster, is_first, together
from experiments.jobs.interruption import Interrupted, Sigterm

T = TypeVar("T")


def run(
    cluster: Cluster,
    prepare: Callable[[Console, Sigterm], T],
    work: Callable[[T], None],
) -> int:
    """Prepares and does a job.

    Args:
      cluster: the processes that do it together; one of them prints.
      prepare: loads and checks; its ``ValueError`` and ``OSError`` are refusals, which
        are shown without a traceback.
      work: does it, with what ``prepare`` returned.

    Returns:
      The exit status: 0 done, 1 the training diverged, 2 refused, 130 and 143
      interrupted.
    """
    try:
        cluster.join()
    except (ValueError, RuntimeError) as error:
        print(f"Refused: --cluster: {error}", file=sys.stderr)
        return 2
    console = Console(quiet=not is_first())
    logging.basicConfig(handlers=[RichHandler(console=console, show_path=False)])
    logging.getLogger("kdjax").setLevel(logging.INFO)
    try:
        with Sigterm() as sigterm:
            try:
                job = prepare(console, sigterm)
            except (ValueError, OSError) as error:
                print(f"Refused: {error}", file=sys.stderr)
                return 2
            work(job)
            # Whoever is early must not wait for the others when it shuts down, which
            # JAX limits.
            together()
    except Interrupted:
        console.print("SIGTERM: saved. Run the same command to continue.")
        return 143
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command to continue.")
        return 130
    except FloatingPointError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    return 0
