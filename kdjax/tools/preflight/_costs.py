"""What compiled programs cost: products, memory traffic and collectives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kdjax.tools.preflight._programs import Computation, Instruction, Program, Shape

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# What a chip sends and receives for one byte of the larger side, along a ring of n.
_MOVED = {"all-reduce": 2.0, "collective-permute": 1.0}

# The scope that teachers' outputs are traced in.
_TEACHER = re.compile(r"\bteacher\b")
_GROUP_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[(\d+(?:,\d+)*)\]<=")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_GEMM_AXES = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_GEMM = re.compile(r'custom_call_target="__cublas\$')

# They name what is there already.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "tuple",
    "while",
}
_READS_PART = {"dynamic-slice", "gather", "slice"}


class Collective(NamedTuple):
    """What chips send each other at one place of a program.

    Attributes:
      kind: one of ``KINDS``.
      shapes: sizes of the arrays of the larger side, what is gathered or reduced.
      times: how often it runs.
      payload: bytes of that side, of one run.
      moved: bytes that a chip sends in one run, at least: along a ring.
      source: where it was traced, as the program has it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    times: int
    payload: int
    moved: float
    source: str


class Costs(NamedTuple):
    """Of one run of a program, on each device.

    Attributes:
      teacher_flops: of the matrix products and convolutions of the teacher, two for a
        multiplication with its addition; those in loops as often as they run. What a
        GPU leaves to cuDNN is not known.
      student_flops: of all others.
      traffic: bytes read from and written to main memory.
      collectives: one by one.
      unknown_loops: those that end when their data say so; they count as one turn.
    """

    teacher_flops: float
    student_flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    unknown_loops: int

    @property
    def flops(self) -> float:
        """Of teacher and student together."""
        return self.teacher_flops + self.student_flops


def costs(text: str) -> Costs:
    """Reads them from the text of ``compiled.as_text()``."""
    program = Program.read(text)
    runs, unknown_loops = program.runs()
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions.group(1)) if partitions else 1
    flops, traffic = {True: 0.0, False: 0.0}, 0.0
    collectives: dict[str, Collective] = {}
    for computation, times, fused in runs:
        for each in computation.instructions.values():
            of_teacher = _TEACHER.search(each.source) is not None
            flops[of_teacher] += times * _flops(each, computation)
            if not fused:
                traffic += times * _traffic(each, computation, program)
            found = _collective(each, computation, times, devices)
            if found is not None:
                # One that goes on behind several others is in each of their fusions.
                channel = each.attribute("channel_id") or each.name
                collectives.setdefault(channel, found)
    return Costs(
        flops[True], flops[False], traffic, tuple(collectives.values()), unknown_loops
    )


def _flops(instruction: Instruction, inside: Computation) -> float:
    result = instruction.shapes[0] if instruction.shapes else None
    if instruction.opcode == "dot":
        over = instruction.sizes_of("lhs_contracting_dims")
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, inside)
    elif _GEMM.search(instruction.attributes):
        over = _gemm_axes(instruction)
    else:
        return 0.0
    assert result is not None
    left = _operands(instruction, inside)[0].sizes
    return 2.0 * math.prod(result.sizes) * math.prod(left[axis] for axis in over)


def _gemm_axes(instruction: Instruction) -> tuple[int, ...]:
    """The axes summed over by a product that XLA leaves to cuBLAS."""
    found = _GEMM_AXES.search(instruction.attributes)
    return tuple(map(int, re.findall(r"\d+", found.group(1)))) if found else ()


def _convolution_flops(instruction: Instruction, inside: Computation) -> float:
    """As products that fall on padding are not counted, TPU products come out right.

    XLA writes some of them as convolutions over mostly padding.
    """
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        return 0.0
    of_input, of_kernel, of_output = labels.groups()
    given, kernel = (shape.sizes for shape in _operands(instruction, inside)[:2])
    result = instruction.shapes[0].sizes
    pairs = (
        result[of_output.index("b")]
        * result[of_output.index("f")]
        * kernel[of_kernel.index("i")]
    )
    window = _window(instruction, sum(label.isdigit() for label in of_output))
    for axis, settings in enumerate(window):
        label = str(axis)
        pairs *= _places(
            given[of_input.index(label)],
            kernel[of_kernel.index(label)],
            result[of_output.index(label)],
            settings,
        )
    return 2.0 * pairs


class _Axis(NamedTuple):
    """How a window goes along an axis."""

    stride: int
    padding: int
    input_dilation: int
    kernel_dilation: int


def _window(instruction: Instruction, axes: int) -> list[_Axis]:
    found = _WINDOW.search(instruction.attributes)
    items = dict(part.split("=") for part in found.group(1).split()) if found else {}

    def numbers(name: str, default: str) -> list[int]:
        parts = items[name].split("x") if name in items else [default] * axes
        return [int(part.split("_")[0]) for part in parts]

    names = ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
    return [_Axis(*each) for each in zip(*(numbers(*n) for n in names), strict=True)]


