"""Times losses over a linear head, chunk by chunk, beside the loss over all logits.

    python -m experiments.benchmarks.linear_head

Value and gradient by the student's hidden states and kernel, of kdjax.fused beside the
same loss over logits multiplied out, beside the four matrix products alone, beside what
PyTorch has where --torch names a Python, and beside Tunix' formula where that is
installed. Where libtpu is, both are also compiled for a TPU slice that is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import cores, forms, losses, report, traffic
from experiments.benchmarks.cores import Vectors
from experiments.benchmarks.inputs import ALPHA, LOSSES, TEMPERATURE, draw_heads
from experiments.benchmarks.report import Figure, Sample
from experiments.jobs.processes import Ask
from kdjax import fused
from kdjax.types import LinearHead, Mean

PLAIN, PRODUCTS = "plain", "matrix products"
DEFAULT_TARGETS = {PLAIN: 0.9, PRODUCTS: 1.15}
# Its logarithms and powers weigh more than the products.
TARGETS = {"jensen_shannon": {PLAIN: 1.0, PRODUCTS: 1.7}}
LIMIT = 0.2e9
"""Bytes of temporaries on a chip of the slice, beside the kernel's gradient."""
PEERS = {
    "forward_kl": {"torchtune, 8 chunks": "torchtune_forward_kl"},
    "jensen_shannon": {"Liger, chunked": "liger_jsd", "TRL's formula": "trl_jsd"},
}
"""What PyTorch's process calls the sides that compute the same."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    tokens: int = 2048
    """Tokens of either size."""
    vocabulary: int = 32000
    """Classes of the first size."""
    large_vocabulary: int = 151936
    """Classes of the second size, with which plain losses take several GB."""
    width: int = 256
    """Width of the student; the teacher is twice as wide."""
    losses: tuple[str, ...] = LOSSES
    """Which ones."""
    torch: Path | None = None
    """A Python that has torch and, better, liger-kernel and torchtune (pip install
    --no-deps is enough for both)."""
    vectors: Vectors = "widest"
    """That XLA's programs may use: the widest of these cores, as PyTorch's compiler
    takes them, or XLA's own choice, 256 bits."""
    chunk_size: int | None = None
    """Tokens at a time, kdjax' own choice by default."""
    repeats: int = 5
    """Rounds, in which each side runs twice; medians are shown, with quartiles."""
    only: Literal["first", "large", "slice"] | None = None
    """One of the parts; all by default (the slice where libtpu is installed)."""
    slice_tokens: int = 65536
    """Tokens on the TPU slice, over all chips."""
    slice_vocabulary: int = 152064
    """Classes on the TPU slice."""
    slice_width: int = 2048
    """Width of the student there; the teacher is twice as wide."""
    markdown: bool = False
    """Prints tables for a README."""
    json: Path | None = None
    """Also writes the figures to this file."""

    def __post_init__(self) -> None:
        for name in ("tokens", "vocabulary", "large_vocabulary", "width", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected 1 or more."
                )
        unknown = sorted(set(self.losses) - set(LOSSES))
        if unknown:
            raise ValueError(f"losses: got {unknown}, expected some of {LOSSES}.")


def main(config: Config) -> list[Figure]:
    """Measures and prints; returns what was printed."""
    parts = [config.only] if config.only else ["first", "large", "slice"]
    figures: list[Figure] = []
    notes = [cores.described(config.vectors)]
    if "first" in parts:
        figures += of_size(config, (config.tokens,), config.vocabulary)
    if "large" in parts:
        figures += of_size(config, (1, config.tokens), config.large_vocabulary)
    if "slice" in parts:
        if traffic.available():
            figures += on_slice(config)
        else:
            notes.append("slice: skipped, libtpu is not installed (extra `tpu`).")
    report.show(figures, notes, markdown=config.markdown)
    if config.json is not None:
        report.save(figures, notes, config.json)
    return figures


Heads = tuple[LinearHead, LinearHead, Array]
"""Student, teacher and labels."""


def draw(batch: tuple[int, ...], vocabulary: int, width: int) -> Heads:
    """The heads that PyTorch's process draws too, for a batch of this shape."""
    inputs = draw_heads(math.prod(batch), vocabulary, width)
    student, teacher = (
        LinearHead(jnp.asarray(hidden.reshape(*batch, -1)), jnp.asarray(kernel))
        for hidden, kernel in (inputs.student, inputs.teacher)
    )
    return student, teacher, jnp.asarray(inputs.labels.reshape(batch))


