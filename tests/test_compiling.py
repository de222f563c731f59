"""Kernels are compiled and run wherever they may be kept: in a folder that is written, read only, full, or nowhere."""

from __future__ import annotations

import ast
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba.core import caching

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "from gemopt.compiling import njit\n\n\n@njit(nogil=True)\ndef double(x):\n    return 2 * x\n"


def load(folder: Path) -> Any:
    """The kernel, as another process would meet it."""
    source = folder / "kernel_of_a_test.py"
    if not source.exists():  # some numba asks when it was written
        source.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("kernel_of_a_test", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


@pytest.fixture
def nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Root may write everywhere, so numba is told what it would be told elsewhere."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    def begin() -> None:
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", refuse)

    return begin


def test_what_was_compiled_is_read_where_nothing_can_be_written(
    tmp_path: Path, nothing_can_be_written: Callable[[], None]
) -> None:
    assert load(tmp_path)(3) == 6
    nothing_can_be_written()
    kernel = load(tmp_path)
    assert kernel(4) == 8 and sum(kernel.stats.cache_hits.values()) == 1
    assert kernel(1.5) == 3.0 and sum(kernel.stats.cache_misses.values()) == 1, "compiled, and not kept"


def test_without_any_folder_kernels_are_compiled(tmp_path: Path, nothing_can_be_written: Callable[[], None],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    nothing_can_be_written()
    assert load(tmp_path)(3) == 6


def test_a_disk_that_is_full_meanwhile_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert load(tmp_path)(3) == 6


def test_what_another_user_keeps_for_himself_is_compiled(
    tmp_path: Path, nothing_can_be_written: Callable[[], None]
) -> None:
    assert load(tmp_path)(3) == 6
    for index in (tmp_path / "__pycache__").glob("*.nbi"):
        index.unlink()
        index.mkdir()  # root may read every file, but no folder as one
    nothing_can_be_written()
    assert load(tmp_path)(3) == 6


def test_every_kernel_is_compiled_by_it() -> None:
    for path in (ROOT / "gemopt").rglob("*.py"):
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert "numba" not in names or path.name == "compiling.py", path
