"""PTX text, as Triton's compiler leaves it, parsed into instructions and labels."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

Operand = str | tuple[str, ...]
"""A register, number or symbol; a memory operand without its brackets; the members of a {vector}."""


def names_of(operand: Operand) -> tuple[str, ...]:
    """A vector's members, or the one."""
    return (operand,) if isinstance(operand, str) else operand


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands;`"""

    guard: str | None
    """Predicate register, with a leading `!` if it must be off."""
    opcode: tuple[str, ...]
    """The parts between dots: `("ld", "global", "v4", "b32")`."""
    operands: tuple[Operand, ...]
    text: str
    """As it stands in the PTX, for messages."""

    @functools.cached_property
    def registers(self) -> frozenset[str]:
        """All registers among the operands, addresses included."""
        return frozenset(re.findall(r"%\w+", " ".join(itertools.chain(*map(names_of, self.operands)))))


@dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    threads: int
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label -> index of the instruction that follows it."""

    @functools.cached_property
    def meeting_points(self) -> dict[int, int]:
        """Branch -> the first instruction that all its ways come to (its immediate post-dominator).

        What every way from an instruction to the end passes is itself and what every way from each of its
        successors does. The nearest of these is the one that passes all the others.
        """
        end = len(self.instructions)
        starts = sorted({0, end, *self.labels.values(), *(i + 1 for i in range(end) if self._leaves(i))})
        after = {
            first: {starts[bisect.bisect_right(starts, place) - 1] for place in self._successors(last - 1)}
            for first, last in itertools.pairwise(starts)
        }
        passed = {first: set(starts) for first in after} | {end: {end}}
        changed = True
        while changed:
            changed = False
            for first in reversed(after):
                found = {first}.union(set.intersection(*(passed[place] for place in after[first])))
                changed, passed[first] = changed or found != passed[first], found
        return {
            last - 1: max(passed[first] - {first}, key=lambda place: len(passed[place]))
            for first, last in itertools.pairwise(starts)
            if self.instructions[last - 1].opcode[0] == "bra"
        }

    def _leaves(self, place: int) -> bool:
        return self.instructions[place].opcode[0] in ("bra", "ret")

    def _successors(self, place: int) -> list[int]:
        instruction, after = self.instructions[place], [place + 1]
        if not self._leaves(place):
            return after
        is_branch = instruction.opcode[0] == "bra"
        target = self.labels[str(instruction.operands[0])] if is_branch else len(self.instructions)
        return [target] if instruction.guard is None else [target, *after]


_STATEMENT = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]|([^,{}\[\]]+)")


def parse(ptx: str) -> Program:
    """The only kernel of a PTX module."""
    entry = re.search(r"\.entry (\w+)\((.*?)\)(.*?)\n\{\n", ptx, re.DOTALL)
    assert entry is not None, "no .entry"
    name, parameters, directives = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)
    assert threads is not None, "no .reqntid"
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _lines(ptx[entry.end() :]):
        if label := re.fullmatch(r"(\$?\w+):", line):
            labels[label[1]] = len(instructions)
        elif not line.startswith("."):
            instructions += [_instruction(part.strip()) for part in line.split(";") if part.strip()]
    return Program(
        name, int(threads[1]), tuple(re.findall(r"(\w+_param_\d+)", parameters)), tuple(instructions), labels
    )


def _lines(body: str) -> Iterator[str]:
    """Lines of a kernel without comments and inner braces; names that belong to a block get its number."""
    blocks: list[tuple[int, dict[str, str]]] = []
    for number, line in enumerate(body.split("\n")):
        line = line.partition("//")[0].strip()
        whole = re.fullmatch(r"\{(\s*\.reg .*)\}", line)  # a block on one line
        if line == "{" or whole:
            blocks.append((10**6 + number, {}))
        if line == "}" and not blocks:
            return
        for part in whole[1].split(";") if whole else [line.strip("{}") if line in ("{", "}") else line]:
            part = part.strip()
            if blocks:
                block, names = blocks[-1]
                if declared := re.fullmatch(r"\.reg \.(pred|b32) (\w+);?", part):
                    names[declared[2]] = f"%{'p' if declared[1] == 'pred' else 'r'}{block}"
                    continue
                for old, new in names.items():
                    part = re.sub(rf"(?<![\w$%]){old}\b", new, part)
                part = re.sub(r"^(\w+):$", rf"$\1_{block}:", part)
                part = re.sub(r"(\bbra(?:\.uni)?\s+)(\w+)", rf"\1$\2_{block}", part)
            if part:
                yield part
        if line == "}" or whole:
            blocks.pop()


def _instruction(text: str) -> Instruction:
    found = _STATEMENT.fullmatch(text)
    assert found is not None, f"not an instruction: {text}"
    guard, opcode, rest = found.groups()
    operands: list[Operand] = []
    for vector, memory, plain in _OPERAND.findall(rest):
        if vector:
            operands.append(tuple(part.strip() for part in vector.split(",")))
        elif memory or plain.strip():
            operands.append((memory or plain).strip())
    return Instruction(guard, tuple(re.split(r"[.]|::", opcode)), tuple(operands), text)