def _places(given: int, kernel: int, result: int, axis: _Axis) -> int:
    """Pairs of a place in the result and one in the kernel that meet an input."""
    starts = np.arange(result)[:, None] * axis.stride - axis.padding
    at = starts + np.arange(kernel) * axis.kernel_dilation
    inside = (at >= 0) & (at <= (given - 1) * axis.input_dilation)
    return int((inside & (at % axis.input_dilation == 0)).sum())


def _operands(instruction: Instruction, inside: Computation) -> list[Shape]:
    """What it takes, array by array."""
    given = (inside.instructions[name] for name in instruction.operands)
    return [shape for each in given for shape in each.shapes]


def _in_memory(shapes: Sequence[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _traffic(instruction: Instruction, inside: Computation, program: Program) -> float:
    """Bytes that one instruction reads from main memory and writes there."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "fusion":
        called = program.computations[instruction.attribute("calls") or ""]
        return sum(_fusion_traffic(instruction, called))
    if opcode in _READS_PART:
        return 2.0 * _in_memory(instruction.shapes)
    operands = _operands(instruction, inside)
    if opcode == "dynamic-update-slice":
        return 2.0 * _in_memory(operands[1:2])
    if opcode == "copy-start":
        # Its result names the source again.
        return float(_in_memory(instruction.shapes[:2]))
    return float(_in_memory(operands) + _in_memory(instruction.shapes))


def _fusion_traffic(instruction: Instruction, fused: Computation) -> Iterator[float]:
    """Parts of arrays count where only parts are read or written."""
    for each in fused.instructions.values():
        if each.opcode == "parameter" and not each.shapes[0].on_chip:
            yield from _parameter_traffic(each, fused)
    written = fused.instructions[fused.root]
    parts = written.operands if written.opcode == "tuple" else (written.name,)
    for part, shape in zip(parts, instruction.shapes, strict=False):
        inner = fused.behind(part)
        if inner.opcode == "dynamic-update-slice":
            shape = fused.instructions[inner.operands[1]].shapes[0]
        yield _in_memory([shape])


def _parameter_traffic(parameter: Instruction, fused: Computation) -> Iterator[float]:
    users = list(_users(parameter.name, fused))
    partly = [_part_of(user, name) for user, name in users]
    if users and None not in partly:
        yield from (part for part in partly if part is not None)
    else:
        yield sum(shape.bytes for shape in parameter.shapes)


def _part_of(user: Instruction, name: str) -> float | None:
    """Bytes that an instruction needs of an operand, ``None`` for all of it."""
    if user.operands[0] == name:
        if user.opcode in _READS_PART:
            return sum(shape.bytes for shape in user.shapes)
        if user.opcode == "dynamic-update-slice":
            return 0.0
    return None


def _users(name: str, fused: Computation) -> Iterator[tuple[Instruction, str]]:
    """Instructions that take it, under whatever name bitcasts gave it."""
    for each in fused.instructions.values():
        if name in each.operands:
            if each.opcode == "bitcast":
                yield from _users(each.name, fused)
            else:
                yield each, name


def _collective(
    instruction: Instruction, inside: Computation, times: int, devices: int
) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    given = _operands(instruction, inside)
    made = list(instruction.shapes)
    # A started one's result names its operands again.
    made = made[len(given) :] if len(made) > len(given) else made
    if kind == "all-reduce" and _scatters(instruction, inside):
        kind = "reduce-scatter"
    larger = made if kind == "all-gather" else given
    payload = sum(shape.bytes for shape in larger)
    size = _group_size(instruction, devices)
    ring = 1.0 if kind == "collective-permute" else (size - 1) / size
    return Collective(
        kind,
        tuple(shape.sizes for shape in larger),
        times,
        payload,
        payload * ring * _MOVED.get(kind, 1.0),
        instruction.source,
    )


def _scatters(instruction: Instruction, inside: Computation) -> bool:
    """Whether a TPU fusion keeps a part alone, and so is a reduce-scatter."""
    root = inside.instructions[inside.root]
    return root.opcode == "dynamic-slice" and root.operands[0] == instruction.name


def _group_size(instruction: Instruction, devices: int) -> int:
    """How many devices take part in each group."""
    text = instruction.attributes
    if found := _GROUP_LIST.search(text):
        return len(found.group(1).split(","))
    if found := _GROUP_IOTA.search(text):
        return int(found.group(1).split(",")[-1])
    if found := _GROUP_MESH.search(text):
        sizes = {name: int(size) for name, size in _AXIS.findall(found.group(1))}
        names = re.findall(r"'(\w+)'", found.group(2))
        return math.prod(sizes[name] for name in names)
    return devices
