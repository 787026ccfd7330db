"""PyTorch's compiled losses, as a process that answers on a pipe.

It runs under a Python that has torch and NumPy and needs nothing of kdjax. For every
name of a loss that it reads, it runs value and gradient once and prints wall seconds,
CPU seconds, the value and the gradient's largest entry.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.benchmarks.inputs import ALPHA, LOSSES, TEMPERATURE, draw


def softened(logits: Tensor) -> Tensor:
    return F.log_softmax(logits / TEMPERATURE, dim=-1)


def mean_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return TEMPERATURE**2 * kl


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return mean_divergence(softened(student), softened(teacher))


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return mean_divergence(softened(teacher), softened(student))


def jensen_shannon(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_q, log_p = softened(student), softened(teacher)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (mean_divergence(log_m, log_p) + mean_divergence(log_m, log_q)) / 2


def knowledge_distillation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = forward_kl(student, teacher, labels)
    return ALPHA * F.cross_entropy(student, labels) + (1 - ALPHA) * soft


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    inputs = draw(options.tokens, options.vocabulary)
    student = torch.from_numpy(inputs.student).requires_grad_()
    teacher = torch.from_numpy(inputs.teacher)
    labels = torch.from_numpy(inputs.labels).long()
    compiled = {name: torch.compile(globals()[name]) for name in LOSSES}
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        value = compiled[line.strip()](student, teacher, labels)
        (gradient,) = torch.autograd.grad(value, student)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(wall, cpu, value.item(), gradient.abs().max().item(), flush=True)
        del value, gradient


if __name__ == "__main__":
    main()
