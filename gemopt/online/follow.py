"""A folder that grows: which steps are new, whatever happens to its files meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemopt.exceptions import InputError
from gemopt.traces import Traces, concatenate, hidden_path

Read = Callable[[Sequence[Path]], Traces]
Stamp = tuple[int, int]  # size and time of the last change
PATIENCE = 5


@dataclass
class News:
    """What a look at the folder brought: steps, and one line for each thing that went wrong."""

    traces: Traces | None = None
    faults: list[str] = field(default_factory=list)


class Follower:
    """Reads the files of a folder once each, in order, as they are complete.

    Without `read`, the folder is one of traces: numbered safetensors files, each complete and renamed into place. With
    it, the folder is an engine's: the files that are new and have not changed since the look before go to `read`
    together, since an engine may write one file per rank.

    A file that cannot be read is tried again at the next looks; after `patience` of them it is left out, with its
    reason. Files may vanish; a missing number is waited for as long, then skipped.
    """

    def __init__(self, folder: Path, read: Read | None = None, *, patience: int = PATIENCE) -> None:
        self.folder, self.read, self.patience = folder, read, patience
        self._next = 0
        self._strange: set[str] = set()
        self._done: dict[Path, Stamp] = {}
        self._seen: dict[Path, Stamp] = {}
        self._tries = 0

    def look(self) -> News:
        """Everything that is new since the last look."""
        try:
            files = sorted(path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))
        except OSError as error:
            return News(faults=[f"{self.folder}: {error.strerror or error}"])
        return self._numbered(files) if self.read is None else self._grouped(files, self.read)

    def _numbered(self, files: Sequence[Path]) -> News:
        parts = {int(path.stem): path for path in files if path.suffix == ".safetensors" and path.stem.isdecimal()}
        news, found = News(faults=self._strangers(files, parts.values())), []
        while any(number >= self._next for number in parts):
            if self._next not in parts:
                if not self._give_up():
                    break
                later = min(number for number in parts if number >= self._next)
                news.faults.append(f"{self.folder}: parts {self._next:06d} to {later - 1:06d} are missing: left out")
                self._next = later
                continue
            try:
                found.append(Traces.load(parts[self._next]))
            except InputError as error:
                news.faults.append(str(error))
                if not self._give_up():
                    break
                news.faults.append(f"{parts[self._next].name}: left out after {self.patience} tries")
            self._next += 1
            self._tries = 0
        news.traces = self._joined(found, news)
        return news

    def _strangers(self, files: Sequence[Path], parts: Iterable[Path]) -> list[str]:
        """A line, once, on files that are no parts: an engine's dumps without their reader would never be seen."""
        known = self._strange | {path.name for path in parts} | {hidden_path(self.folder).name}
        new = [path.name for path in files if path.name not in known]
        self._strange |= set(new)
        if not new:
            return []
        names = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        return [
            f"{self.folder}: got {names}; parts are called 000000.safetensors, 000001.safetensors, ...: left unread; "
            "dumps of an engine need --from, as in --from sglang"
        ]

    def _grouped(self, files: Sequence[Path], read: Read) -> News:
        stamps = {}
        for path in files:
            try:
                stat = path.stat()
            except OSError:  # gone since the folder was listed
                continue
            stamps[path] = (stat.st_size, stat.st_mtime_ns)
        fresh = {path: stamp for path, stamp in stamps.items() if self._done.get(path) != stamp}
        settled = fresh and all(self._seen.get(path) == stamp for path, stamp in fresh.items())
        self._seen = stamps
        if not settled:
            return News()
        news = News()
        try:
            news.traces = read(sorted(fresh))
        except InputError as error:
            news.faults.append(str(error))
            if not self._give_up():
                return news
            news.faults.append(
                f"{', '.join(path.name for path in sorted(fresh))}: left out after {self.patience} tries"
            )
        self._done |= fresh
        self._done = {path: stamp for path, stamp in self._done.items() if path in stamps}
        self._tries = 0
        return news

    def _give_up(self) -> bool:
        """Count a try in vain; whether it was the last."""
        self._tries += 1
        if self._tries < self.patience:
            return False
        self._tries = 0
        return True

    def _joined(self, found: Sequence[Traces], news: News) -> Traces | None:
        if not found:
            return None
        try:
            return concatenate(found)
        except InputError as error:  # another network: what comes last is what is served now
            news.faults.append(f"{self.folder}: {error}")
            return found[-1]
