"""Whether a step will fit and how fast it can be, told by the compiler beforehand.

    python -m kdjax.tools.preflight experiments.lm --topology v5e:16x16 \\
        --mesh data=32,tensor=8 -- --student llama-3.2-1b --teacher llama-3.1-8b

compiles the step of an experiment for chips that need not be there, and prints what it
takes of each; where it does not fit, it tries what would make it. The module that is
named has a ``preflight.py`` with ``planner(arguments) -> (mesh, levers) -> Plan``.

In notebooks and tests, :func:`check` does it for one :class:`Plan`, and
:func:`recommend` for a function that makes them.
"""

from kdjax.tools.preflight._check import Plan, Report, check, slice_mesh
from kdjax.tools.preflight._costs import Collective, Costs, costs
from kdjax.tools.preflight._levers import Levers, Trial, recommend
from kdjax.tools.preflight._views import figure, table, verdict

__all__ = [
    "Collective",
    "Costs",
    "Levers",
    "Plan",
    "Report",
    "Trial",
    "check",
    "costs",
    "figure",
    "recommend",
    "slice_mesh",
    "table",
    "verdict",
]
