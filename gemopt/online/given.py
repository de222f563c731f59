"""Files that were read once, at the start: which of them are other files now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[int, int] | None  # size and time of the last change; None: not there


class Given:
    """The profile, rules and knobs of a watch. Files that vanish, or are written anew as they were, are no news."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._stamps = {path: _stamp(path) for path in paths}
        self._contents = {path: _content(path) for path in self._stamps}

    def replaced(self) -> list[Path]:
        """Those that have become others since the last call."""
        found = []
        for path, known in self._stamps.items():
            stamp = _stamp(path)
            if stamp is None or stamp == known:
                continue
            self._stamps[path], content = stamp, _content(path)
            if content and content != self._contents[path]:
                self._contents[path] = content
                found.append(path)
        return found


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
