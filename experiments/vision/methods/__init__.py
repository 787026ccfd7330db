"""The methods by name."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.vision.methods.logits import LOGITS
from experiments.vision.methods.maps import MAPS
from experiments.vision.methods.relations import RELATIONS
from experiments.vision.methods.setup import Method, Setup, Unfit, hard
from kdjax import Objective
from kdjax.objectives import combine, soft_labels

__all__ = ["ALONE", "METHODS", "Setup", "Unfit", "chosen", "objective"]

ALONE = "alone"
"""The baseline: labels only."""

METHODS: dict[str, Method] = {ALONE: hard, **LOGITS, **MAPS, **RELATIONS}

# The others have soft labels already.
_HAVE_NO_KD = MAPS | RELATIONS

_WITH_KD = "+kd"


def chosen(names: Iterable[str]) -> list[str]:
    """Reads the names of ``--methods``; the baseline comes first, asked for or not.

    Args:
      names: each of one method or several with commas between, or ``all``.

    Raises:
      ValueError: there is no such method.
    """
    wanted = [name.strip() for text in names for name in text.split(",")]
    listed: list[str] = [ALONE]
    for name in filter(None, wanted):
        if name != "all":
            _parts(name)
        listed += METHODS if name == "all" else [name]
    return list(dict.fromkeys(listed))


def objective(name: str, setup: Setup) -> Objective:
    """What a student is trained for by a method.

    Raises:
      Unfit: the networks or the data have not what it takes.
    """
    base, softened = _parts(name)
    own = METHODS[base](setup)
    if not softened:
        return own
    # As RepDistiller combines them.
    return combine(own, soft_labels(name="kd", temperature=4.0, weight=1.0))


def _parts(name: str) -> tuple[str, bool]:
    base = name.removesuffix(_WITH_KD)
    softened = base != name
    if base in METHODS and not (softened and base not in _HAVE_NO_KD):
        return base, softened
    raise ValueError(
        f"--methods: got {name!r}; expected all, or some of {', '.join(METHODS)}; "
        f"{_WITH_KD} after one of {', '.join(_HAVE_NO_KD)} adds soft labels."
    )
