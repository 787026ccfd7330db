"""Methods for students that read other tokens than their teacher."""

from __future__ import annotations

from experiments.lm.methods.setup import Method

VOCABULARIES: dict[str, Method] = {}
"""By name."""
