"""Forward passes of rows that number neither steps nor tokens: a network computes its layers one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gemopt.exceptions import InputError
from gemopt.formats.findings import refuse_parts
from gemopt.words import counted


@dataclass
class Passes:
    """The passes so far: each row that lists tokens is one of its layer, as are rows of one layer in turn."""

    together: str  # what else tells which tokens are computed together
    begun: dict[int, int] = field(default_factory=dict)  # passes of each layer
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)  # of a pass and layer
    last: tuple[Path, int] | None = None
    listed: bool = True  # whether all rows list tokens
    files: dict[int, list[Path]] = field(default_factory=dict)  # with rows of each layer

    def of(self, path: Path, layer: int, tokens: int, *, listed: bool) -> int:
        """The pass that a row with so many tokens of a layer is of."""
        if (known := self.files.setdefault(layer, [path]))[-1] != path:
            known.append(path)
        if listed or self.last != (path, layer):
            self.begun[layer] = self.begun.get(layer, 0) + 1
        self.last, self.listed = (path, layer), self.listed and listed
        number = self.begun[layer] - 1
        self.tokens[number, layer] = self.tokens.get((number, layer), 0) + tokens
        return number

    def check(self, columns: str) -> list[str]:
        """Notes; `InputError` unless every layer has as many tokens in each pass, and for files of parts of passes."""
        files = max(self.files.values(), key=len)
        refuse_parts(files)
        passes = max(self.begun.values())
        whole = len(self.tokens) == passes * len(self.begun) and all(
            len({self.tokens[number, layer] for layer in self.begun}) == 1 for number in range(passes)
        )
        told = self.listed or (len(self.begun) > 1 and max(self.tokens.values()) > 1)  # not token after token
        if not whole or not told:
            raise InputError("PATHS", columns, "which tokens are computed together", self.together)
        kind = "a list of tokens is" if self.listed else "rows of one layer in turn are"
        said = [f"no column numbers the steps: {kind} taken as what a forward pass computed, in this order"]
        if passes == 1 and not self.listed:
            tokens = counted(max(self.tokens.values()), "token")
            said.append(f"{tokens} in one step: were the rows sorted by layer? then number the steps")
        if len(files) > 1:
            said.append(f"{len(files)} files, one after the other in time: {files[0].name} to {files[-1].name}")
        return said
