"""What rows of tokens say, as far as they are read: experts by step or token, and by layer."""

from __future__ import annotations

from array import array as numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemopt.exceptions import InputError
from gemopt.formats.tokens.cells import layer_in
from gemopt.formats.tokens.order import Passes
from gemopt.traces import Phase
from gemopt.traces.arrays import ENOUGH_SUMS
from gemopt.words import counted

TOGETHER = "number the steps (step), or the tokens (request, token)"


@dataclass
class Rows:
    """What the rows say, one number for each: of the step or the token, of the layer, of the experts that follow."""

    by_step: bool
    of: list[int] = field(default_factory=list)  # the step, or the index into `tokens`
    layers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ids: numbers[int] = field(default_factory=lambda: numbers("i"))
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    files: dict[tuple[int, int], Path] = field(default_factory=dict)  # that hold a step and layer
    last: dict[tuple[Path, int], int] = field(default_factory=dict)  # step of a layer in a file
    seen: set[tuple[int, int, str, str, int]] = field(default_factory=set)  # step, layer, request, token and expert
    phases: dict[int, set[Phase]] = field(default_factory=dict)
    blank: int = 0
    other: int = 0
    unread: set[str] = field(default_factory=set)
    ranks: dict[str, str] = field(default_factory=dict)  # the one that each column of ranks names
    layer: str = ""  # the name of the column
    token: str = ""
    around: dict[bool, str] = field(default_factory=dict)  # what comes before the number in the names of layers
    batches: set[tuple[int, int, int]] = field(default_factory=set)  # step, layer, digest of the experts of many tokens
    passes: Passes = field(default_factory=lambda: Passes(TOGETHER))  # of rows that number no steps
    doubts: list[str] = field(default_factory=list)
    by_file: bool = False  # whether a file is a request, as no column numbers them

    def notes(self, phase: Phase | None) -> list[str]:
        """What was left out."""
        rank = " ".join(next(iter(self.ranks.items()), ()))
        said = [
            (rank, f"rows of {rank} alone: what other ranks recorded is not in them"),
            (self.blank, f"left out: {counted(self.blank, 'row')} without any expert (padding)"),
            (self.other, f"{counted(self.other, 'row')} without experts left unread"),
            (self.unread, f"{', '.join(sorted(self.unread))} left unread"),
            (phase is Phase.MIXED and not self.by_step, "prompts are replayed as if they had been generated"),
        ]
        return [text for wanted, text in said if wanted] + self.doubts

    def numbered(self, where: str, row: dict[str, Any], name: str) -> int:
        """The number of a row's layer; `InputError` where others in the column number their own."""
        around, layer = layer_in(where, row, name)
        if self.around.setdefault(bool(around), around) != around:
            limit = f"layers after {self.around[True]}, as in the rows before: others number their own"
            raise InputError(f"{where}: {name}", row[name], limit, "write the number alone")
        return layer

    def refuse_again(self, where: str, step: int, layer: int, each: list[list[int]]) -> None:
        """Raise where the experts of many tokens, in their order, came before in the step and layer."""
        if sum(map(len, each)) < ENOUGH_SUMS or len(each) < 2 or each.count(each[0]) == len(each):
            return
        key = step, layer, hash(tuple(map(tuple, each)))
        if key in self.batches:
            found, limit = f"the experts of {len(each)} tokens again", "every token once in a step and layer"
            hint = "ranks that saw the same tokens? keep one of them; requests that are alike? write them in one row"
            raise InputError(where, found, limit, hint)
        self.batches.add(key)

    def merge(self) -> None:
        """Make one row of those of each token and layer; `InputError` where they name an expert twice."""
        row = np.repeat(np.arange(len(self.of)), self.sizes)
        of, layers, ids = np.array(self.of)[row], np.array(self.layers)[row], np.frombuffer(self.ids, np.intc)
        order = np.lexsort((ids, layers, of))
        of, layers, ids = of[order], layers[order], ids[order]
        same = (np.diff(of) == 0) & (np.diff(layers) == 0)
        if (same & (np.diff(ids) == 0)).any():
            hint = f"do tokens count anew in each step? then {TOGETHER}"
            raise InputError("PATHS: experts", "one twice for a token in a layer", "different experts", hint)
        starts = np.flatnonzero(np.concatenate([[True], ~same]))
        self.of, self.layers = of[starts].tolist(), layers[starts].tolist()
        self.sizes, self.ids = np.diff(np.append(starts, len(ids))).tolist(), numbers("i", ids.tolist())

    def refuse_shares(self, experts: int) -> None:
        """Raise where rows hold a value for each expert of a step and layer, and no choices of tokens."""
        of, layers = np.repeat(self.of, self.sizes), np.repeat(self.layers, self.sizes)
        keys, sizes = np.unique(np.stack([of, layers, np.frombuffer(self.ids, np.intc)]), axis=1, return_counts=True)
        chosen = np.unique(keys[:2], axis=1, return_counts=True)[1]
        if sizes.max() == 1 and (chosen.min() < chosen.max() or chosen.max() == experts):
            hint = "shares of experts are no choices; of choices number the tokens (token)"
            raise InputError(
                "PATHS: experts", "each once in a step and layer", "a row for each choice of a token", hint
            )
