"""Files: atomic replacement, and JSON documents that are pydantic models with a schema version.

Every document of gemopt is written under a temporary name, flushed and renamed, so that a reader never
meets half a file and a failed write leaves the old file as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gemopt.documents import foreign
from gemopt.exceptions import InputError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it over `path` when the block ends without error.

    Raises
    ------
    InputError
        When the folder does not exist or cannot be written, `path` is a folder or a device, or the disk is full.
    """
    target = _target(path)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        stream = temporary.open("xb")
    except OSError as error:
        raise InputError(str(target), error.strerror or str(error), "a folder that can be written") from None
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            str(target), error.strerror or str(error), "the file could not be written; the old one is untouched"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _target(path: str | os.PathLike[str]) -> Path:
    """Where a link leads; a rename would otherwise put a file in the place of the link, or of /dev/null."""
    target = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # what /dev/stdout leads to may have no path of its own
        found = "a folder" if os.path.isdir(target) else "no regular file"
        raise InputError(str(path), found, "the name of a file to write is needed")
    return Path(target)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse an output before hours are spent on its content; `InputError` as from `replacing`."""
    target = _target(path)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        found = "no permission" if os.path.isdir(target.parent) else "no such folder"
        raise InputError(str(path), found, "a folder that can be written")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file `path` by `text` (UTF-8) atomically; names of files keep the bytes of the disk."""
    with replacing(path) as stream:
        stream.write(text.encode(errors="surrogateescape"))


def read_bytes(path: str | os.PathLike[str], *, limit_bytes: int = 1 << 31) -> bytes:
    """Read a whole file; `InputError` when it is missing, a folder, unreadable or above `limit_bytes`."""
    try:
        with open(path, "rb") as stream:
            content = stream.read(limit_bytes + 1)
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), "a readable file is needed") from None
    if len(content) > limit_bytes:
        raise InputError(str(path), "a larger file", f"at most {limit_bytes} bytes")
    if content.startswith(LFS_POINTER):
        raise InputError(str(path), "a pointer of Git LFS", "the file that it stands for", "git lfs pull")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file. NaN, infinity and keys given twice are refused."""

    def refuse(token: str) -> Any:
        raise InputError(str(path), token, "numbers must be finite")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise InputError(str(path), next(key for key in found if keys.count(key) > 1), "every key once")
        return found

    try:
        return json.loads(read_bytes(path), parse_constant=refuse, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, or a number of thousands of digits
        found, way_out = foreign.of_file(path)
        if found and not found.startswith("a text"):
            raise InputError(str(path), found, "a JSON document is needed", way_out) from None
        hint = "write it as JSON" if Path(path).suffix in (".yaml", ".yml") else ""
        raise InputError(str(path), str(error), "a complete JSON document is needed", hint) from None


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file, or of the sorted files of a folder; hidden ones are still being written."""
    digest = hashlib.sha256()
    source = Path(path)
    parts = sorted(part for part in source.iterdir() if not part.name.startswith(".")) if source.is_dir() else [source]
    for part in parts:
        digest.update(read_bytes(part))
    return digest.hexdigest()


class Part(BaseModel):
    """A part of a document: frozen, without unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(Part):
    """Named values, raising one-line `InputError`s; numbers are neither flags nor texts."""

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise foreign.one_line(error, type(self)) from None

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, data: Any) -> Any:
        """Refuse flags and texts for numbers: true would be 1."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, (bool, np.bool_, str)) and name in cls.model_fields:
                annotation = cls.model_fields[name].annotation
                kinds = set(get_args(annotation) or (annotation,)) - {type(None)}
                if kinds <= {int, float} and (not isinstance(value, str) or _is_number(value)):
                    limit = f"a {'whole ' if kinds == {int} else ''}number"
                    raise InputError(
                        f"{cls.__name__}.{name}", value, limit, "without quotes" if isinstance(value, str) else ""
                    )
        return data


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Document(Settings):
    """A versioned JSON document."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1

    def __init__(self, /, **data: Any) -> None:
        version = data.get("schema_version", self.SCHEMA_VERSION)
        if version != self.SCHEMA_VERSION:  # first of all: the keys of another version may differ
            raise InputError(
                f"{type(self).__name__}.schema_version",
                repr(version) if isinstance(version, str) else version,
                f"this gemopt reads version {self.SCHEMA_VERSION}",
                "write the document again or use the gemopt that wrote it",
            )
        super().__init__(**data)

    @classmethod
    def of(cls, value: object, name: str = "") -> Self:
        """The document itself, or the one at a path; `InputError` for anything else, `name` being what it is for."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, os.PathLike)):
            return cls.load(value)
        raise foreign.not_a(cls.__name__, value, name or cls.__name__.lower())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and validate a document.

        Raises
        ------
        InputError
            One line naming the file and the key that is wrong.
        """
        data = read_json(path)
        if not isinstance(data, dict):
            raise InputError(str(path), type(data).__name__, f"a JSON object holding a {cls.__name__} is needed")
        data = cls._within(data, path)
        try:
            return cls(**{key: value for key, value in data.items() if key != "$schema"})  # which is for editors
        except InputError as error:
            found, way_out = foreign.of_object(data)
            name = re.sub("(?!^)(?=[A-Z])", " ", cls.__name__).lower()
            if found and foreign.kind(found) != name:
                needed = f"{name} are needed" if name.endswith("s") else f"a {name} is needed"
                raise InputError(str(path), found, needed, way_out) from None
            error.args = (f"{path}: {error}",)
            raise

    @classmethod
    def _within(cls, data: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
        """The part of a file that holds the document; all of it, unless the document knows better."""
        return data

    def changed(self, **fields: Any) -> Self:
        """The same with other values of some fields, validated anew."""
        return type(self)(**{**dict(self), **fields})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    def digest(self) -> str:
        """Hex sha256 of the canonical JSON form; equal documents have equal digests."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.brief()})"

    __str__ = __repr__

    def brief(self) -> str:
        """A line on what is in it; the short values, unless a document knows better."""
        short = {name: value for name, value in self if isinstance(value, (str, int, float)) and name[:6] != "schema"}
        return ", ".join(f"{name}={value!r}" for name, value in short.items())
