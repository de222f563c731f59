"""Compiled kernels are written so that the first call of a user is short: see "Compiled kernels" in CONTRIBUTING.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "gemopt"


@cache
def statements(path: Path) -> list[ast.stmt]:
    """Those of a module."""
    return ast.parse(path.read_text()).body


@cache
def kernels() -> dict[str, list[tuple[Path, ast.FunctionDef, bool]]]:
    """By name: file, function, and whether it is put into its callers."""
    found: dict[str, list[tuple[Path, ast.FunctionDef, bool]]] = {}
    for path in ROOT.rglob("*.py"):
        for node in statements(path):
            if isinstance(node, ast.FunctionDef):
                said = [ast.unparse(each) for each in node.decorator_list]
                if any(each.startswith("njit") for each in said):
                    found.setdefault(node.name, []).append((path, node, any("inline=" in each for each in said)))
    return found


def assigned(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What goes where."""
    for target in node.targets:
        if isinstance(target, ast.Tuple):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(target.elts)
            yield from zip(target.elts, values, strict=True)
        else:
            yield target, node.value


def of_slices(function: ast.FunctionDef) -> list[str]:
    """Assignments of what may be an array to a slice, and of several values at once to a row."""
    scalars = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.Call)
    found = []
    for node in ast.walk(function):
        for target, value in assigned(node) if isinstance(node, ast.Assign) else []:
            sliced = isinstance(target, ast.Subscript) and any(isinstance(n, ast.Slice) for n in ast.walk(target.slice))
            row = isinstance(target, ast.Subscript) and isinstance(value, ast.Tuple)
            if row or (sliced and not isinstance(value, scalars) and ast.unparse(value) != "np.inf"):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def whole(value: ast.expr) -> bool:
    """Whether it is a whole number or a truth value as it is written."""
    value = value.operand if isinstance(value, ast.UnaryOp) else value
    return isinstance(value, ast.Constant) and isinstance(value.value, int)


def computed(value: ast.expr) -> bool:
    """Whether it is made of whole numbers as they are written."""
    return whole(value) or (isinstance(value, ast.BinOp) and computed(value.left) and computed(value.right))


@cache
def constants(path: Path) -> set[str]:
    """Names of a module for whole numbers."""
    sets = [pair for node in statements(path) if isinstance(node, ast.Assign) for pair in assigned(node)]
    return {target.id for target, value in sets if isinstance(target, ast.Name) and computed(value)}


def literals(function: ast.FunctionDef, compiled: set[str], named: set[str]) -> list[str]:
    """Whole numbers and truth values that are handed to kernels as they are written, or by a name that gets one.

    named: such names of the module.
    """
    sets = [pair for node in ast.walk(function) if isinstance(node, ast.Assign) for pair in assigned(node)]
    named = named | {target.id for target, value in sets if isinstance(target, ast.Name) and whole(value)}
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in compiled:
            for each in node.args:
                if whole(each) or (isinstance(each, ast.Name) and each.id in named):
                    found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_arrays_are_put_into_arrays() -> None:
    """numba would compile how shapes that do not fit are told, which takes longer than the kernels of a search."""
    every = [each for same in kernels().values() for each in same]
    assert len(every) > 100
    assert [f"{path}:{line}" for path, node, _ in every for line in of_slices(node)] == []


def test_kernels_multiply_no_matrices() -> None:
    """numba would compile calls of a library, which takes longer than a loop."""
    functions = [
        (path, node) for same in kernels().values() for path, function, _ in same for node in ast.walk(function)
    ]
    products = [(path, node.lineno) for path, node in functions if isinstance(node, ast.BinOp | ast.AugAssign)
                and isinstance(node.op, ast.MatMult)]  # fmt: skip
    assert products == []


def test_kernels_are_handed_no_literals() -> None:
    """Each value would be a signature of its own; where one value alone is ever given it is no second one."""
    every = kernels()
    compiled = {name for name, same in every.items() if not all(inline for *_, inline in same)}
    alone = {"next_corner"}  # always with the same value
    functions = [each for same in every.values() for each in same]
    found = [(path, literals(node, compiled - alone, constants(path))) for path, node, _ in functions]
    assert [f"{path}:{line}" for path, lines in found for line in lines] == []


def test_arrays_are_made_one_by_one() -> None:
    """Rows that one array is taken apart into count as not contiguous, for which callees are compiled once more."""
    functions = [(path, node) for same in kernels().values() for path, node, _ in same]
    made = [(path, node) for path, function in functions for node in ast.walk(function) if isinstance(node, ast.Assign)]
    apart = [
        f"{path}:{node.lineno}"
        for path, node in made
        if isinstance(node.targets[0], ast.Tuple) and ast.unparse(node.value).startswith("np.")
    ]
    assert apart == []
