"""What may import what, who may print, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bitdelta_compile"
SOURCES = sorted(path for folder in ("kernels", "lowering", PACKAGE) for path in (ROOT / folder).rglob("*.py"))
MAY_IMPORT = {  # what each part may import besides itself
    "kernels": {"torch", "triton"},
    "lowering": {"torch", "triton", "sympy", "kernels"},
}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def module_of(path: Path) -> str:
    """The name a source file has once installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(inside[:-1] if inside[-1] == "__init__" else inside)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of everything that a module imports, wherever in it."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def part_imported(name: str) -> str:
    """`bitdelta_compile.kernels.layout` -> `kernels`; `torch.nn` -> `torch`."""
    first, *rest = name.split(".")
    return rest[0] if first == PACKAGE and rest and rest[0] in MAY_IMPORT else first


def forbidden(path: Path, tree: ast.AST) -> list[str]:
    part = part_of(path)
    names = list(imports(tree, module_of(path), path.name == "__init__.py"))
    shadowing = [name for name in names if name.split(".")[0] in MAY_IMPORT]
    if part not in MAY_IMPORT:
        return shadowing
    allowed = MAY_IMPORT[part] | {part} | set(sys.stdlib_module_names)
    return shadowing + [name for name in names if part_imported(name) not in allowed]


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_follow_the_dependency_direction(path: Path) -> None:
    assert not forbidden(path, ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/layout.py", "from ..lowering import ops"),
        ("kernels/layout.py", "def f():\n    from bitdelta_compile import encodings"),
        ("kernels/layout.py", "import numpy"),
        ("lowering/ops.py", "from ..errors import BitDeltaError"),
        ("lowering/__init__.py", "from .. import encodings"),
        (f"{PACKAGE}/delta.py", "import kernels.layout"),
        (f"{PACKAGE}/graph/bind.py", "from lowering import ops"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert forbidden(ROOT / path, ast.parse(source))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "cli.py"], ids=ids)
def test_only_the_command_line_prints(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [func for func in calls if isinstance(func, ast.Name) and func.id == "print"]
    terminal = {name.split(".")[0] for name in imports(tree, module_of(path), False)} & {"rich", "typer"}
    assert terminal <= ({"rich"} if path.name == "render.py" else set())


def run_python(source: str) -> str:
    """A fresh interpreter in the repository's root, where a top-level `kernels` could shadow Hugging Face's."""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {path.parent.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("__init__.py")}
    assert set(listed) == {".".join(path.parts) for path in inside} | {f"{PACKAGE}.{part}" for part in MAY_IMPORT}


def test_importing_the_package_has_no_side_effects() -> None:
    heavy = ("transformers", "torchao", "matplotlib", "torch._inductor", "typer", "rich")
    found = run_python(
        f"import sys, torch, bitdelta_compile; before = [m for m in {heavy!r} if m in sys.modules]; "
        "print(before, torch.cuda.is_initialized())"
    )
    assert found == "[] False"


def test_the_command_line_starts_without_transformers() -> None:
    assert run_python("import sys, bitdelta_compile.cli; print('transformers' in sys.modules)") == "False"


def test_transformers_still_finds_its_own_kernels_package() -> None:
    assert run_python("import transformers.integrations.hub_kernels as found; print(found.__name__)").endswith(
        "hub_kernels"
    )
