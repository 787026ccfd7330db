"""Reads the text of compiled programs, and knows how often each part of them runs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")

_CALLS = {"call", "async-start", "conditional"}
_CALLED = (
    "calls",
    "to_apply",
    "branch_computations",
    "true_computation",
    "false_computation",
)


class Shape(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: as the program calls it, such as ``bf16``.
      sizes: of its axes.
      on_chip: whether it lies in the chip's own fast memory, and so causes no traffic.
    """

    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        """What it takes, without padding."""
        return math.ceil(math.prod(self.sizes) * _bits(self.dtype) / 8)


@functools.cache
def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = _BITS.search(dtype)
    # A token has no size.
    return int(found.group()) if found else 0


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: what others call its result.
      opcode: what it does.
      shapes: of its result, several for a tuple.
      operands: names of instructions.
      literal: the text between its parentheses.
      attributes: the text behind them.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The text of ``name=text``, without its braces; ``None`` if there is none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return None if found is None else found.group(1) or found.group(2) or ""

    def sizes_of(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of whole numbers; ``()`` if there is none."""
        return tuple(map(int, filter(None, (self.attribute(name) or "").split(","))))

    @property
    def source(self) -> str:
        """The path of scopes and functions that it was traced in."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


class Computation(NamedTuple):
    """A function of a program."""

    instructions: Mapping[str, Instruction]
    root: str

    def behind(self, name: str) -> Instruction:
        """What a copy is of, or a bitcast."""
        found = self.instructions[name]
        while found.opcode in ("bitcast", "copy"):
            found = self.instructions[found.operands[0]]
        return found

    def number(self, name: str) -> int | None:
        """A constant's value; ``None`` if it is something else."""
        found = self.behind(name)
        return int(found.literal) if found.opcode == "constant" else None


class Run(NamedTuple):
    """How a computation runs.

    Attributes:
      computation: which one.
      times: how often in one run of the program.
      fused: whether it is a part of an instruction, and keeps nothing in memory.
    """

    computation: Computation
    times: int
    fused: bool


class Program(NamedTuple):
    """A compiled program, as one of its devices runs it.

    Attributes:
      computations: by name.
      entry: the name of the one that the others are called from.
    """

    computations: Mapping[str, Computation]
    entry: str

    @classmethod
    def read(cls, text: str) -> Program:
        """Takes the text of ``compiled.as_text()``."""
        computations, entry, name, root = {}, "", "", ""
        lines: dict[str, Instruction] = {}
        for line in map(functools.partial(_COMMENT.sub, ""), text.splitlines()):
            if head := _COMPUTATION.match(line):
                name, lines = head.group(2), {}
                entry = name if head.group(1) else entry
            elif line.startswith("}"):
                computations[name] = Computation(lines, root)
            elif found := _INSTRUCTION.match(line):
                is_root, own, rest = found.groups()
                lines[own] = _instruction(own, rest)
                root = own if is_root else root
        return cls(computations, entry)

    def runs(self) -> tuple[list[Run], int]:
        """Every computation that runs, once for each caller.

        Returns:
          The runs, and how many loops among them end when their data say so, whose
          bodies are taken to run once.
        """
        unknown = 0
        runs: list[Run] = []
        waiting = [(self.entry, 1, False)]
        while waiting:
            name, times, fused = waiting.pop()
            caller = self.computations[name]
            runs.append(Run(caller, times, fused))
            for each in caller.instructions.values():
                if each.opcode == "while":
                    trips = self._trips(each, caller)
                    unknown += trips is None
                    waiting.append((_called(each, "body"), times * (trips or 1), fused))
                elif each.opcode == "fusion":
                    waiting.append((_called(each, "calls"), times, True))
                elif each.opcode in _CALLS:
                    waiting += [(called, times, fused) for called in _all_called(each)]
        return runs, unknown

    def _trips(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a loop's body runs, if the program says so."""
        if known := _TRIPS.search(loop.attributes):
            return int(known.group(1))
        # TPU programs do not tell (libtpu of jax 0.10.2), but what XLA makes of a scan
        # counts by a constant up to a constant.
        condition = self.computations[_called(loop, "condition")]
        body = self.computations[_called(loop, "body")]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, limit = (condition.instructions[name] for name in test.operands)
        place = counter.sizes_of("index")
        if not place:
            return None
        carried, made = (
            inside.behind(name).operands[place[0]]
            for inside, name in ((caller, loop.operands[0]), (body, body.root))
        )
        numbers = [
            condition.number(limit.name),
            caller.number(carried),
            *(body.number(name) for name in body.behind(made).operands),
        ]
        found = [number for number in numbers if number is not None]
        if len(found) != 3 or body.behind(made).opcode != "add":
            return None
        last, first, by = found
        return -(-(last - first) // by)


def _called(instruction: Instruction, name: str) -> str:
    called = instruction.attribute(name)
    if called is None:
        raise ValueError(f"{instruction.name}: a {instruction.opcode} without {name}.")
    return called


def _all_called(instruction: Instruction) -> Iterator[str]:
    for name in _CALLED:
        text = instruction.attribute(name)
        if text is not None:
            yield from (part.strip().lstrip("%") for part in text.split(","))


def _instruction(name: str, text: str) -> Instruction:
    """What stands behind ``name =``."""
    # A tuple's parentheses, or an array's layout, may hold further ones.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"{name}: not an instruction of a compiled program: {text}")
    close = _closing(text, opcode.end() - 1)
    literal = text[opcode.end() : close - 1]
    return Instruction(
        name,
        opcode.group(1),
        tuple(_shapes(text[:end])),
        tuple(_NAME.findall(literal)),
        literal,
        text[close:],
    )


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"unbalanced parentheses: {text}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        # 1 is the vector memory of a TPU; others are main memory and the host's.
        on_chip = space is not None and space.group(1) == "1"
        yield Shape(dtype, tuple(map(int, filter(None, sizes.split(",")))), on_chip)
