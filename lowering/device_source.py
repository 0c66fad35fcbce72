"""The text of Triton device functions, for kernels that Inductor generates.

What is generated must not need this package: cached graphs and ahead-of-time packages are compiled and loaded where it
may be another version or missing. So a template does not import the functions of kernels/, it contains them, as the C++
templates contain their headers.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from bitdelta_compile import kernels

FILES = ("tile.py", "tile_linear.py", "segments.py", "fused.py")


@functools.cache
def device_source(*names: str) -> str:
    """The definitions of the named functions and of all that they use, without docstrings, callees first.

    Raises:
        KeyError: a function that none of `FILES` defines.
    """
    known = _definitions()
    needed: dict[str, None] = {}

    def need(name: str) -> None:
        if name in needed:
            return
        _, uses = known[name]
        for used in uses:
            if used != name:
                need(used)
        needed[name] = None

    for name in names:
        need(name)
    return "\n\n".join(known[name][0] for name in needed)


@functools.cache
def _definitions() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> (text, names of other definitions in it) of every top-level function and constant of `FILES`."""
    found: dict[str, tuple[str, ast.stmt]] = {}
    for file in FILES:
        text = (Path(kernels.__file__ or "").parent / file).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            for name in _bound(node):
                found[name] = (_text(text.splitlines(), node), node)
    return {
        name: (text, tuple(dict.fromkeys(used for used in _names(node) if used in found)))
        for name, (text, node) in found.items()
    }


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _names(node: ast.stmt) -> Iterator[str]:
    yield from (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


def _text(lines: list[str], node: ast.stmt) -> str:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    kept = list(range(first, node.end_lineno or node.lineno))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        docstring = node.body[0]
        hidden = range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno)
        kept = [line for line in kept if line not in hidden]
    return "\n".join(lines[line] for line in kept)
