"""Files of serving engines, out of their published wheels; downloaded once into `.cache/engines`, nothing installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "engines"
# Wheel, files taken out of it. The versions are those whose formats were read.
WHEELS = {
    "sglang": ("sglang==0.5.23", ("sglang/srt/eplb/*.py", "sglang/srt/eplb/eplb_algorithms/*.py")),
    "vllm-ascend": (
        "vllm-ascend==0.23.0",
        ("vllm_ascend/eplb/core/eplb_utils.py", "vllm_ascend/eplb/core/policy/*.py"),
    ),
    "lmdeploy": ("lmdeploy==0.18.0", ("lmdeploy/pytorch/nn/eplb.py",)),
    "vllm": (
        "vllm==0.33.0",
        (
            "vllm/distributed/eplb/*.py",
            "vllm/distributed/eplb/policy/*.py",
            "vllm/plugins/__init__.py",
            "vllm/utils/serial_utils.py",
        ),
    ),
}


def engine_files(name: str) -> Path:
    """Folder with the files of an engine's wheel; `OSError` when it cannot be downloaded."""
    requirement, patterns = WHEELS[name]
    folder = CACHE / requirement.replace("==", "-")
    if not all(any(folder.glob(pattern)) for pattern in patterns):
        _fetch(requirement, patterns, folder)
    return folder


def _fetch(requirement: str, patterns: tuple[str, ...], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--implementation", "cp", "--python-version", "3.11", "--abi", "cp311", "--abi", "abi3"]
        command += ["--abi", "none"]
        for glibc in ("2_28", "2_34"):
            command += ["--platform", f"manylinux_{glibc}_x86_64"]
        done = subprocess.run(
            [*command, "--dest", scratch, requirement], capture_output=True, text=True, timeout=1800, check=False
        )
        if done.returncode:
            raise OSError(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
        wheel = next(Path(scratch).glob("*.whl"))
        unpacked = Path(scratch) / "files"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if any(fnmatch(member, pattern) for pattern in patterns):
                    archive.extract(member, unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
