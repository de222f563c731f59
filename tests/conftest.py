"""What several files of tests share and takes long to make: once for a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from gemopt.report import Report

for name in ("COLUMNS", "LINES"):  # of the terminal that tests are run from, which readline tells their workers
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def world():
    """A process that forks groups of ranks; see `ranks_world`."""
    from ranks_world import serving

    with serving() as run:
        yield run


@pytest.fixture(scope="session")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to report on; see `reported`."""
    from reported import write_folder

    folder = tmp_path_factory.mktemp("report")
    write_folder(folder)
    return folder


@pytest.fixture(scope="session")
def report_page(report_folder: Path) -> Report:
    """The page made of them."""
    from reported import page_of

    return page_of(report_folder)


@pytest.fixture
def quick_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The co-location bound ends after few iterations, where it matters to nothing: it is most of a small call."""
    monkeypatch.setattr("gemopt.bounds.together.SHORTEST", 20)
    monkeypatch.setattr("gemopt.bounds.together.CYCLE", 1)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes on one core: small networks gain nothing by more, and tests run side by side."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small network to trace."""
    from gemopt.models import tiny

    return tiny("olmoe")
