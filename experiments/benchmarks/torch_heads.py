"""What PyTorch's users have over a linear head, as a process that answers on a pipe.

It runs under a Python that has torch and, for some sides, liger-kernel or torchtune; it
needs nothing of kdjax. A line names a side. It runs value and gradient once and prints
wall seconds, CPU seconds, and the largest gradients by hidden states and by kernel; for
a side that is not installed, ``nan``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.benchmarks.inputs import TEMPERATURE, draw_heads

CHUNKS = 8
"""torchtune's default."""


class Heads(NamedTuple):
    """Hidden states ``[N, D]`` and weights ``[V, D]``, as ``torch.nn.Linear`` has."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor


Mean = Callable[[Heads], Tensor]


def liger_jsd() -> Mean:
    """Liger-Kernel's JSD in chunks, compiled, without the hard labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=TEMPERATURE
    )
    return lambda heads: TEMPERATURE**2 * loss(*heads)


def torchtune_forward_kl() -> Mean:
    """torchtune's forward KL over chunks of logits, compiled as its recipes do."""
    # The package itself wants torchao and more; this file of it wants torch alone.
    package = importlib.util.find_spec("torchtune")
    if package is None or package.origin is None:
        raise ImportError
    path = Path(package.origin).parent / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("kd_losses", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=CHUNKS)
    loss.fkl_loss = torch.compile(loss.fkl_loss)

    def mean(heads: Heads) -> Tensor:
        def chunks(hidden: Tensor, weight: Tensor) -> list[Tensor]:
            parts = hidden[None].chunk(CHUNKS, dim=1)
            return [part @ weight.T / TEMPERATURE for part in parts]

        student = chunks(heads.student, heads.student_weight)
        teacher = chunks(heads.teacher, heads.teacher_weight)
        return TEMPERATURE**2 * loss(student, teacher, heads.labels[None])

    return mean


def trl_jsd() -> Mean:
    """TRL's formula of the generalised JSD, with beta 0.5, over all logits."""

    def mean(heads: Heads) -> Tensor:
        log_q = F.log_softmax(heads.student @ heads.student_weight.T / TEMPERATURE, -1)
        log_p = F.log_softmax(heads.teacher @ heads.teacher_weight.T / TEMPERATURE, -1)
        log_m = torch.logsumexp(torch.stack([log_q, log_p]) - math.log(2), dim=0)
        by_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        by_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        return TEMPERATURE**2 * (by_teacher + by_student).sum() / 2 / len(log_q)

    return mean


SIDES: dict[str, Callable[[], Mean]] = {
    "liger_jsd": liger_jsd,
    "torchtune_forward_kl": torchtune_forward_kl,
    "trl_jsd": trl_jsd,
}


def drawn(tokens: int, vocabulary: int, width: int) -> Heads:
    inputs = draw_heads(tokens, vocabulary, width)
    student, teacher = inputs.student, inputs.teacher
    weights = [torch.from_numpy(each[1].T.copy()) for each in (student, teacher)]
    return Heads(
        torch.from_numpy(student[0]).requires_grad_(),
        weights[0].requires_grad_(),
        torch.from_numpy(teacher[0]),
        weights[1],
        torch.from_numpy(inputs.labels).long(),
    )


def run(mean: Mean, heads: Heads) -> tuple[float, ...]:
    """Seconds of the clock and of all cores, and the largest gradients."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = mean(heads)
    moved = heads.student, heads.student_weight
    gradients = torch.autograd.grad(value, moved)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, *(by.abs().max().item() for by in gradients)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("tokens", "vocabulary", "width", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    heads = drawn(options.tokens, options.vocabulary, options.width)
    made: dict[str, Any] = {}
    for line in sys.stdin:
        name = line.strip()
        try:
            made[name] = made.get(name) or SIDES[name]()
        except ImportError:
            print(math.nan, flush=True)
            continue
        print(*run(made[name], heads), flush=True)


if __name__ == "__main__":
    main()
