"""Write the JSON Schemas of gemopt's documents beside this file: `python docs/schema/write.py`."""

from __future__ import annotations

import json
from pathlib import Path

from gemopt.certificate import Certificate
from gemopt.documents import Document, write_text
from gemopt.jobs import Job
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.result import Result
from gemopt.rules import Rules
from gemopt.topology import Topology

FOLDER = Path(__file__).resolve().parent
DOCUMENTS: tuple[type[Document], ...] = (Profile, Placement, Result, Job, Certificate, Topology, Rules)


def schema(document: type[Document]) -> str:
    """Published text of a document's schema."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(head | document.model_json_schema(), indent=1) + "\n"


def path(document: type[Document]) -> Path:
    """Where it is published."""
    return FOLDER / f"{document.__name__.lower()}.json"


if __name__ == "__main__":
    for each in DOCUMENTS:
        write_text(path(each), schema(each))
