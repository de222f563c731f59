"""The files of a recording: those of folders, in the order of the numbers in their names, and what the names tell."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from gemopt.exceptions import InputError

_PHASE = re.compile(r"(?:^|[/_.-])(prefill|decode|decoding)(?=[/_.-](?!heavy)|\d|$)", re.IGNORECASE)

UNPACK = {
    ".zst": "zstd -d", ".gz": "gunzip", ".xz": "xz -d", ".bz2": "bunzip2", ".lz4": "lz4 -d", ".zip": "unzip",
    ".tar": "tar -xf", ".tgz": "tar -xf",
}  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tgz")
SAVE = {
    **dict.fromkeys((".h5", ".hdf5"), "numpy.save of its dataset, and --from array"),
    **dict.fromkeys((".feather", ".arrow", ".ipc"), "pandas.read_feather(PATH).to_parquet, and --from csv or tokens"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".joblib"), "pickles may run anything, and are not read: numpy.save of its array"
    ),
    **dict.fromkeys((".xlsx", ".xls"), "save it as CSV"),
    **dict.fromkeys((".csv", ".tsv", ".parquet"), "tables of counts: --from csv; of experts of tokens: --from tokens"),
}
TEXTS = (".txt", ".log", ".out")
TEXT = "a table with a header? name it .csv; lines of numbers alone: numpy.loadtxt(PATH), and --from array"


def files_of(
    paths: Sequence[Path], *suffixes: str, prefer: str = "", else_of: tuple[str, ...] = (), both_phases: bool = False
) -> list[Path]:
    """The files among `paths`, folders replaced by their files with one of `suffixes`.

    A folder's files, and paths in the order of a shell's `*`, come by the numbers in their names, `step_2` before
    `step_10`; others as given. Where a folder has files whose names start with `prefer`, its other files are left out.
    Files with a suffix of `else_of` are taken as well, of a folder where it has no others.

    Raises
    ------
    InputError
        A file is missing or of another kind, or some are named as of prefill and others as of decode.
    """
    found: list[Path] = []
    for path in sorted(paths, key=_by_number) if list(paths) == sorted(paths) else paths:
        if path.is_dir():
            shown = sorted((part for part in path.iterdir() if not part.name.startswith(".")), key=_by_number)
            _refuse_packed(shown, (*suffixes, *else_of))
            others = [part for part in shown if part.name.endswith(else_of)]
            first = [part for part in shown if part.name.endswith(suffixes) and not part.name.endswith(else_of)]
            if not (inside := [part for part in first if prefer and part.name.startswith(prefer)] or first or others):
                hint = next((known for part in shown if (known := _way_out(part, (*suffixes, *else_of)))), "")
                hint = "give its folders" if not hint and any(part.is_dir() for part in shown) else hint
                raise InputError(
                    str(path), "no file " + " or ".join(suffixes), "a folder with recordings is needed", hint
                )
            found += inside
        elif not os.access(path, os.R_OK):
            raise InputError(str(path), "no such file", "a readable file is needed")
        elif not path.name.endswith((*suffixes, *else_of)):
            hint = "counts in JSON: --from array" if path.suffix[:5] == ".json" else ""
            hint = _way_out(path) or hint
            limit = " or ".join((*suffixes, *else_of))
            raise InputError(str(path), path.suffix or "no suffix", f"a file {limit}", hint)
        else:
            found.append(path)
    if not found:
        raise InputError("PATHS", "nothing", "at least one file or folder")
    if not both_phases:
        _refuse_phases(found)
    return found


def left_alone(paths: Sequence[Path], files: Sequence[Path], suffixes: tuple[str, ...]) -> list[str]:
    """A note on the files of folders with one of the suffixes that are not among those read from them."""
    inside = [part for path in paths if path.is_dir() for part in path.iterdir() if not part.name.startswith(".")]
    names = sorted(part.name for part in inside if part.name.endswith(suffixes) and part not in files)
    return [f"beside arrays or tables, left unread: {', '.join(names)[:200]}"] if names else []


def _way_out(path: Path, read: tuple[str, ...] = ("",)) -> str:
    """What to do about a file that is not read, by its suffix; a packed one with one of `read` or an archive."""
    if path.suffix in UNPACK and (path.stem.endswith(read) or path.suffix in ARCHIVES):
        return f"unpack it: {UNPACK[path.suffix]}"
    return TEXT if path.suffix in TEXTS else SAVE.get(path.suffix, "")


def _refuse_packed(found: Sequence[Path], suffixes: tuple[str, ...]) -> None:
    """Raise where files of a folder are packed, and would be left out beside others; those unpacked there are not."""
    names = {path.name for path in found}
    for path in found:
        packed = path.suffix in UNPACK and not path.name.endswith(suffixes) and path.stem.endswith(suffixes)
        if packed and path.stem not in names:
            raise InputError(str(path), "a packed file", f"files {' or '.join(suffixes)}", _way_out(path))


def _by_number(path: Path) -> list[str | Decimal]:
    """The texts and the numbers of a name in turn."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", str(path), flags=re.ASCII)
    return [Decimal(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def names_of(files: Sequence[Path]) -> list[str]:
    """What tells files apart: their names after the folders that they have in common."""
    folder = os.path.commonpath([os.path.abspath(path.parent) for path in files])
    return [os.path.relpath(path, folder) for path in files]


def _refuse_phases(files: Sequence[Path]) -> None:
    """Raise for steps of prefill and of decode, by the names of files: they do not follow each other."""
    told = [{found[1].casefold()[:6] for found in _PHASE.finditer(name)} for name in names_of(files)]
    if len(set().union(*(each for each in told if len(each) == 1))) > 1:
        limit = "steps of one kind: these names tell prefill and decode"
        hint = "import each apart; gemopt export takes a placement for each (--decode)"
        raise InputError("PATHS", ", ".join(names_of(files))[:200], limit, hint)
