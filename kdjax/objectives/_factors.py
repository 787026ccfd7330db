"""Factor transfer: the student's map translated, the teacher's paraphrased."""

from __future__ import annotations

import jax
from jax import Array

from kdjax import losses
from kdjax.objectives._convolutions import (
    convolution,
    init_convolution,
    init_normalized,
    normalized,
)
from kdjax.objectives._terms import MASK, check_weight, counted, now, pair_of
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled, Term


def factor_transfer(
    *,
    student: str,
    teacher: str,
    name: str = "ft",
    weight: Scheduled = 200.0,
    where: str | None = MASK,
    ratio: float = 0.5,
) -> Objective:
    """FT: the student's translated map against the teacher's paraphrased one.

    The paraphraser, an autoencoder of the teacher's map, is trained to restore the
    map, and by nothing else: no gradient of the transfer reaches it. The published
    code trains it apart, before the student; here both learn in one step, so that
    one command suffices. The translator is trained with the student; it normalises by
    the statistics of the examples that count, on all devices (under accumulation, of
    each micro-batch). :func:`kdjax.losses.factor_transfer` is the loss.

    Args:
      student: path of a map ``[B, H, W, C]`` of the student.
      teacher: path of a map of the teacher; sizes and channels may differ.
      name: of the term, in metrics; ``name/paraphraser`` is the mean squared error
        of the restored map, of weight 1.
      weight: of the transfer; the published one is 200.
      where: entry of the batch that says which examples count.
      ratio: channels of a factor over those of the teacher's map; in (0, 1].

    Returns:
      An objective of two terms, with the parameters of paraphraser and translator.

    Raises:
      ValueError: ``ratio`` is out of its range, the weight is not finite, or (when
        traced) a feature is missing or no map.

    Example:
      >>> objective = factor_transfer(student="layer4", teacher="layer4")
      >>> spec = Outputs(None, {"layer4": jnp.ones((2, 4, 4, 6))})
      >>> params = jax.eval_shape(objective.init, jax.random.key(0), spec, spec)
      >>> params["translator"]["1"]["kernel"].shape
      (3, 3, 6, 3)

    Reference:
      Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor
      Transfer, 2018, section 3. arXiv:1802.04977
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: got {ratio}, expected a number in (0, 1].")
    check_weight(name, weight)
    both = pair_of(name, student, teacher)

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        ours, theirs = (each.shape[-1] for each in both(student, teacher))
        factors = max(1, int(theirs * ratio))
        keys = jax.random.split(rng, 3)
        return {
            "encoder": _init(keys[0], (theirs, theirs, factors, factors)),
            "decoder": _init(keys[1], (factors, factors, theirs, theirs)),
            "translator": _init(keys[2], (ours, ours, factors, factors), True),
        }

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        ours, theirs = both(student, teacher)
        counts = counted(batch, where, ours.shape[:1], None)
        factor = _run(params["encoder"], theirs, counts)
        restored = _run(params["decoder"], factor, counts)
        error = losses.feature_mse(restored, theirs)
        paraphraser = Mean.of(error, counted(batch, where, error.shape, None))
        translated = _run(params["translator"], ours, counts)
        # The teacher's outputs carry no gradient, but the encoder of them would.
        values = losses.factor_transfer(translated, jax.lax.stop_gradient(factor))
        transfer = Mean.of(values, counts)
        terms = {
            name: Term(now(weight, step), transfer),
            f"{name}/paraphraser": Term(1.0, paraphraser),
        }
        return terms, state

    return Objective(init, dict, apply)


def _init(rng: Array, widths: tuple[int, ...], batch_norm: bool = False) -> PyTree:
    """Three 3x3 convolutions, through these numbers of channels."""
    layer = init_normalized if batch_norm else init_convolution
    return {
        str(index): layer(key, 3, widths[index], widths[index + 1])
        for index, key in enumerate(jax.random.split(rng, len(widths) - 1))
    }


def _run(params: PyTree, x: Array, counts: Array | None) -> Array:
    for index in range(len(params)):
        layer = params[str(index)]
        x = normalized(layer, x, counts) if "scale" in layer else convolution(layer, x)
        x = jax.nn.leaky_relu(x, 0.1)
    return x
