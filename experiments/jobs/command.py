"""From the command line to the exit status of a job."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler

from experiments.jobs.interruption import Interrupted, Sigterm

T = TypeVar("T")


def run(prepare: Callable[[Console, Sigterm], T], work: Callable[[T], None]) -> int:
    """Prepares and does a job.

    Args:
      prepare: loads and checks; its ``ValueError`` and ``OSError`` are refusals, which
        are shown without a traceback.
      work: does it, with what ``prepare`` returned.

    Returns:
      The exit status: 0 done, 1 the training diverged, 2 refused, 130 and 143
      interrupted.
    """
    console = Console()
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
