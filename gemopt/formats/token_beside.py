"""What rows of tokens say beside the experts: how many there are, and which rows are none that counts once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.count_names import COLUMNS, NUMBERS, words_of
from gemopt.traces.files import ALTERING

NO_TRAFFIC = {
    "pad", "padding", "padded", "dummy", "dropped", "drop", "overflow", "skip", "skipped", "ignore", "ignored",
}  # fmt: skip
TRAINED = {"loss", "label", "labels", "response", "action"}  # of masks of tokens that were computed all the same
FLAGS = {"true", "false", "0", "1", "yes", "no"}
TIMES = {"count", "counts", "freq", "frequency", "multiplicity", "occurrences"}  # of one choice
EVENTS = {"event", "event_code", "event_type", "event_name", "action", "kind", "type"}


@dataclass
class Beside:
    """What columns that are not read for experts said so far; `alone`: whether each row names a single expert."""

    alone: bool = False
    numbers: dict[str, set[int]] = field(default_factory=lambda: {meaning: set() for meaning in NUMBERS})
    flags: dict[str, set[str]] = field(default_factory=dict)
    events: dict[str, set[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)  # columns whose numbers are heeded

    def watched(self, names: Iterable[str]) -> dict[str, str]:
        """Those of a row's columns that are looked at, and as what."""
        return {name: kind for name in names if (kind := self._kind(re.sub(r"\W+", "_", name.casefold()).strip("_")))}

    def _kind(self, bare: str) -> str:
        if meaning := next((each for each, names in NUMBERS.items() if bare in names), ""):
            return meaning
        if bare in (COLUMNS["count"] if self.alone else TIMES):
            return "times"
        if self.alone and bare in EVENTS:
            return "event"
        words = words_of(bare)
        return "flag" if words & NO_TRAFFIC or (ALTERING.search(bare) and not words & TRAINED) else ""

    def add(self, where: str, row: dict[str, Any], watched: dict[str, str]) -> None:
        """Keep what a row says; `InputError` where it says that it counts several times."""
        for name, kind in watched.items():
            text = str(row[name]).strip().casefold()
            if kind in NUMBERS and text.isdigit():
                self.numbers[kind].add(int(text))
                self.read.add(name)
            elif kind == "flag" and text in FLAGS:
                self.flags.setdefault(name, set()).add(text)
            elif kind == "event":
                self.events.setdefault(name, set()).add(text)
            elif kind == "times" and re.fullmatch(r"\d+(\.\d*)?", text) and float(text) != 1:
                hint = "counts of experts are read by --from csv; else repeat the row so often, and leave it out"
                raise InputError(f"{where}: {name}", row[name], "rows that count once", hint)

    def number(self, meaning: str, option: int | None) -> int | None:
        """What all rows say; `InputError` where they contradict each other, or the option."""
        told = self.numbers[meaning] | ({option} if option is not None else set())
        if len(told) > 1:
            shown = ", ".join(map(str, sorted(told)))
            hint = f"--{meaning.replace('_', '-')} is {option}" if option is not None else "import networks apart"
            raise InputError(f"PATHS: {meaning}", shown, "one number", hint)
        return next(iter(told), None)

    def refuse_no_traffic(self) -> None:
        """Raise where a column tells some rows apart from those that count."""
        for found in (self.flags, self.events):
            name = next((each for each, cells in found.items() if len(cells) > 1), None)
            if name is not None:
                shown = f"{name} {', '.join(sorted(found[name])[:4])}"
                hint = f"leave out the rows that do not count, then {name}"
                raise InputError("PATHS", shown, "rows of tokens that were computed, and nothing else", hint)
