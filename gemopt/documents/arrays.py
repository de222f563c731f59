"""Arrays in documents, and arrays from users: whole numbers or floats, with nothing lost on the way.

A ragged list, a mask, labels that tell another order, and a number that is no whole one are refused in one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, PlainSerializer, ValidationInfo, WithJsonSchema

from gemopt.exceptions import InputError


def plain_array(name: str, value: object, limit: str, *, by_row: bool = False) -> np.ndarray[Any, Any]:
    """The array that a list, an array, a tensor or a data frame is; `InputError` where that would lose something.

    It would where it is ragged or on a device, where values are masked, and where labels tell another order. by_row:
    whether labels of rows need only increase, as those of some steps of many do.
    """
    _refuse_marked(name, value, limit, by_row=by_row)
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RecursionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # of torch's, which has the way out
        found = f"a {getattr(value, 'dtype', '')} tensor ({reason})" if hasattr(value, "numpy") else value
        raise InputError(name, found, limit) from None


def _refuse_marked(name: str, value: object, limit: str, depth: int = 2, *, by_row: bool = False) -> None:
    """Raise where a value, or one in its lists, has a mask, or rows and columns that are not numbered from 0 on."""
    if np.ma.is_masked(value):
        raise InputError(name, "masked values", limit, "fill them or leave them out")
    for axis in ("columns", "index"):
        labels = getattr(value, axis, None)
        if labels is None or callable(labels):  # as list.index is
            continue
        kind = getattr(getattr(labels, "dtype", None), "kind", "O")
        if by_row and axis == "index" and kind in "iufM" and labels.is_monotonic_increasing:
            continue
        numbers = [re.fullmatch(r"\D*0*?(\d{1,9})(?:\.0)?", str(label)) for label in labels]
        if [found and int(found[1]) for found in numbers] != [*range(len(numbers))]:
            shown = ", ".join(map(str, labels[:8])) + (", ..." if len(labels) > 8 else "")
            hint = "put it in the order that they tell, and give its .to_numpy(); numbers of layers are layer_ids"
            raise InputError(name, f"{axis} {shown}", f"{axis} 0 to {len(numbers) - 1}, as labels are not read", hint)
    for item in value if depth and isinstance(value, (list, tuple)) else ():
        if not isinstance(item, (int, float)):
            _refuse_marked(name, item, limit, depth - 1)


LARGEST = 2**31 - 1  # whole number in an array


def integer_array(value: object, *, name: str, ndim: int, by_row: bool = False) -> np.ndarray[Any, Any]:
    """Convert to a read-only int64 array of `ndim` dimensions. by_row: as in `plain_array`.

    Integral floats are accepted; NaN, fractions, text, ragged lists and values beyond +-`LARGEST` are not.
    """
    limit = f"whole numbers in a {ndim}-dimensional rectangular array are needed"
    array = plain_array(name, value, limit, by_row=by_row)
    if array.ndim != ndim or array.dtype.kind not in "iuf":
        raise InputError(name, f"{array.dtype} array of shape {array.shape}", limit)
    if array.size and array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(name, "NaN or infinity", limit)
        if (array != np.floor(array)).any():
            raise InputError(name, float(array[array != np.floor(array)][0]), limit)
    if array.size and max(int(array.max()), -int(array.min())) > LARGEST:
        worst = max(int(array.max()), int(array.min()), key=abs)
        raise InputError(name, worst, f"values must lie within {LARGEST}")
    result = array.astype(np.int64)
    result.setflags(write=False)
    return result


def _array_type(ndim: int, kind: str, convert: Callable[..., np.ndarray[Any, Any]]) -> Any:
    schema: dict[str, Any] = {"type": kind}
    for _ in range(ndim):
        schema = {"type": "array", "items": schema}

    def validate(value: object, info: ValidationInfo) -> np.ndarray[Any, Any]:
        return convert(value, name=info.field_name or "array", ndim=ndim)

    return Annotated[
        np.ndarray,
        BeforeValidator(validate),
        PlainSerializer(lambda array: array.tolist(), return_type=list),
        WithJsonSchema(schema),
    ]


def _floats(value: object, *, name: str, ndim: int) -> np.ndarray[Any, Any]:
    limit = f"finite numbers in a {ndim}-dimensional rectangular array are needed"
    found = plain_array(name, value, limit)
    if found.ndim != ndim or found.dtype.kind not in "iuf":
        raise InputError(name, f"{found.dtype} array of shape {found.shape}", limit)
    if not np.isfinite(found).all():
        raise InputError(name, "NaN or infinity", limit)
    array = found.astype(np.float64)
    array.setflags(write=False)
    return array


IntVector = _array_type(1, "integer", integer_array)
IntMatrix = _array_type(2, "integer", integer_array)
FloatMatrix = _array_type(2, "number", _floats)