def chunked(loss: forms.Loss, chunk_size: int | None = None) -> Callable[..., Array]:
    """``(student, teacher, labels)`` to the mean, without the logits."""

    def mean(student: LinearHead, teacher: LinearHead, labels: Array) -> Array:
        arguments = loss, student, teacher, labels
        return fused.token_mean(*arguments, chunk_size=chunk_size).value()

    return mean


def plain(loss: forms.Loss) -> Callable[..., Array]:
    """The same from all logits."""

    def mean(student: LinearHead, teacher: LinearHead, labels: Array) -> Array:
        return Mean.of(loss(student.logits(), teacher.logits(), labels)).value()

    return mean


def tunix(student: LinearHead, teacher: LinearHead, labels: Array) -> Array:
    """Hard labels and forward KL as Tunix has them, over all logits."""
    from tunix.distillation.strategies.logit import LogitStrategy

    def unused(*_: Any) -> Any:
        """It is for whole models, which are not run here."""

    strategy = LogitStrategy(
        unused, unused, unused, temperature=TEMPERATURE, alpha=1 - ALPHA
    )
    classes = student.kernel.shape[-1]
    mean, _ = strategy.compute_loss(
        student.logits(), teacher.logits(), jax.nn.one_hot(labels, classes)
    )
    return mean


def products(student: LinearHead, teacher: LinearHead, labels: Array) -> Any:
    """Both logits and both gradients, as far as matrix products go."""
    slopes = student.logits() + teacher.logits()
    by_hidden = slopes @ student.kernel.T
    by_kernel = jnp.einsum("...d,...v->dv", student.hidden, slopes)
    return by_hidden, by_kernel


def of_size(
    config: Config, batch: tuple[int, ...], vocabulary: int
) -> Iterator[Figure]:
    """Time and temporary memory of each loss with its gradient."""
    arrays = draw(batch, vocabulary, config.width)
    widths = f"widths {config.width} and {2 * config.width}"
    section = f"Value and gradient, {[*batch]} x {vocabulary} float32, {widths}"
    compiled_here = functools.partial(cores.compiled, vectors=config.vectors)
    bare = compiled_here(products, *arrays)
    beside = functools.partial(report.beside, config.repeats, section)
    with contextlib.ExitStack() as stack:
        ask = None
        if config.torch is not None:
            size = {"tokens": math.prod(batch), "vocabulary": vocabulary}
            process = losses.asked(
                config.torch, "torch_heads", **size, width=config.width
            )
            ask = stack.enter_context(process)
        for name in config.losses:
            loss = forms.KDJAX[name]
            sides = {"kdjax": chunked(loss, config.chunk_size), PLAIN: plain(loss)}
            if name == "knowledge_distillation" and importlib.util.find_spec("tunix"):
                sides["Tunix' formula"] = tunix
            programs = {
                side: compiled_here(jax.value_and_grad(mean), *arrays)
                for side, mean in sides.items()
            }
            mine = _largest(programs["kdjax"](*arrays))
            for other in sides:
                _agree(other, mine, _largest(programs[other](*arrays)))
            runs = {
                side: report.stopwatch(functools.partial(losses.run, program, arrays))
                for side, program in (programs | {PRODUCTS: bare}).items()
            }
            runs |= _of_torch(ask, name, mine) if ask is not None else {}
            targets = TARGETS.get(name, DEFAULT_TARGETS)
            ours = runs.pop("kdjax")
            yield from beside(name, ours, runs, targets)
            yield _memory(section, name, programs)


def _of_torch(
    ask: Ask, name: str, mine: Sequence[float]
) -> dict[str, Callable[[], Sample]]:
    """The sides of PyTorch's that compute this loss and are installed."""

    def timed(side: str) -> Sample:
        wall, cpu, *_ = ask(side)
        return Sample(wall, cpu)

    runs: dict[str, Callable[[], Sample]] = {}
    for label, side in PEERS.get(name, {}).items():
        answer = ask(side)
        if len(answer) > 1:
            _agree(label, mine, answer[2:])
            runs[label] = functools.partial(timed, side)
    return runs


def _largest(found: tuple[Array, LinearHead]) -> list[float]:
    """The largest gradients by hidden states and by kernel."""
    _, by = found
    return [float(jnp.abs(by.hidden).max()), float(jnp.abs(by.kernel).max())]


