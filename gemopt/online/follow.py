"""A folder that grows: which steps are new, whatever happens to its files meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from gemopt.exceptions import GemoptError, InputError
from gemopt.traces import Traces, concatenate, hidden_path
from gemopt.words import counted

Read = Callable[[Sequence[Path]], Traces]
Stamp = tuple[int, int]  # size and time of the last change
PATIENCE = 5


@dataclass
class News:
    """What a look at the folder brought: steps, and one line for each thing that went wrong.

    unsure: so many of the steps, the first ones, were perhaps timed before the last call of `Follower.changed`.
    """

    traces: Traces | None = None
    unsure: int = 0
    faults: list[str] = field(default_factory=list)


class Follower:
    """Reads the files of a folder once each, in order, as they are complete.

    Without `read`, the folder is one of traces: numbered safetensors files, each complete and renamed into place. With
    it, the folder is an engine's: the files that are new and have not changed since the look before go to `read`
    together, since an engine may write one file per rank; `suffixes`: how their names end, if not anyhow.

    A file that cannot be read is tried again at the next looks; after `patience` of them it is left out, with its
    reason. Files may vanish; a missing number is waited for as long, then skipped. A part that was read and is another
    file now, or a part 0 that is newer than the part read last, begins another recording; what was read already, and
    parts that are older than its part 0, are left over from the one before.
    """

    def __init__(
        self, folder: Path, read: Read | None = None, *, suffixes: Sequence[str] = (), patience: int = PATIENCE
    ) -> None:
        self.folder, self.read, self.suffixes, self.patience = folder, read, suffixes, patience
        self._next = self._newest = 0  # part; time of change of the newest one read, in ns
        self._known = 0  # part from which on it is known under which placement ranks were timed
        self._strange: set[str] = set()
        self._folders: list[str] = []
        self._done: dict[str, Stamp] = {}
        self._seen: dict[str, Stamp] = {}
        self._tries = self._restless = 0

    @property
    def position(self) -> dict[str, Any]:
        """What was read so far, for `resume`."""
        read = {"next": self._next, "newest": self._newest, "known": self._known, "done": self._done}
        return {"folder": str(self.folder.resolve()), **read}

    @property
    def begun(self) -> bool:
        """Whether anything was read, perhaps before a restart."""
        return bool(self._newest or self._done)

    def resume(self, position: dict[str, Any]) -> None:
        """Go on behind what was read of this folder; all of it is new where the position is of another one."""
        if position.get("folder") == str(self.folder.resolve()):
            self._next, self._newest = position["next"], position["newest"]
            self._known = position.get("known", 0)
            self._done = {name: (size, time) for name, (size, time) in position["done"].items()}

    def changed(self) -> None:
        """Another placement has come into force: new parts that are there were timed before it, the next in part."""
        with suppress(OSError):
            stamps = _stamps(path for path in self._files() if _numbered(path))
            parts = [int(path.stem) for path, stamp in stamps.items() if self._done.get(path.name) != stamp]
            self._known = max([self._next - 1, *parts]) + 2

    def notice(self) -> None:
        """See an engine's files without reading any: those that do not change until the next look have rested."""
        with suppress(OSError):
            self._seen = {path.name: stamp for path, stamp in _stamps(self._files()).items()}

    def look(self) -> News:
        """Everything that is new since the last look."""
        try:
            files = self._files()
            self._folders = sorted(f"{path.name}/" for path in self._visible() if path.is_dir())
        except OSError as error:
            return News(faults=[f"{self.folder}: {error.strerror or error}"])
        return self._numbered(files) if self.read is None else self._grouped(files, self.read)

    def _files(self) -> list[Path]:
        return sorted(path for path in self._visible() if path.is_file())

    def _visible(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if not path.name.startswith(".")]

    def _numbered(self, files: Sequence[Path]) -> News:
        stamps = _stamps(files)
        every = {int(path.stem): path for path in stamps if _numbered(path)}
        named = (
            "parts are called 000000.safetensors, 000001.safetensors, ...: left unread; dumps of an engine need --from"
        )
        news, found = News(faults=self._strangers(files, every.values(), f"{named}, as in --from sglang")), []
        self._begin_anew(every, stamps, news)
        parts = {number: path for number, path in every.items() if self._done.get(path.name) != stamps[path]}
        while any(number >= self._next for number in parts):
            if self._next not in parts and self._next in every:
                self._next += 1  # left over from another recording
                continue
            if self._next not in parts:
                later = min(number for number in parts if number >= self._next)
                several = f"parts {self._next:06d} to {later - 1:06d} are missing"
                gap = f"{self.folder}: {f'part {self._next:06d} is missing' if later == self._next + 1 else several}"
                if not self._give_up():
                    news.faults += [f"{gap}: waited for"] * (self._tries == 1)
                    break
                news.faults.append(f"{gap}: left out")
                self._next = later
                continue
            try:
                found.append(Traces.load(parts[self._next], allow_idle=True))
                news.unsure += found[-1].num_steps * (self._next < self._known)
            except Exception as error:  # whatever a damaged file leads to
                news.faults.append(told(error))
                if not self._give_up():
                    break
                news.faults.append(f"{parts[self._next].name}: left out after {self.patience} tries")
            self._done[parts[self._next].name] = stamp = stamps[parts[self._next]]
            self._newest = max(self._newest, stamp[1])
            self._next += 1
            self._tries = 0
        news.traces = self._joined(found, news)
        names = {path.name for path in every.values()} | {f"{0:06d}.safetensors"}
        self._done = {name: stamp for name, stamp in self._done.items() if name in names}
        return news

    def _begin_anew(self, every: dict[int, Path], stamps: dict[Path, Stamp], news: News) -> None:
        """Go back to the first part that has become another file since it was read, whatever clocks say."""
        again = [
            n for n, path in every.items() if n < self._next and self._done.get(path.name, stamps[path]) != stamps[path]
        ]
        if self._next and 0 in every and stamps[every[0]][1] > self._newest:
            again.append(0)
        if not again:
            return
        self._next, self._known = min(again), 0
        first = stamps[every[self._next]][1]
        news.faults.append(f"{every[self._next]}: another file than before: another recording has begun")
        if self._next == 0:
            self._done |= {path.name: stamps[path] for path in every.values() if stamps[path][1] < first}

    def _strangers(self, files: Sequence[Path], parts: Iterable[Path], why: str) -> list[str]:
        """A line, once, on files that are no parts and on folders in the folder: they are never read."""
        known = self._strange | {path.name for path in parts} | {hidden_path(self.folder).name}
        new = [name for name in [*(path.name for path in files), *self._folders] if name not in known]
        self._strange |= set(new)
        if any(name.startswith("rank-") and name.endswith("/") for name in new):
            why += "; ranks that recorded batches of their own are added up by gemopt.profiling.tracing.load_ranks"
        return [f"{self.folder}: got {_some(new)}; {why}"] if new else []

    def _grouped(self, files: Sequence[Path], read: Read) -> News:
        dumps = [path for path in files if not self.suffixes or path.name.endswith(tuple(self.suffixes))]
        stamps = {path.name: stamp for path, stamp in _stamps(dumps).items()}
        fresh = {name: stamp for name, stamp in stamps.items() if self._done.get(name) != stamp}
        restless = [name for name, stamp in fresh.items() if self._seen.get(name) != stamp]
        why = f"dumps end in {' or '.join(self.suffixes)}: left unread"
        self._seen, news = stamps, News(faults=self._strangers(files, dumps, why))
        self._restless = self._restless + 1 if restless else 0
        if self._restless == self.patience > 1:
            news.faults.append(f"{self.folder}: {_some(restless)} changed at each of {self.patience} looks: waited for")
        if restless or not fresh:
            return news
        try:
            news.traces = read([self.folder / name for name in sorted(fresh)])
        except Exception as error:  # whatever a damaged file leads to
            news.faults.append(told(error))
            if not self._give_up():
                return news
            news.faults.append(f"{', '.join(sorted(fresh))}: left out after {self.patience} tries")
        self._done |= fresh
        self._done = {name: stamp for name, stamp in self._done.items() if name in stamps}
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
            joined = concatenate(found)
        except InputError as error:  # another network: what comes last is what is served now
            same = len(list(takewhile(lambda part: _alike(part, found[-1]), reversed(found))))
            joined = concatenate(found[-same:])
            left = sum(part.num_steps for part in found[:-same])
            news.unsure = max(0, news.unsure - left)
            news.faults.append(f"{self.folder}: {error}: the first {counted(left, 'step')} left out")
        if joined.rank_us is None and any(part.rank_us is not None for part in found):
            news.faults.append(f"{self.folder}: parts differ in their ranks' times: left out")
        return joined


def told(error: Exception) -> str:
    """A line: what gemopt refuses in its words, anything else with its name."""
    return " ".join((str(error) if isinstance(error, GemoptError) else f"{type(error).__name__}: {error}").split())


def _alike(one: Traces, other: Traces) -> bool:
    """Whether parts can be joined."""
    try:
        concatenate([one, other])
    except InputError:
        return False
    return True


def _numbered(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.stem.isdecimal()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    """Of the files that have not gone since the folder was listed."""
    stamps = {}
    for path in files:
        with suppress(OSError):
            stat = path.stat()
            stamps[path] = (stat.st_size, stat.st_mtime_ns)
    return stamps
