"""Methods on the layers in between: hidden states, attention, and a start from them."""

from __future__ import annotations

import dataclasses

from experiments.lm.methods.logits import soft
from experiments.lm.methods.setup import Method, Recipe, Setup, Unfit
from kdjax import losses, objectives
from kdjax.objectives import combine, feature_pairs, projectors, uniform_layers


def _pairs(setup: Setup, name: str) -> list[tuple[int, int]]:
    ours, theirs = setup.student.layers, setup.teacher.layers
    if ours > theirs:
        raise Unfit(
            f"{name} needs a teacher with as many layers as the student, {ours}; this "
            f"one has {theirs}."
        )
    return uniform_layers(ours, theirs)


def _hidden(setup: Setup) -> Recipe:
    """TinyBERT's, 2019, arXiv:1909.10351, equation 8, beside forward KL."""
    pairs = [
        (f"blocks[{ours}]", f"blocks[{theirs}]")
        for ours, theirs in _pairs(setup, "hidden")
    ]
    term = feature_pairs(
        losses.feature_mse,
        pairs,
        name="hidden",
        projector=projectors.linear(),
        where=None,
    )
    ours, theirs = zip(*pairs, strict=True)
    return Recipe(combine(soft(setup), term), ours, theirs)


def _attention(setup: Setup) -> Recipe:
    """MiniLM's, 2020, arXiv:2002.10957, equation 4, beside forward KL."""
    if setup.student.heads != setup.teacher.heads:
        raise Unfit(
            f"attention needs as many heads in both models; the student has "
            f"{setup.student.heads}, the teacher {setup.teacher.heads}."
        )
    path = "blocks[-1]/attention/scores"
    term = objectives.attention(student=path, teacher=path, where=None, causal=True)
    return Recipe(combine(soft(setup), term), [path], [path])


def _relations(setup: Setup) -> Recipe:
    """MiniLMv2's, 2020, arXiv:2012.15828, section 3, beside forward KL."""
    path = "blocks[-1]/attention"
    kinds = [f"{path}/{kind}" for kind in ("query", "key", "value")]
    term = objectives.self_attention_relation(
        student=path,
        teacher=path,
        heads=setup.student.heads,
        name="relations",
        where=None,
    )
    return Recipe(combine(soft(setup), term), kinds, kinds)


def _from_layers(setup: Setup) -> Recipe:
    """DistilBERT's start, 2019, arXiv:1910.01108, section 3, then forward KL."""
    pairs = _pairs(setup, "from_layers")
    ours = setup.student
    shortened = dataclasses.replace(
        setup.teacher, layers=ours.layers, unroll=ours.unroll
    )
    names = [field.name for field in dataclasses.fields(ours)]
    differing = [
        f"{name} is {getattr(ours, name)}, the teacher's {getattr(shortened, name)}"
        for name in names
        if getattr(ours, name) != getattr(shortened, name)
    ]
    if differing:
        raise Unfit(
            "from_layers needs a student like the teacher but for the layers; "
            f"{'; '.join(differing)}. Options set --width and --heads alone: a student "
            "has as many key_value_heads as heads, a head_width of width / heads, an "
            "mlp_width of 3 * width, and the rest is fixed."
        )
    return Recipe(soft(setup), layers=[theirs for _, theirs in pairs])


LAYERS: dict[str, Method] = {
    "hidden": _hidden,
    "attention": _attention,
    "relations": _relations,
    "from_layers": _from_layers,
}
"""By name."""
