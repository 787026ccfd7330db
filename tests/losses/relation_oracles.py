"""Relations, attention and scores once more, in plain float64 NumPy, from the papers.

No code is shared with kdjax, and nothing is done for numerics: these are for inputs of
ordinary size. What is masked is deleted by the caller.
"""

import math

import numpy as np

from tests.losses.oracles import forward_kl


def huber(gap):
    return gap**2 / 2 if abs(gap) < 1 else abs(gap) - 1 / 2


def relational_distance(student, teacher):
    def relative(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[~np.eye(len(x), dtype=bool)].mean()

    gaps = relative(student) - relative(teacher)
    return np.mean([huber(gap) for gap in gaps.ravel()])


def relational_angle(student, teacher):
    def cosine(x, i, j, k):
        first, second = x[i] - x[j], x[k] - x[j]
        length = np.linalg.norm(first) * np.linalg.norm(second)
        return first @ second / length if length > 0 else 0.0

    n = len(student)
    triplets = np.ndindex(n, n, n)
    return np.mean([huber(cosine(student, *t) - cosine(teacher, *t)) for t in triplets])


def similarity_preserving(student, teacher):
    def likeness(x):
        rows = x.reshape(len(x), -1)
        gram = rows @ rows.T
        return gram / np.sqrt((gram**2).sum(1, keepdims=True))

    return ((likeness(student) - likeness(teacher)) ** 2).sum() / len(student) ** 2


def cosines(x):
    x = x / np.sqrt((x**2).sum(-1, keepdims=True))
    return x @ x.T


def correlation_congruence(student, teacher, *, gamma=0.4, order=2):
    def kernel(x):
        terms = [
            math.exp(-2 * gamma)
            * (2 * gamma) ** p
            / math.factorial(p)
            * cosines(x) ** p
            for p in range(order + 1)
        ]
        return sum(terms)

    return ((kernel(student) - kernel(teacher)) ** 2).mean()


def probabilistic_transfer(student, teacher):
    def neighbours(x):
        x = x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-7)
        alike = (x @ x.T + 1) / 2
        return alike / alike.sum(1, keepdims=True)

    p, q = neighbours(teacher), neighbours(student)
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean()


def contrastive_representation(
    student, teacher, negatives, *, dataset_size, temperature=0.07, normalizer=None
):
    contrast = np.concatenate([teacher[:, None], negatives], 1)
    x = np.exp(np.einsum("bd,bkd->bk", student, contrast) / temperature)
    x = x / (x.mean() * dataset_size if normalizer is None else normalizer)
    h = x / (x + negatives.shape[1] / dataset_size)
    return -(np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)).mean()


def contrastive(student, teacher, *, temperature=0.07):
    s = student / np.linalg.norm(student, axis=1, keepdims=True)
    t = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    powers = np.exp(s @ t.T / temperature)
    return -np.log(np.diag(powers) / powers.sum(1)).mean()


def attention_mse(student, teacher):
    return ((student - teacher) ** 2).mean(-1)


def attention_kl(student, teacher):
    return forward_kl(student, teacher)


def self_attention_relation(student, teacher, *, heads):
    def relation(x):
        parts = np.stack(np.split(x, heads, -1), 1)
        return np.einsum("bhqd,bhkd->bhqk", parts, parts) / np.sqrt(parts.shape[-1])

    return forward_kl(relation(student), relation(teacher))


def margin_mse(student, teacher):
    def margins(scores):
        return scores[..., :1] - scores[..., 1:]

    return ((margins(student) - margins(teacher)) ** 2).mean(-1)


def score_kl(student, teacher, *, temperature=1.0):
    return forward_kl(student, teacher, temperature=temperature)
