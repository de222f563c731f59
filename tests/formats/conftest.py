"""Placements to export, and the published files of serving engines (`pytest -m engines`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from gemopt.placement import Placement

CACHE = Path(__file__).parents[2] / ".cache" / "engines"
# Wheel, files taken out of it. The versions are those whose formats were read.
WHEELS = {
    "sglang": ("sglang==0.5.23", ("sglang/srt/eplb/*.py",)),
    "vllm-ascend": ("vllm-ascend==0.23.0", ("vllm_ascend/eplb/core/eplb_utils.py",)),
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


@pytest.fixture
def make_placement():
    def make(layers=3, experts=8, ranks=2, slots=None, seed=0, **fields):
        """Random placement of `slots` slots per rank: every expert somewhere, copies in the rest."""
        rng = np.random.default_rng(seed)
        slots = experts // ranks if slots is None else slots
        rows = np.full((layers, ranks, slots), -1)
        for row in rows:
            homes = rng.permutation(ranks * slots)[:experts]
            row.reshape(-1)[homes] = rng.permutation(experts)
            for held in row:
                empty = np.flatnonzero(held < 0)
                held[empty] = rng.permutation(np.setdiff1d(np.arange(experts), held))[: len(empty)]
        fields = {"layer_ids": list(range(layers)), "num_hidden_layers": layers, **fields}
        return Placement(
            physical_to_logical=rows.reshape(layers, -1),
            slots_per_rank=[slots] * ranks,
            num_experts=experts,
            **fields,
        )

    return make


@pytest.fixture(scope="session")
def engine_files():
    """Folder with the files of an engine's published wheel, downloaded once."""

    def files(name: str) -> Path:
        requirement, patterns = WHEELS[name]
        folder = CACHE / requirement.replace("==", "-")
        if not all(any(folder.glob(pattern)) for pattern in patterns):
            _fetch(requirement, patterns, folder)
        return folder

    return files


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
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
        wheel = next(Path(scratch).glob("*.whl"))
        unpacked = Path(scratch) / "files"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if any(fnmatch(member, pattern) for pattern in patterns):
                    archive.extract(member, unpacked)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
