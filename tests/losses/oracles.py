"""Every loss once more, in plain float64 NumPy, from the formula of its paper.

No code is shared with kdjax, and nothing is done for numerics beyond subtracting the
largest logit: these are for inputs of ordinary size. What is masked is deleted by the
caller.
"""

import numpy as np


def log_softmax(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / np.asarray(temperature, np.float64)[..., None]
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax(logits, temperature=1.0):
    return np.exp(log_softmax(logits, temperature))


def _kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


# Divergences


def forward_kl(student, teacher, *, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return np.square(temperature) * _kl(p, q)


def reverse_kl(student, teacher, *, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return np.square(temperature) * _kl(q, p)


def symmetric_kl(student, teacher, *, reverse_weight=0.5, temperature=1.0):
    forward = forward_kl(student, teacher, temperature=temperature)
    reverse = reverse_kl(student, teacher, temperature=temperature)
    return (1 - reverse_weight) * forward + reverse_weight * reverse


def jensen_shannon(student, teacher, *, beta=0.5, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    m = beta * p + (1 - beta) * q
    return np.square(temperature) * (beta * _kl(p, m) + (1 - beta) * _kl(q, m))


def skew_kl(student, teacher, *, skew=0.1, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return np.square(temperature) * _kl(p, skew * p + (1 - skew) * q)


def skew_reverse_kl(student, teacher, *, skew=0.1, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return np.square(temperature) * _kl(q, skew * q + (1 - skew) * p)


def total_variation(student, teacher, *, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return np.square(temperature) * np.abs(p - q).sum(-1) / 2


def alpha_beta(student, teacher, *, alpha=0.5, beta=0.5, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    both = alpha + beta
    inner = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
    return -np.square(temperature) / (alpha * beta) * inner.sum(-1)


def renyi(student, teacher, *, order, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    inner = np.log((p**order * q ** (1 - order)).sum(-1))
    return np.square(temperature) * inner / (order - 1)


def head_share(student, teacher, *, head_mass=0.5, temperature=1.0):
    """The weight of the forward KL in AKL: the head's share of the gap."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, -1)
    before = np.cumsum(ranked, -1) - ranked
    gaps = np.take_along_axis(np.abs(p - q), order, -1)
    return np.where(before < head_mass, gaps, 0).sum(-1) / gaps.sum(-1)


def adaptive_kl(student, teacher, *, head_mass=0.5, temperature=1.0):
    share = head_share(student, teacher, head_mass=head_mass, temperature=temperature)
    forward = forward_kl(student, teacher, temperature=temperature)
    reverse = reverse_kl(student, teacher, temperature=temperature)
    return share * forward + (1 - share) * reverse


def interpolated_teacher_kl(student, teacher, *, progress, temperature=1.0):
    student, teacher = np.asarray(student, float), np.asarray(teacher, float)
    between = (1 - progress) * student + progress * teacher
    return forward_kl(student, between, temperature=temperature)


def soft_cross_entropy(student, teacher, *, temperature=1.0):
    p, log_q = softmax(teacher, temperature), log_softmax(student, temperature)
    return -np.square(temperature) * (p * log_q).sum(-1)


# Classification


def cross_entropy(logits, labels, *, label_smoothing=0.0):
    classes = np.shape(logits)[-1]
    target = (1 - label_smoothing) * np.eye(classes)[labels]
    target = target + label_smoothing / classes
    return -(target * log_softmax(logits)).sum(-1) * (labels >= 0)


def knowledge_distillation(student, teacher, labels, *, temperature=4.0, alpha=0.5):
    soft = forward_kl(student, teacher, temperature=temperature) * (labels >= 0)
    return alpha * cross_entropy(student, labels) + (1 - alpha) * soft


def hard_distillation(student, teacher):
    return cross_entropy(student, np.argmax(teacher, -1))


def _without(values, labels):
    """Deletes the label's slot of each row; the first one's where it is negative."""
    rest = np.arange(values.shape[-1]) != np.maximum(labels, 0)[..., None]
    return values[rest].reshape(*values.shape[:-1], -1)


def decoupled_kd(student, teacher, labels, *, alpha=1.0, beta=8.0, temperature=4.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    own = np.eye(p.shape[-1])[labels]
    p_label, q_label = (p * own).sum(-1), (q * own).sum(-1)
    target = _kl(
        np.stack([p_label, 1 - p_label], -1), np.stack([q_label, 1 - q_label], -1)
    )
    p_rest, q_rest = _without(p, labels), _without(q, labels)
    p_rest = p_rest / p_rest.sum(-1, keepdims=True)
    q_rest = q_rest / q_rest.sum(-1, keepdims=True)
    value = np.square(temperature) * (alpha * target + beta * _kl(p_rest, q_rest))
    return value * (labels >= 0)


def normalized_kd(student, teacher, labels, *, gamma=1.5, temperature=1.0):
    own = np.eye(np.shape(student)[-1])[labels]
    p_label = (softmax(teacher) * own).sum(-1)
    rest = soft_cross_entropy(
        _without(np.asarray(student), labels),
        _without(np.asarray(teacher), labels),
        temperature=temperature,
    )
    value = p_label * cross_entropy(student, labels) + gamma * rest
    return value * (labels >= 0)


def soft_label_weight(student, teacher, labels):
    """The weight of an example in WSLD."""
    ratio = cross_entropy(student, labels) / (cross_entropy(teacher, labels) + 1e-7)
    return 1 - np.exp(-ratio)


def weighted_soft_labels(student, teacher, labels, *, temperature=2.0):
    soft = soft_cross_entropy(student, teacher, temperature=temperature)
    return soft_label_weight(student, teacher, labels) * soft * (labels >= 0)


def _pearson_distance(a, b, axis):
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    lengths = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return 1 - (a * b).sum(axis) / lengths


def inter_class_relation(student, teacher, *, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return _pearson_distance(q, p, -1)


def intra_class_relation(student, teacher, *, temperature=1.0):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return _pearson_distance(q, p, 0)


def multi_level_relation(
    student,
    teacher,
    *,
    temperatures=(2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight=1.0,
    batch_weight=1.0,
    class_weight=1.0,
):
    batch, classes = np.shape(student)
    total = 0.0
    for temperature in temperatures:
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        soft = forward_kl(student, teacher, temperature=temperature)
        total += instance_weight * soft.mean()
        total += batch_weight * np.square(q @ q.T - p @ p.T).sum() / batch
        total += class_weight * np.square(q.T @ q - p.T @ p).sum() / classes
    return total


def binary_distillation(student, teacher, *, temperature=1.0):
    p = 1 / (1 + np.exp(-np.asarray(teacher, float) / temperature))
    q = 1 / (1 + np.exp(-np.asarray(student, float) / temperature))
    value = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return np.square(temperature) * value


def logit_mse(student, teacher):
    gaps = np.asarray(student, float) - np.asarray(teacher, float)
    return np.square(gaps).mean(-1)


def standardize_logits(logits):
    z = np.asarray(logits, np.float64)
    scale = z.std(-1, ddof=1, keepdims=True) + 1e-7
    return (z - z.mean(-1, keepdims=True)) / scale


def bounded_regression(student, teacher, targets, *, margin):
    s, t, y = (np.asarray(a, np.float64) for a in (student, teacher, targets))
    own, bound = np.square(s - y).sum(-1), np.square(t - y).sum(-1)
    return np.where(own + margin > bound, own, 0)


def _over_ordered_pairs(student, teacher, term):
    """The mean of ``term(student_gap, teacher_gap)`` over the teacher's order."""
    s, t = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    values = np.zeros(s.shape[:-1])
    for position in np.ndindex(values.shape):
        a, b = s[position], t[position]
        terms = [
            term(a[k] - a[m], b[k] - b[m])
            for k in range(len(b))
            for m in range(len(b))
            if b[k] > b[m]
        ]
        values[position] = np.mean(terms) if terms else 0
    return values


def pairwise_hinge(student, teacher, *, margin=None):
    def term(s, t):
        return max(0, (t if margin is None else margin) - s)

    return _over_ordered_pairs(student, teacher, term)


def logistic_ranking(student, teacher):
    return _over_ordered_pairs(student, teacher, lambda s, t: np.log1p(np.exp(-s)))


# Language models


def top_k_buckets(student, teacher, *, k, temperature=1.0):
    """Probabilities of the teacher's k likeliest classes, and of all others as one."""
    order = np.argsort(-np.asarray(teacher, np.float64), axis=-1, kind="stable")
    for logits in (teacher, student):
        ranked = np.take_along_axis(softmax(logits, temperature), order, -1)
        parts = ranked[..., :k], ranked[..., k:].sum(-1, keepdims=True)
        yield np.concatenate(parts, -1)[..., : min(k + 1, ranked.shape[-1])]


def sparse_forward_kl(student, teacher, *, k=3, temperature=1.7):
    p, q = top_k_buckets(student, teacher, k=k, temperature=temperature)
    return np.square(temperature) * _kl(p, q)


def sparse_reverse_kl(student, teacher, *, k=3, temperature=1.7):
    p, q = top_k_buckets(student, teacher, k=k, temperature=temperature)
    return np.square(temperature) * _kl(q, p)


def universal_logit(student, teacher, *, temperature=1.0):
    p, q = (np.sort(softmax(z, temperature))[..., ::-1] for z in (teacher, student))
    size = max(p.shape[-1], q.shape[-1])
    gaps = np.zeros((*p.shape[:-1], size))
    gaps[..., : p.shape[-1]] += p
    gaps[..., : q.shape[-1]] -= q
    return np.square(temperature) * np.abs(gaps).sum(-1)


def chunk_likelihood(
    student, teacher, student_ids, teacher_ids, *, chunks, temperature
):
    """Of one text, token by token."""

    def likelihood(log_probs, ids, chunk):
        return np.exp(
            sum(lp for lp, i in zip(log_probs, ids, strict=True) if i == chunk)
        )

    def of(chunk):
        if chunk not in student_ids or chunk not in teacher_ids:
            return 0.0
        p = likelihood(teacher, teacher_ids, chunk) ** (1 / temperature)
        q = likelihood(student, student_ids, chunk) ** (1 / temperature)
        return temperature * _kl(np.array([p, 1 - p]), np.array([q, 1 - q]))

    return np.array([of(chunk) for chunk in range(chunks)])
