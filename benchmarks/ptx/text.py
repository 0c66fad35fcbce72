"""PTX as Triton writes it: one kernel's text to a list of instructions."""

from __future__ import annotations

import dataclasses
import functools
import re


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register, a parameter or a symbol."""

    base: str
    offset: int


Operand = str | int | Address | tuple["Operand", ...]
"""A register, label or symbol by name; a constant, of a float its bits; an address; a vector."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: the predicate register that has to be `wanted`, None for always.
        parts: its name at the dots: ("add", "s32").
        text: as it was written.
        source: the line of Triton that it comes from, "file.py:line"; empty where that is not said.
    """

    guard: str | None
    wanted: bool
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str
    source: str


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A kernel.

    Attributes:
        parameters: name and bytes of each, in order.
        threads: of a block.
        labels: where each label stands in `instructions`.
    """

    parameters: tuple[tuple[str, int], ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@functools.cache
def parse(text: str) -> Program:
    """The one kernel of a PTX text.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = re.findall(r"\.entry\s+\w+\((.*?)\)(.*?)\n\{\n(.*?)\n\}", text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels in the text; one was expected")
    header, directives, body = found[0]
    parameters = tuple(
        (name, {"32": 4, "64": 8, "16": 2, "8": 1}[bits])
        for bits, name in re.findall(r"\.param \.[ubsf](\d+).*?(\w+)\s*(?:,|$)", header, re.MULTILINE)
    )
    (threads,) = re.findall(r"\.reqntid (\d+)", directives)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    body = re.sub(r"^\s*\.loc\b[^\n]*// (\S+\.py:\d+)[^\n]*", r"#\1;", body, flags=re.MULTILINE)
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", body, flags=re.MULTILINE)
    for raw in body.split(";"):
        statement = " ".join(raw.split()).lstrip("}{ ")  # a scope begins or ends; its registers are ours to share
        while label := re.match(r"(\$\w+): *", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :].lstrip("}{ ")
        if statement.startswith("#"):
            source = statement[1:]
        elif statement and not statement.startswith("."):
            instructions.append(_instruction(statement, source))
    return Program(parameters, int(threads), tuple(instructions), labels)


def _instruction(statement: str, source: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+) )?(\S+) ?(.*)", statement)
    assert found is not None, statement
    operands = tuple(_operand(text.strip()) for text in _OPERAND.findall(found[4]))
    return Instruction(found[2], found[1] != "!", tuple(found[3].split(".")), operands, statement, source)


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_operand(each.strip()) for each in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", text):
        return int(text, 0)
    return text