def _agree(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Both sides compute the same thing, or their times say nothing."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=name)


def _memory(section: str, name: str, programs: dict[str, Any]) -> Figure:
    ours, theirs = (
        programs[side].memory_analysis().temp_size_in_bytes
        for side in ("kdjax", "plain")
    )
    sides = f"{ours / 1e6:.1f} MB", "plain", f"{theirs / 1e6:.1f} MB"
    return Figure(section, name, "temporaries", *sides, ours / theirs, target=0.1)


def on_slice(config: Config) -> Iterator[Figure]:
    """Memory and collectives per chip, with tokens and with classes split too."""
    shape = config.slice_tokens, config.slice_vocabulary, config.slice_width
    for ways, layout in (((16, 1), "tokens"), ((4, 4), "tokens and classes")):
        section = f"{[*shape]} bfloat16 on {traffic.SLICE}, {layout} split, per chip"
        # It is summed in float32, and leaves in the kernel's dtype.
        gradient = 4 * config.slice_width * config.slice_vocabulary / ways[1]
        first, *_ = config.losses
        # That of the others is alike, and each takes as long to compile as kdjax'.
        theirs = traffic.program(compiled(plain(forms.KDJAX[first]), ways, *shape))
        for name in config.losses:
            mean = chunked(forms.KDJAX[name], config.chunk_size)
            ours = traffic.program(compiled(mean, ways, *shape))
            beyond = max(0.0, ours.temporaries - gradient)
            yield Figure(
                section,
                name,
                "temporaries",
                f"{ours.temporaries / 1e6:.1f} MB",
                f"{PLAIN} {first}",
                f"{theirs.temporaries / 1e6:.1f} MB",
                ours.temporaries / theirs.temporaries,
            )
            yield Figure(
                section,
                name,
                "beyond the kernel's gradient",
                f"{beyond / 1e6:.1f} MB",
                "a limit",
                f"{LIMIT / 1e6:.1f} MB",
                beyond / LIMIT,
                target=1.0,
            )
            yield Figure(
                section,
                name,
                f"gathered (+{ours.collectives['all-reduce']} all-reduce)",
                str(ours.moved),
                f"{PLAIN} {first}",
                f"{theirs.moved} (+{theirs.collectives['all-reduce']})",
                ours.moved,
                target=0,
            )
        yield _roofline(section, first, config, ways)


def _roofline(section: str, name: str, config: Config, ways: tuple[int, int]) -> Figure:
    """What a chip needs for one chunk, by its traffic and by its products."""
    # As many tokens as kdjax takes by default for so many ways.
    chunk = config.chunk_size or fused.LEAST_TOKENS * ways[1]
    mean = chunked(forms.KDJAX[name], chunk)
    shape = chunk * ways[0], config.slice_vocabulary, config.slice_width
    costs = compiled(mean, ways, *shape).cost_analysis()
    chip = traffic.chip()
    traffic_ms = 1e3 * costs["bytes accessed"] / chip.bandwidth
    products_ms = 1e3 * costs["flops"] / chip.flops
    return Figure(
        section,
        name,
        f"a chunk of {chunk} tokens, by traffic",
        f"{traffic_ms:.2f} ms",
        "by products",
        f"{products_ms:.2f} ms",
        traffic_ms / products_ms,
    )


def compiled(
    mean: Callable[..., Array],
    ways: tuple[int, int],
    tokens: int,
    vocabulary: int,
    width: int,
) -> Any:
    """Value and gradient for a slice: tokens and classes split so many ways."""
    mesh = traffic.mesh(ways)

    def array(shape: tuple[int, ...], dtype: Any, *spec: str | None) -> Any:
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def head(width: int) -> LinearHead:
        return LinearHead(
            array((tokens, width), jnp.bfloat16, "data"),
            array((width, vocabulary), jnp.bfloat16, None, "model"),
        )

    labels = array((tokens,), jnp.int32, "data")

    def on_mesh(*arrays: Any) -> Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return mean(*arrays)

    student, teacher = head(width), head(2 * width)
    kept = jax.tree.map(lambda leaf: leaf.sharding, student)
    function: Any = jax.jit(jax.value_and_grad(on_mesh), out_shardings=(None, kept))
    return function.lower(student, teacher, labels).compile()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
