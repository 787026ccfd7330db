"""The golden names of relations, attention and scores, and the same in kdjax."""

import jax
import jax.numpy as jnp

from kdjax import losses


def relation(name):
    """A relation with the published weight, of embeddings scaled where it does so."""

    def value(inputs, hyper):
        student, teacher = inputs["student_feature"], inputs["teacher_feature"]
        if hyper.get("l2_norm"):
            student, teacher = (
                x / jnp.linalg.norm(x, axis=-1, keepdims=True)
                for x in (student, teacher)
            )
        return hyper.get("weight", 1) * getattr(losses, name)(student, teacher)

    return value


def contrastive_representation(inputs, hyper):
    """CRD from given scores, one value per example.

    The scores are those of vectors of length one number. RepDistiller adds eps to the
    denominators, which the paper does not: it acts as another size of the data set,
    and moves each negative's value by a constant.
    """
    scores = jnp.log(inputs["scores"])
    count = scores.shape[1] - 1
    odds = count / hyper["n_data"]

    def row(scores):
        return losses.contrastive_representation(
            jnp.ones((1, 1), scores.dtype),
            scores[:1],
            scores[None, 1:],
            dataset_size=count / (odds + hyper["eps"]),
            temperature=1.0,
            normalizer=1.0,
        )

    return jax.vmap(row)(scores) + count * jnp.log1p(hyper["eps"] / odds)


def _attention(inputs):
    student, teacher = inputs["student_attention"], inputs["teacher_attention"]
    return student, teacher, inputs["mask"] > 0


def attention_mse(inputs, hyper):
    # The mean over all pairs that count, where examples differ in length.
    student, teacher, where = _attention(inputs)
    rows = losses.attention_mse(student, teacher, where=where)
    keys = where.sum(-1)
    total = jnp.sum(rows * (where * keys[:, None])[:, None])
    return total / (student.shape[1] * jnp.sum(keys**2))


def attention_cross_entropy(inputs, hyper):
    """TextBrewer's, with the softmax over masked keys too, from the KL without them."""
    student, teacher, where = _attention(inputs)
    keys = jnp.broadcast_to(where[:, None, None], student.shape)
    divergence = losses.attention_kl(student, teacher, where=where)
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    p_mass, q_mass = jnp.sum(p, -1, where=keys), jnp.sum(q, -1, where=keys)
    within = p / p_mass[..., None]
    entropy = -jnp.sum(within * jnp.log(within), -1, where=keys)
    rows = p_mass * (divergence + entropy - jnp.log(q_mass))
    counts = jnp.broadcast_to(where[:, None], rows.shape)
    return jnp.mean(rows, where=counts)


def _scores(inputs):
    """Of each query with its positive and its negatives, as products."""
    names = sorted(name for name in inputs if name.startswith("negative_"))
    candidates = [inputs[name] for name in ("positive", *names)]
    return jnp.stack([jnp.sum(inputs["query"] * each, -1) for each in candidates], -1)


def margin_mse(inputs, hyper):
    margins = inputs["labels"].reshape(len(inputs["labels"]), -1)
    return losses.margin_mse(_scores(inputs), jnp.pad(-margins, ((0, 0), (1, 0))))


def score_kl(inputs, hyper):
    return losses.score_kl(
        _scores(inputs), inputs["labels"], temperature=float(hyper["temperature"])
    )


TABLE = {
    "rkd_distance": relation("relational_distance"),
    "rkd_angle": relation("relational_angle"),
    "similarity_preserving": relation("similarity_preserving"),
    "pkt": relation("probabilistic_transfer"),
    "crd_contrast": contrastive_representation,
    "attention_mse": attention_mse,
    "attention_ce": attention_cross_entropy,
    "margin_mse": margin_mse,
    "score_distill_kl": score_kl,
}

# RepDistiller's products of neighbouring rows are not the paper's kernels; TextBrewer
# without a mask sets scores below -0.001 to 0, whether they are padding or not.
NOT_FOLLOWED = {"correlation_congruence_repdistiller", "attention_mse_zeroed"}
