"""When, with which versions and on what a result was measured; printed and written beside every table."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import gemopt


def stamp(*packages: str) -> str:
    """Date, versions of gemopt, Python and the packages, and the machine, in one line."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    ours = f"gemopt {gemopt.__version__}"
    return f"{date.today()}, Python {platform.python_version()}, {ours}, {versions}, {os.cpu_count()} CPUs ({_cpu()})"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
