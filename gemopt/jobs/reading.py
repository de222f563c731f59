"""From a job file and the words of the command line to a `Job`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from gemopt.documents import foreign, read_json
from gemopt.exceptions import InputError, missing
from gemopt.formats.files import bounded_yaml
from gemopt.jobs.document import FOLDER, MADE, PATH, Job, Typed


def read_job(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Job:
    """Read a job (YAML, or JSON where the name ends so).

    Parameters
    ----------
    overrides
        `KEY=VALUE`, the key with dots (`solver.time_limit=5`, `exports.0.engine=vllm`), the value as JSON or a text.

    Raises
    ------
    InputError
        One line naming the key that is unknown or wrong.
    """
    source = Path(path)
    found = read_json(source) if source.suffix == ".json" else bounded_yaml(source)
    if not isinstance(found, dict):
        given = "nothing" if found is None else type(found).__name__
        raise InputError(str(path), given, "keys and values of a job", "see examples/jobs")
    found = {key: value for key, value in found.items() if key != "$schema" and not str(key).startswith("x-")}
    other = foreign.of_object(found)[0]
    if other and foreign.kind(other) != "job":
        raise InputError(str(path), other, "a job is needed", "see examples/jobs")
    for each in overrides:
        _override(found, each)
    for key, known in _unknown(found, Job):
        close = get_close_matches(key.rpartition(".")[2], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        raise InputError(str(path), key, "no key of a job", hint)
    for key, value, inner in _flags(found, Job):
        switch = (
            next((name for name, field in inner.model_fields.items() if field.annotation is bool), "") if inner else ""
        )
        way_out = (
            f"{key}: {{{switch}: {str(value).lower()}}}" if switch else "null for none" if inner else "quote a text"
        )
        limit = f"{'keys and values' if inner else 'a number or a text'}, no yes or no"
        raise InputError(str(path), f"{key}: {str(value).lower()}", limit, way_out)
    token = FOLDER.set(source.resolve().parent)
    try:
        return Job(**found)
    except InputError as error:
        said = str(error).removeprefix("Job.").replace(f".{MADE}", "", 1).replace(f".{PATH}", "", 1)
        error.args = (f"{path}: {said}",)
        raise
    finally:
        FOLDER.reset(token)


def shown(job: Job, *, as_json: bool = False) -> str:
    """The job with every default filled in, as YAML where that is installed."""
    values = job.model_dump(mode="json")
    if as_json:
        return json.dumps(values, indent=1) + "\n"
    return as_yaml(values)


def as_yaml(value: Any) -> str:
    """YAML with keys in their order and texts of several lines as blocks."""
    try:
        import yaml
    except ImportError as error:
        raise missing(error, "writing YAML") from None

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, data: str) -> Any:
        style = "|" if "\n" in data else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def _override(job: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise InputError("--set", word, "KEY=VALUE is needed", "for example --set solver.time_limit=5")
    *parents, last = key.split(".")
    place: Any = job
    for name in parents:
        if isinstance(place, dict) and place.get(name) is None:
            place[name] = {}
        place = place[_index(place, name, word)] if isinstance(place, list) else place[name]
        if not isinstance(place, (dict, list)):
            raise InputError("--set", word, f"{name} holds a value, not keys")
    value = _typed(text)
    if isinstance(place, list):
        place[_index(place, last, word)] = value
    else:
        place[last] = value


def _index(place: list[Any], name: str, word: str) -> int:
    if not name.isdigit() or int(name) >= len(place):
        raise InputError("--set", word, f"{name} is none of the {len(place)} items", "count from 0")
    return int(name)


def _typed(text: str) -> Any:
    """JSON where it is, else the text itself; texts remember that they were typed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Typed(text)
    return _mark(value)


def _mark(value: Any) -> Any:
    if isinstance(value, str):
        return Typed(value)
    if isinstance(value, list):
        return [_mark(each) for each in value]
    return {key: _mark(each) for key, each in value.items()} if isinstance(value, dict) else value


def _unknown(found: Any, model: type[BaseModel], where: str = "") -> Iterator[tuple[str, list[str]]]:
    """Keys that the model does not have, at any depth, each with those it has."""
    known = list(model.model_fields)
    for key, value in found.items():
        if key not in known:
            yield f"{where}{key}", known
            continue
        inner = _models(model.model_fields[key].annotation)
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            if inner and isinstance(each, dict):
                spot = f"{where}{key}.{index}." if isinstance(value, list) else f"{where}{key}."
                yield from _unknown(each, inner[0], spot)


def _flags(found: Any, model: type[BaseModel], where: str = "") -> Iterator[tuple[str, bool, type[BaseModel] | None]]:
    """Keys with a yes or no, also within lists, where the model wants none: it would count as 1 or 0.

    With what the model wants there instead, where that has keys.
    """
    for key, value in found.items():
        annotation = model.model_fields[key].annotation
        inner, wanted = _models(annotation), bool in (annotation, *get_args(annotation))
        for each in value if isinstance(value, list) else [value]:
            if inner and isinstance(each, dict):
                yield from _flags(each, inner[0], f"{where}{key}.")
                continue
            parts = [*each, *each.values()] if isinstance(each, dict) else [each]
            kind = inner[0] if inner else None
            yield from ((f"{where}{key}", part, kind) for part in parts if isinstance(part, bool) and not wanted)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in _models(each)]
