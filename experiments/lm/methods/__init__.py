"""The methods by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from experiments.lm.methods.layers import LAYERS
from experiments.lm.methods.logits import LOGITS, alone
from experiments.lm.methods.setup import Method, Recipe, Setup, Unfit
from experiments.lm.methods.targets import TARGETS
from experiments.lm.methods.texts import TEXTS
from experiments.lm.methods.vocabularies import VOCABULARIES

__all__ = ["ALONE", "METHODS", "Recipe", "Run", "Setup", "Unfit", "chosen", "run_of"]

ALONE = "alone"
"""The baseline: the student by itself."""

METHODS: dict[str, Method] = {
    ALONE: alone,
    **LOGITS,
    **TARGETS,
    **TEXTS,
    **LAYERS,
    **VOCABULARIES,
}

_ALL = (ALONE, f"{ALONE}:2", f"{ALONE}:4", *list(METHODS)[1:])
"""The baseline also for longer, to compare with at equal time."""


class Run(NamedTuple):
    """A method, and how many times as long as others it trains."""

    method: str
    factor: int


def chosen(names: Iterable[str]) -> list[str]:
    """Reads the names of ``--methods``; the baseline comes first, asked for or not.

    Args:
      names: each of one method or several with commas between, or ``all``; ``:4`` after
        one trains it for 4 times as many steps.

    Raises:
      ValueError: there is no such method.
    """
    wanted = [name.strip() for text in names for name in text.split(",")]
    listed: list[str] = [ALONE]
    for name in filter(None, wanted):
        if name == "all":
            listed += _ALL
        else:
            run_of(name)
            listed.append(name)
    return list(dict.fromkeys(listed))


def run_of(name: str) -> Run:
    """What a name stands for: ``alone:4`` for ``("alone", 4)``.

    Raises:
      ValueError: there is no such method.
    """
    method, colon, factor = name.partition(":")
    if method in METHODS and (not colon or (factor.isdecimal() and int(factor) > 0)):
        return Run(method, int(factor or 1))
    raise ValueError(
        f"--methods: got {name!r}; expected all, or some of {', '.join(METHODS)}, each "
        "as it is or for longer, as in alone:4."
    )
