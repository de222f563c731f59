"""Command `gemopt doctor`: what is installed, what the machine offers, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

import gemopt
from gemopt.cli.app import app, console, examples, print_json
from gemopt.cli.options import AsJson
from gemopt.words import counted

ENGINES = ("sglang", "vllm", "vllm-ascend", "tensorrt-llm", "lmdeploy")
CGROUP_FILES = {
    "cpu.max (cgroup v2)": "/sys/fs/cgroup/cpu.max",
    "memory.max (cgroup v2)": "/sys/fs/cgroup/memory.max",
    "cpu.cfs_quota_us (cgroup v1)": "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "memory.limit_in_bytes (cgroup v1)": "/sys/fs/cgroup/memory/memory.limit_in_bytes",
}
OK, MISSING, BROKEN = "ok", "missing", "broken"


@app.command("doctor", epilog=examples("gemopt doctor", "gemopt doctor --json"))
def doctor_command(as_json: AsJson = False) -> None:
    """Say which versions, solvers and devices there are, what is missing and how to get it.

    Exit code 1 when something that is installed does not work; what is merely absent is no fault.
    """
    found = examine()
    if as_json:
        print_json(found)
    else:
        for name, lines in found.items():
            console.print(f"\n[bold]{name}[/bold]")
            width = max(map(len, lines))
            for key, line in lines.items():
                _show(key.ljust(width), line)
    if any(line["state"] == BROKEN for lines in found.values() for line in lines.values()):
        raise typer.Exit(1)


def _show(key: str, line: dict[str, str]) -> None:
    mark = {OK: "  ", MISSING: "- ", BROKEN: "! "}[line["state"]]
    way_out = f"; {line['hint']}" if line["hint"] else ""
    console.print(Text(f"{mark}{key}  {line['found']}{way_out}"), soft_wrap=True)


def examine() -> dict[str, dict[str, dict[str, str]]]:
    """By section and name: `state` (ok, missing, broken), what was `found`, and a `hint`."""
    return {
        "gemopt": dict(_installation()),
        "packages": dict(_packages()),
        "solvers": dict(_solvers()),
        "torch": dict(_torch()),
        "engines": dict(_engines()),
        "machine": dict(_machine()),
    }


def _line(found: object, state: str = OK, hint: str = "") -> dict[str, str]:
    return {"state": state, "found": str(found), "hint": hint}


Lines = Iterator[tuple[str, dict[str, str]]]


def _installation() -> Lines:
    yield "version", _line(gemopt.__version__)
    yield "python", _line(f"{platform.python_version()} at {sys.executable}")
    yield "folder", _line(Path(gemopt.__file__).parent)
    cache = next((each for each in _caches() if _writable(each)), None)
    writable, cache = cache is not None, cache or next(_caches())
    count = len(list(cache.rglob("*.nbi"))) if cache.exists() else 0
    kernels = "compiled on first use, a minute or two"
    if count:
        kernels = f"{counted(count, 'kernel')} compiled below {cache}"
    hint = "" if writable else "set NUMBA_CACHE_DIR to a folder that can be written, or each run compiles the others"
    yield "kernels", _line(kernels, OK if writable or count else BROKEN, hint)


def _caches() -> Iterator[Path]:
    """Where numba keeps compiled kernels, in the first that can be written: as it was told, by the sources, at home."""
    if told := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(told)
    yield Path(gemopt.__file__).parent
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "numba"


def _writable(folder: Path) -> bool:
    """Whether it, or the nearest folder above that is there, can be written."""
    return os.access(next(each for each in (folder, *folder.parents) if each.exists()), os.W_OK)


def _packages() -> Lines:
    """The core, then what extras bring."""
    from gemopt.exceptions import EXTRAS, install_hint

    core = _core()
    for package in core:
        try:
            yield package, _line(version(package))
        except PackageNotFoundError:
            yield package, _line("not installed", BROKEN, "install gemopt again")
    for package, extra in EXTRAS.items():
        if extra == "torch" or package in core:
            continue
        name = {"yaml": "PyYAML"}.get(package, package)
        if find_spec(package) is None:
            yield name, _line(f"not installed (extra {extra})", MISSING, install_hint(extra))
        else:
            yield name, _line(f"{_version(name)} (extra {extra})")


def _core() -> list[str]:
    try:
        needed = requires("gemopt") or []
    except PackageNotFoundError:  # run from a source tree
        needed = []
    names = [re.split(r"[^\w-]", line)[0] for line in needed if "extra" not in line.partition(";")[2]]
    return sorted(names) or ["numba", "numpy", "pydantic", "scipy"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"


def _solvers() -> Lines:
    from gemopt.exceptions import MissingPackageError
    from gemopt.solvers import get, names

    for name in names():
        try:
            solver = get(name)
        except MissingPackageError as error:
            yield name, _line(f"needs {error.name}", MISSING, error.hint)
            continue
        except Exception as error:  # a library that is there and cannot be loaded
            yield name, _line(f"{type(error).__name__}: {error}", BROKEN, "install its library again")
            continue
        can = [word.replace("_", " ") for word, has in vars(solver.supports).items() if has]
        backend = "; with HiGHS" if find_spec("highspy") else "; with CBC"
        yield name, _line((", ".join(can) or "a fixed rule") + (backend if name == "milp" else ""))


def _torch() -> Lines:
    from gemopt.exceptions import install_hint

    for package in ("torch", "transformers", "accelerate"):
        if find_spec(package) is None:
            yield package, _line("not installed", MISSING, f"{install_hint('torch')} to record, measure or apply")
        else:
            yield package, _line(_version(package))
    if find_spec("torch") is None:
        return
    try:
        import torch

        available = torch.accelerator.is_available()
        count = torch.accelerator.device_count() if available else 0
        current: Any = torch.accelerator.current_accelerator() if available else None
        kind = current.type if available else "cpu"
    except Exception as error:  # a driver that does not fit, a wheel of another Python
        yield "devices", _line(f"{type(error).__name__}: {error}", BROKEN, "install a torch that fits the driver")
        return
    if not count:
        yield "devices", _line("no accelerator: profiles, traces and the executor use the CPU", MISSING)
    for index in range(count):
        yield f"{kind} {index}", _line(_device(torch, kind, index))
    distributed: Any = torch.distributed
    names = ("gloo", "nccl", "mpi", "ucc", "xccl")
    there = [n for n in names if getattr(distributed, f"is_{n}_available", lambda: False)()]
    yield "distributed", _line(", ".join(there) or "none")


def _device(torch: Any, kind: str, index: int) -> str:
    properties = torch.get_device_module(kind).get_device_properties(index)
    memory = getattr(properties, "total_memory", 0) / 2**30
    return f"{getattr(properties, 'name', kind)}, {memory:.0f} GiB, {getattr(properties, 'uuid', 'no uuid')}"


def _engines() -> Lines:
    for name in ENGINES:
        try:
            yield name, _line(version(name))
        except PackageNotFoundError:
            yield name, _line("not in this environment; files are exchanged all the same", MISSING)


def _machine() -> Lines:
    from gemopt import cores
    from gemopt.profiling.throttle import detect_method

    yield "cores", _line(f"{cores.available()} of {os.cpu_count()} usable")
    for name, path in CGROUP_FILES.items():
        if os.access(path, os.R_OK):
            value = Path(path).read_text().strip()
            none = value.startswith("max") or value == "-1" or (value.isdigit() and int(value) > 1 << 60)
            yield name, _line("no limit" if none else value)
    yield "throttling", _line(f"{detect_method().value} (what slows a rank down for trials)")
    yield "terminal", _line(f"{console.width} columns{', no colour' if console.no_color else ''}")
