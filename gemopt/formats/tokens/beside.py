"""What rows of tokens say beside the experts: how many there are, and which rows are none that counts once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.counts.told import NOTHING, WHOLE
from gemopt.formats.names import COLUMNS, COUNTING, NUMBERS, PHASES, words_of
from gemopt.formats.tokens.cells import numbers_in, without_weight
from gemopt.traces.files import ALTERING
from gemopt.traces.telling import NETWORKS, NO_TRAFFIC, PROCESSES

COMPUTED = {
    "loss",
    "label",
    "labels",
    "response",
    "action",
    "eos",
    "special",
}  # of masks and flags that leave out no tokens
FLAGS = {"true", "false", "0", "1", "yes", "no"}
OFFSET = re.compile("expert_(start|begin|offset)|first_expert")
COUNTED = COUNTING | {"n", "num", "assignments", "sizes", "usage", "occurrences"}  # words of lists beside the experts
WEIGHTED = {"weight", "weights", "prob", "probs", "score", "scores", "gate", "gates"}
TIMES = {"count", "counts", "freq", "frequency", "multiplicity", "occurrences"}  # of one choice
TOKENS = re.compile(
    r"(num_|n_)?((actual|real|valid|scheduled|unpadded)_)?(num_)?tokens(_unpadded)?|(seq_?)?len(gth)?"
)  # of a row
BATCHES = {"batch_size", "bs", "bsz", "num_seqs", "num_sequences", "num_reqs", "num_requests"}
EVENTS = {"event", "event_code", "event_type", "event_name", "action", "kind", "type"}


def _sizes(row: dict[str, Any]) -> list[int]:
    """How many sequences a row says that it is of."""
    cells = (str(cell) for name, cell in row.items() if name.casefold() in BATCHES)
    return [int(found[1]) for found in map(WHOLE.fullmatch, cells) if found]


@dataclass
class Beside:
    """What columns that are not read for experts said so far; `alone`: whether each row names a single expert."""

    alone: bool = False
    numbers: dict[str, set[int]] = field(default_factory=lambda: {meaning: set() for meaning in NUMBERS})
    flags: dict[str, set[str]] = field(default_factory=dict)
    no_flags: set[str] = field(default_factory=set)  # columns of lengths and scales
    events: dict[str, set[str]] = field(default_factory=dict)
    parts: dict[str, dict[str, set[str]]] = field(default_factory=dict)  # layers of networks and processes, by column
    read: set[str] = field(default_factory=set)  # columns whose numbers are heeded

    def watched(self, names: Iterable[str], has_experts: bool) -> dict[str, str]:
        """Those of a row's columns that are looked at, and as what; of a row without experts the numbers alone."""
        kinds = {name: self._kind(re.sub(r"\W+", "_", name.casefold()).strip("_")) for name in names}
        return {name: kind for name, kind in kinds.items() if kind in NUMBERS or (kind and has_experts)}

    def _kind(self, bare: str) -> str:
        if meaning := next((each for each, names in NUMBERS.items() if bare in names), ""):
            return meaning
        if bare in (COLUMNS["count"] if self.alone else TIMES):
            return "times"
        if self.alone and bare in EVENTS:
            return "event"
        if OFFSET.search(bare):
            return "offset"
        if bare in NETWORKS | PROCESSES:
            return "part"
        if TOKENS.fullmatch(bare):
            return "tokens"
        words = words_of(bare)
        if (words & NO_TRAFFIC or "mask" in words or ALTERING.search(bare)) and not words & COMPUTED:
            return "flag"
        return "" if self.alone else "counted" if words & COUNTED else "weights" if words & WEIGHTED else ""

    def add(self, where: str, row: dict[str, Any], watched: dict[str, str], layer: str) -> None:
        """Keep what a row of a layer says; `InputError` where it says that it counts several times."""
        for name, kind in watched.items():
            text = str(row[name]).strip().casefold()
            if kind in NUMBERS and (whole := WHOLE.fullmatch(text)):
                self.numbers[kind].add(int(whole[1]))
                self.read.add(name)
            elif kind == "flag" and name not in self.no_flags:
                cells = {re.sub(r"\.0+$", "", each) for each in re.findall(r"[^\s,;\[\]()]+", text)}  # of each token
                self.flags.setdefault(name, set()).update(cells & FLAGS)
                self.no_flags |= set() if cells <= FLAGS | NOTHING else {name}
            elif kind == "event" and text not in PHASES:
                self.events.setdefault(name, set()).add(text)
            elif kind == "part":
                self.parts.setdefault(name, {}).setdefault(text, set()).add(layer)
            elif kind == "times" and re.fullmatch(r"\d+(\.\d*)?", text) and float(text) != 1:
                hint = "repeat the row so often if it stands for as many, then leave it out; --from csv reads counts"
                raise InputError(f"{where}: {name}", row[name], "rows that count once", hint)
            elif kind == "offset" and text not in NOTHING:
                limit = "experts numbered from 0 over all ranks"
                raise InputError(f"{where}: {name}", row[name], limit, "add it to the experts, then leave it out")

    def check_lists(self, where: str, row: dict[str, Any], watched: dict[str, str], each: list[list[int]]) -> None:
        """Raise where a row says that what it lists, the experts of each token, is something else.

        More tokens than there are, by a number; how many chose each expert; tokens of no weight.
        """
        for name, kind in watched.items():
            cell = row[name]
            if kind == "tokens" and (told := WHOLE.fullmatch(str(cell))) and int(told[1]) < len(each):
                if len(each) in (int(told[1]) * size for size in _sizes(row)) and "len" in name.casefold():
                    continue
                limit, hint = (
                    f"the {len(each)} whose experts are listed",
                    "padded, as for a graph? leave the others out",
                )
                raise InputError(f"{where}: {name}", cell, limit, f"{hint}; else leave the column out")
            if kind in ("tokens", "times", "counted") and len(each) == 1 and len(numbers_in(cell)) == len(each[0]) > 1:
                found, hint = str(cell)[:100], "do tokens choose the experts as often? then a row for each token"
                hint += ", or rows layer, expert, count for --from csv; else leave it out"
                raise InputError(f"{where}: {name}", found, "the experts of tokens, and no count of each", hint)
        weights = {name: row[name] for name, kind in watched.items() if kind == "weights"}
        if len(weights) == len(each[0] if each else ()) > 1:  # each in a column of its own
            weights[" and ".join(weights)] = f"[{', '.join(map(str, weights.values()))}]"
        for name, cell in weights.items():
            if without_weight(cell, each):
                hint = "padding? leave them out; were they computed? leave the column out"
                raise InputError(f"{where}: {name}", "a token of no weight", "tokens that were computed", hint)

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
        for part, told in self.parts.items():
            apart = sum(map(len, told.values())) == len(set().union(*told.values()))  # each has layers of its own
            if len(told) > 1 and (part.casefold() in NETWORKS or not apart):
                one = "import one of those that saw the same tokens; leave the column out where each had its own"
                hint = "import each network apart" if part.casefold() in NETWORKS else one
                shown = f"{part} {', '.join(sorted(told)[:4])}"
                raise InputError("PATHS", shown, "rows of one network, every token once", hint)
        flags = {name: cells for name, cells in self.flags.items() if name not in self.no_flags}
        for found in (flags, self.events):
            name = next((each for each, cells in found.items() if len(cells) > 1), None)
            if name is not None:
                shown = f"{name} {', '.join(sorted(found[name])[:4])}"
                hint = f"leave out the rows that do not count, then {name}"
                raise InputError("PATHS", shown, "rows of tokens that were computed, and nothing else", hint)
