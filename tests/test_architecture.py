"""The import rule, the package list and what `import gemopt` may load, checked over syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"gemopt": ROOT / "gemopt", "gemopt.models": ROOT / "models", "gemopt.profiling": ROOT / "profiling"}
TIERS = [
    ["compiling", "exceptions", "tables", "documents", "cores", "interrupts", "words"],
    ["latency", "profile", "placement", "traces", "topology", "rules"],
    ["costs", "conflicts", "kernels", "migration", "moves", "resize", "layer_rules"],
    ["links", "problem", "splits", "evaluate", "result", "certificate", "verify"],
    ["bounds", "solvers"],
    ["solve", "solving", "compare", "testing", "certify"],
    ["predict", "online", "replay", "advise"],
    ["formats", "plotting", "report", "jobs"],
    ["models", "profiling", "executor"],
    ["cli", "__main__"],
]
TIER = {name: level for level, names in enumerate(TIERS) for name in names}
SEAMS = {
    # what a lower tier reaches for at run time only, inside a function, with the reason
    ("result", "plotting"): "result.plot_...() and evaluation.plot_...() are found where people look for them",
    ("evaluate", "plotting"): "the same",
    ("conflicts", "plotting"): "the same",
    ("formats", "executor"): "the permuted checkpoint is written by the executor",
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(p for p in parts if p != "__init__")])
            found[name] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(name: str, path: Path) -> set[str]:
    seen: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            seen |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name} uses a relative import"
            seen |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {each for each in seen if each == "gemopt" or each.startswith("gemopt.")}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "gemopt"


def test_every_module_has_a_tier() -> None:
    unknown = {room(name) for name in modules()} - set(TIER) - {"gemopt"}
    assert not unknown, f"give these rooms a tier: {unknown}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_from_the_left(name: str) -> None:
    own = room(name)
    if own == "gemopt":
        return
    for target in imports(name, modules()[name]):
        other = room(target)
        if other in ("gemopt", own) or other not in TIER or (own, other) in SEAMS:
            continue
        assert TIER[other] <= TIER[own], f"{name} imports {target}, which is to its right"


SCRIPTS = sorted(path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).rglob("*.py"))


def defined(module: str) -> set[str]:
    """The names that a module defines at its top level or imports there."""
    top = tree_of(modules()[module]).body
    nodes = [*top, *(inner for node in top if isinstance(node, ast.If | ast.Try) for inner in ast.walk(node))]
    names = {alias.asname or alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    names |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in nodes if isinstance(n, ast.AnnAssign)]
    return names | {inner.id for t in targets for inner in ast.walk(t) if isinstance(inner, ast.Name)}


def test_what_scripts_import_is_there() -> None:
    """They are run now and then; a name that moved or went shall not wait for that."""
    assert len(SCRIPTS) > 30
    for path in SCRIPTS:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemopt":
                assert node.module in modules(), f"{path}: {node.module}"
                names = defined(node.module)
                for alias in node.names if "__getattr__" not in names else ():
                    known = alias.name in names or f"{node.module}.{alias.name}" in modules()
                    assert known, f"{path}: {node.module} has no {alias.name}"


def test_solvers_do_not_import_each_other() -> None:
    """A registered solver is reached through the registry or by a hybrid; what is shared is its own module."""
    registry = (ROOT / "gemopt/solvers/__init__.py").read_text()
    solver_files = {m for m in modules() if m.startswith("gemopt.solvers.") and f'"{m}:' in registry}
    assert len(solver_files) > 5
    hybrids = {"gemopt.solvers.auto"}
    for name in sorted(modules().keys() - hybrids):
        others = imports(name, modules()[name]) & (solver_files - {name})
        assert not others, f"{name} imports solver {others}"


def test_the_three_kinds_of_solvers_keep_apart() -> None:
    """Baselines and exact solvers may use the modules of the search; nothing else crosses."""
    allowed = {"baselines": {"search"}, "exact": {"search"}, "search": set()}
    for name in modules():
        parts = name.split(".")
        if parts[:2] != ["gemopt", "solvers"] or len(parts) < 4:
            continue
        for target in imports(name, modules()[name]):
            kind = target.split(".")[2:3] if target.startswith("gemopt.solvers.") else []
            if kind and kind[0] in allowed and kind[0] != parts[2]:
                assert kind[0] in allowed[parts[2]], f"{name} imports {target}"


def test_no_cycles() -> None:
    graph = {name: set() for name in modules()}
    for name, path in modules().items():
        top = [n for n in tree_of(path).body if isinstance(n, ast.ImportFrom) and n.module]
        for node in top:
            targets = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            graph[name] |= {t for t in targets if t in graph and t != name}
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        assert state.get(name) != 1, f"import cycle {' -> '.join([*trail, name])}"
        if state.get(name) == 2:
            return
        state[name] = 1
        for target in graph[name]:
            if not name.startswith(target + "."):
                visit(target, [*trail, name])
        state[name] = 2

    for name in graph:
        visit(name, [])


def test_package_list_is_complete() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in SOURCES.items()
        for path in folder.rglob("*.py")
    }
    assert folders == listed


def test_import_is_light_and_functions_stay_functions_when_their_modules_are_imported() -> None:
    code = (
        "import sys, gemopt; heavy = {'torch', 'matplotlib', 'pulp', 'ortools', 'plotly', 'numba', 'scipy', 'networkx',"
        " 'numpy', 'pydantic'}; print(sorted(heavy & set(sys.modules)));"
        "from gemopt.cli import load; load(); print(sorted(heavy & set(sys.modules)));"  # what --help imports
        "import gemopt.solve, gemopt.evaluate; from gemopt.evaluate import objective;"
        "print(callable(gemopt.solve), callable(gemopt.evaluate), callable(objective))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]"] * 2 + ["True"] * 3


def test_public_names_resolve() -> None:
    import gemopt

    for name in gemopt.__all__:
        assert getattr(gemopt, name) is not None
    with pytest.raises(AttributeError):
        _ = gemopt.no_such_name
