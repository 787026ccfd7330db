"""Terms over a linear head: those of its logits, several in one look at them."""

import chex
import jax
import jax.numpy as jnp
import pytest

from kdjax import losses, metrics, objectives
from kdjax.types import LinearHead, Outputs
from tests.objectives.test_objectives import (
    CLASSES,
    EXAMPLES,
    LABELS,
    MASK,
    logits,
    terms_of,
)


def test_linear_heads_equal_their_dense_logits():
    def head(seed):
        return LinearHead(
            logits(seed, EXAMPLES, 7), logits(seed + 1, 7, CLASSES), logits(9, CLASSES)
        )

    goal = objectives.combine(
        objectives.hard_labels(),
        objectives.soft_labels(losses.jensen_shannon),
        objectives.relations(losses.intra_class_relation),
        objectives.monitor(metrics.agreement, name="agreement"),
    )
    heads = Outputs(head(6)), Outputs(head(7))
    dense = tuple(Outputs(each.logits.logits()) for each in heads)
    batch = {"label": LABELS, "mask": MASK}
    got, expected = terms_of(goal, *heads, batch), terms_of(goal, *dense, batch)
    for name, term in expected.items():
        value = float(term.mean.value())
        assert float(got[name].mean.value()) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("multiplied", [True, False])
def test_mixed_labels_equal_hard_and_soft_ones_apart(multiplied):
    def outputs(seed):
        head = LinearHead(logits(seed, EXAMPLES, 7), logits(seed + 1, 7, CLASSES))
        return Outputs(head.logits() if multiplied else head)

    student, teacher = outputs(6), outputs(8)
    batch = {"label": LABELS, "mask": MASK}
    scored = {**batch, "mask": MASK & (LABELS >= 0)}
    apart = objectives.combine(
        objectives.hard_labels(weight=0.25, label_smoothing=0.1),
        objectives.soft_labels(losses.reverse_kl, weight=0.75, temperature=2.0),
        objectives.monitor(metrics.agreement, name="agreement"),
        objectives.monitor(metrics.top_k_overlap, name="overlap"),
    )
    at_once = objectives.mixed_labels(
        losses.reverse_kl,
        alpha=lambda step: 0.05 * step,
        label_smoothing=0.1,
        temperature=2.0,
        monitors={"agreement": metrics.agreement, "overlap": metrics.top_k_overlap},
    )

    def gradient(objective, batch):
        def total(student):
            terms, _ = objective.apply({}, {}, student, teacher, batch, jnp.array(5))
            summed = sum(
                term.weight * term.mean.value()
                for term in terms.values()
                if not isinstance(term.weight, int)
            )
            return summed, {name: term.mean.value() for name, term in terms.items()}

        return jax.jit(jax.grad(total, has_aux=True))(student)

    got, seen = gradient(at_once, batch)
    expected, reference = gradient(apart, scored)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)
    mixed = 0.25 * reference["hard"] + 0.75 * reference["soft"]
    chex.assert_trees_all_close(seen, {**reference, "mixed": mixed}, rtol=1e-5)


def test_mixed_labels_refuse_a_share_and_names_that_do_not_fit():
    with pytest.raises(ValueError, match=r"alpha.*1\.5"):
        objectives.mixed_labels(alpha=1.5)
    with pytest.raises(ValueError, match=r"\['hard'\] is the name of several terms"):
        objectives.mixed_labels(alpha=0.5, monitors={"hard": metrics.agreement})
    with pytest.raises(ValueError, match=r"\['soft'\] is the name of several terms"):
        objectives.mixed_labels(alpha=0.5, name="soft")
