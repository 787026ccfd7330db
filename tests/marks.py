"""Which parameters of a test run at once, and which with ``pytest -m slow`` only."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def rest_slow(
    values: Iterable[Any], fast: Callable[[Any], bool], name: Callable[[Any], str] = str
) -> list[Any]:
    """Parameters of a test of which each compiles a program of its own.

    Args:
      values: of one parameter.
      fast: which of them stand for all others in the fast suite.
      name: what the test is called with each.
    """
    return [
        pytest.param(
            value, id=name(value), marks=() if fast(value) else pytest.mark.slow
        )
        for value in values
    ]
