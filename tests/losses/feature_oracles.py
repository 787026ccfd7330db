"""The losses over features once more, in plain float64 NumPy, from their papers.

No code is shared with kdjax, and nothing is done for numerics. Maps are channels-last;
what is masked is deleted by the caller.
"""

import numpy as np

from tests.losses.oracles import forward_kl


def feature_mse(student, teacher):
    return np.square(student - teacher).mean(-1)


def feature_cosine(student, teacher):
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / lengths


def variational_information(mean, target, *, log_scale):
    variance = np.log(1 + np.exp(np.asarray(log_scale, np.float64))) + 1e-5
    values = (np.square(mean - target) / variance + np.log(variance)) / 2
    return values.mean((1, 2, 3))


def masked_generation(generated, teacher):
    return np.square(generated - teacher).sum((1, 2, 3))


def _pool(maps, height, width):
    """Average pooling into bins from floor(i H / h) to ceil((i + 1) H / h)."""
    batch, rows, columns, channels = maps.shape
    result = np.zeros((batch, height, width, channels))
    for i in range(height):
        for j in range(width):
            top, bottom = i * rows // height, int(np.ceil((i + 1) * rows / height))
            left, right = j * columns // width, int(np.ceil((j + 1) * columns / width))
            result[:, i, j] = maps[:, top:bottom, left:right].mean((1, 2))
    return result


def _of_one_size(first, second):
    size = np.minimum(first.shape[1:3], second.shape[1:3])
    return _pool(first, *size), _pool(second, *size)


def _attention(maps, power):
    flat = (np.abs(maps) ** power).sum(-1).reshape(len(maps), -1)
    return flat / np.linalg.norm(flat, axis=-1, keepdims=True)


def attention_transfer(student, teacher, *, power=2.0):
    student, teacher = _of_one_size(student, teacher)
    gaps = _attention(student, power) - _attention(teacher, power)
    return np.square(gaps).mean(-1)


def factor_transfer(student, teacher, *, power=2.0):
    student, teacher = _of_one_size(student, teacher)
    gaps = _attention(student, power) - _attention(teacher, power)
    return np.abs(gaps).mean(-1)


def neuron_selectivity(student, teacher):
    student, teacher = _of_one_size(student, teacher)
    values = []
    for s, t in zip(student, teacher, strict=True):
        s, t = (each.reshape(-1, each.shape[-1]) for each in (s, t))
        s, t = (each / np.linalg.norm(each, axis=0) for each in (s, t))
        kernels = (np.square(a.T @ b).mean() for a, b in ((t, t), (s, s), (s, t)))
        teachers, students, mixed = kernels
        values.append(teachers + students - 2 * mixed)
    return np.array(values)


def channel_distribution(student, teacher, *, temperature=4.0):
    student, teacher = (
        each.reshape(len(each), -1, each.shape[-1]).swapaxes(1, 2)
        for each in (student, teacher)
    )
    return forward_kl(student, teacher, temperature=temperature).mean(-1)


def activation_boundary(student, teacher, *, margin=1.0):
    off, on = np.maximum(student + margin, 0), np.maximum(margin - student, 0)
    return np.square(np.where(teacher > 0, on, off)).sum((1, 2, 3))


def margin_relu_mse(student, teacher, *, margin):
    target = np.maximum(teacher, np.asarray(margin, np.float64))
    partial = np.where((student <= target) & (target <= 0), 0, student - target)
    return np.square(partial).sum((1, 2, 3))


def hierarchical_context(student, teacher, *, sizes=(4, 2, 1)):
    terms = [np.square(student - teacher).mean((1, 2, 3))]
    for size in sizes:
        if size < student.shape[1]:
            pooled = _pool(student, size, size) - _pool(teacher, size, size)
            terms.append(np.square(pooled).mean((1, 2, 3)))
    weights = 0.5 ** np.arange(len(terms))
    return (weights[:, None] * terms).sum(0) / weights.sum()


def solution_flow(student, teacher):
    def flow(layers):
        first, second = _of_one_size(*layers)
        positions = first.shape[1] * first.shape[2]
        return np.einsum("bhwc,bhwd->bcd", first, second) / positions

    return np.square(flow(student) - flow(teacher)).mean((1, 2))


def channel_similarity(student, teacher):
    def similarity(maps):
        gram = np.einsum("bhwc,bhwd->bcd", maps, maps)
        return gram / np.linalg.norm(gram, axis=-1, keepdims=True)

    gaps = similarity(student) - similarity(teacher)
    return np.square(gaps).sum((1, 2)) / gaps.shape[-1]


def feature_correlation(student, teacher):
    def standardized(maps):
        mean, deviation = maps.mean((0, 1, 2)), maps.std((0, 1, 2), ddof=1)
        return (maps - mean) / (deviation + 1e-6)

    gaps = standardized(student) - standardized(teacher)
    return np.square(gaps).mean((1, 2, 3)) / 2


def linear_cka(student, teacher):
    s, t = student - student.mean(0), teacher - teacher.mean(0)
    alike = np.square(s.T @ t).sum()
    return 1 - alike / (np.linalg.norm(s.T @ s) * np.linalg.norm(t.T @ t))
