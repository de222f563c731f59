"""Files: atomic replacement, and JSON documents that are pydantic models with a schema version.

Every document of gemopt is written under a temporary name, flushed and renamed, so that a reader never
meets half a file and a failed write leaves the old file as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)

from gemopt.exceptions import InputError

Self = TypeVar("Self", bound="Document")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it over `path` when the block ends without error.

    Raises
    ------
    InputError
        When the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent or ".", prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(str(target), error.strerror or str(error), "a folder that can be written") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            str(target),
            error.strerror or str(error),
            "the file could not be written; the old one is untouched",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file `path` by `text` (UTF-8) atomically."""
    with replacing(path) as stream:
        stream.write(text.encode())


def read_bytes(path: str | os.PathLike[str], *, limit_bytes: int = 1 << 31) -> bytes:
    """Read a whole file; `InputError` when it is missing, a folder, unreadable or above `limit_bytes`."""
    try:
        size = os.stat(path).st_size
        if size > limit_bytes:
            raise InputError(str(path), f"{size} bytes", f"at most {limit_bytes} bytes")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(str(path), error.strerror or str(error), "a readable file is needed") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file. NaN and infinity are refused, as the JSON standard does."""

    def refuse(token: str) -> Any:
        raise InputError(str(path), token, "numbers must be finite")

    try:
        return json.loads(read_bytes(path), parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(str(path), str(error), "a complete JSON document is needed") from None


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file, or of the sorted files of a folder."""
    digest = hashlib.sha256()
    source = Path(path)
    for part in sorted(source.iterdir()) if source.is_dir() else [source]:
        digest.update(read_bytes(part))
    return digest.hexdigest()


class Document(BaseModel):
    """A JSON document: frozen, versioned, refusing unknown keys, raising one-line `InputError`s."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _one_line(error, type(self).__name__) from None
        if self.schema_version != self.SCHEMA_VERSION:
            raise InputError(
                f"{type(self).__name__}.schema_version",
                self.schema_version,
                f"this gemopt reads version {self.SCHEMA_VERSION}",
                "write the document again or use the gemopt that wrote it",
            )

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read and validate a document.

        Raises
        ------
        InputError
            One line naming the file and the key that is wrong.
        """
        data = read_json(path)
        if not isinstance(data, dict):
            raise InputError(str(path), type(data).__name__, f"a JSON object holding a {cls.__name__} is needed")
        try:
            return cls(**data)
        except InputError as error:
            error.args = (f"{path}: {error}",)
            raise

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


def _one_line(error: ValidationError, document: str) -> InputError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    where = ".".join(str(part) for part in first["loc"]) or document
    rest = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    found = "nothing" if first["type"] == "missing" else first["input"]
    return InputError(f"{document}.{where}", found, first["msg"].lower() + rest)


def integer_array(value: object, *, name: str, ndim: int, maximum: int = 2**31 - 1) -> np.ndarray[Any, Any]:
    """Convert to a read-only int64 array of `ndim` dimensions.

    Integral floats are accepted; NaN, fractions, text, ragged lists and values beyond +-`maximum` are not.
    """
    limit = f"whole numbers in a {ndim}-dimensional rectangular array are needed"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(name, value, limit) from None
    if array.ndim != ndim or array.dtype.kind not in "iuf":
        raise InputError(name, f"{array.dtype} array of shape {array.shape}", limit)
    if array.size and array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(name, "NaN or infinity", limit)
        if (array != np.floor(array)).any():
            raise InputError(name, float(array[array != np.floor(array)][0]), limit)
    if array.size and max(int(array.max()), -int(array.min())) > maximum:
        raise InputError(name, int(array.max()), f"values must lie within {maximum}")
    result = array.astype(np.int64)
    result.setflags(write=False)
    return result


def _array_type(ndim: int, kind: str, convert: Callable[[object], np.ndarray[Any, Any]]) -> Any:
    schema: dict[str, Any] = {"type": kind}
    for _ in range(ndim):
        schema = {"type": "array", "items": schema}
    return Annotated[
        np.ndarray,
        BeforeValidator(convert),
        PlainSerializer(lambda array: array.tolist(), return_type=list),
        WithJsonSchema(schema),
    ]


def _float_matrix(value: object) -> np.ndarray[Any, Any]:
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, TypeError):
        raise InputError("matrix", value, "a rectangular array of numbers is needed") from None
    if array.ndim != 2 or not np.isfinite(array).all():
        raise InputError("matrix", f"array of shape {array.shape}", "two dimensions of finite numbers are needed")
    array.setflags(write=False)
    return array


IntVector = _array_type(1, "integer", lambda value: integer_array(value, name="vector", ndim=1))
IntMatrix = _array_type(2, "integer", lambda value: integer_array(value, name="matrix", ndim=2))
FloatMatrix = _array_type(2, "number", _float_matrix)
