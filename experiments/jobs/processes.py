"""A module under another Python, such as one that has PyTorch, as a process to ask."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

Ask = Callable[[object], list[float]]
"""Sends a line, and waits for the numbers that come back on one."""


@contextlib.contextmanager
def asked(python: Path, module: str, **options: object) -> Iterator[Ask]:
    """Starts a module that answers lines of its standard input with numbers.

    Args:
      python: the interpreter; ``~`` is expanded.
      module: what it runs, of this checkout.
      **options: of its command line.

    Raises:
      RuntimeError: (from asking) the process ended instead of answering.
    """
    command = [str(python.expanduser()), "-m", module]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        say, hear = process.stdin, process.stdout

        def ask(line: object) -> list[float]:
            with contextlib.suppress(BrokenPipeError):
                say.write(f"{line}\n")
                say.flush()
            answer = hear.readline().split()
            if not answer:
                raise RuntimeError(f"{python} gave up; its message is above.")
            return [float(number) for number in answer]

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                say.close()
