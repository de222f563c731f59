"""The published JSON Schemas are those of this version, and speak of every key that documents hold."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timed import timed

from gemopt.placement import Placement
from gemopt.solve import solve
from gemopt.traces import Traces

ROOT = Path(__file__).resolve().parents[1]
WRITE = runpy.run_path(str(ROOT / "docs" / "schema" / "write.py"))


@pytest.mark.parametrize("document", WRITE["DOCUMENTS"], ids=lambda document: document.__name__)
def test_published_schemas_are_current(document: Any) -> None:
    published = json.loads(WRITE["path"](document).read_text())
    assert published == json.loads(WRITE["schema"](document)), "run: python docs/schema/write.py"


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def named(schema: Any) -> set[str]:
    """Every property that a schema names, at any depth."""
    if isinstance(schema, dict):
        return set(schema.get("properties", {})).union(*map(named, schema.values()))
    return set().union(*map(named, schema)) if isinstance(schema, list) else set()


def test_documents_hold_no_key_that_schema_and_manual_leave_out(tmp_path: Path) -> None:
    profile = timed(range(2), lambda n, _: 5.0 + n, (0, 4, 8))
    traces = Traces(counts=np.random.default_rng(0).integers(0, 9, (6, 1, 4)))
    result = solve(profile, traces, solver="local-search", patience=1)
    assert result.placement is not None and result.history
    manual = "".join((ROOT / "docs" / name).read_text() for name in ("formats.md", "rules.md"))
    for document in (profile, result.placement, result):
        path = tmp_path / "document.json"
        document.save(path)
        found = keys(json.loads(path.read_text()))
        schema = json.loads(WRITE["path"](type(document)).read_text())
        assert found <= named(schema)
        assert {key for key in named(schema) if f"`{key}`" not in manual} == set()
    assert isinstance(result.placement, Placement)


def test_the_manual_names_every_array_of_traces() -> None:
    from gemopt.traces.document import STEP_ARRAYS
    from gemopt.traces.tokens import ARRAYS

    manual = (ROOT / "docs" / "formats.md").read_text()
    for name in ("counts", *STEP_ARRAYS, *ARRAYS):
        assert f"`{name}`" in manual
