"""What is loaded or compiled on first use is there before the time runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHILD = """
import sys, gemopt
from importlib import import_module
from cli_inputs import profile, traces

def known():
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("gemopt.")]
    kernels = [value for module in modules for value in list(vars(module).values()) if hasattr(value, "py_func")]
    return {kernel: len(kernel.signatures) for kernel in kernels}

solve, before = import_module("gemopt.solve"), {}
real = solve.ready
solve.ready = lambda *given, **named: (real(*given, **named), before.update(known()))[0]
for options in ({"solver": "conflict"}, {"memory_budget": 9.0, "expert_bytes": 1}):
    gemopt.solve(profile(3), traces(12, 2, 8), time_limit=60, patience=2, threads=1, **options)
    later = [kernel.__name__ for kernel, signatures in known().items() if signatures > before.get(kernel, 0)]
    assert not later, (options, later)
"""


def test_no_kernel_comes_later() -> None:
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.run([sys.executable, "-c", CHILD], check=False, env=path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
