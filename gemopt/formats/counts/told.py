"""What columns of count tables say that are alike in all lines: how many experts there are, or what counts are of."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemopt.exceptions import InputError
from gemopt.formats.names import NUMBERS, TABLES, words_of
from gemopt.traces.files import ALTERING, COPIES, NOT_ALTERED, NOT_COPIES, meant

NOT = {"0", "0.0", "false", "no"}
NOTHING = {*NOT, "", "none", "null", "nan"}
ALL = {"1", "1.0", "true", "yes"}
SLOTS = re.compile(
    r"physical([ _-]?(ids?|experts?|expert[ _-]?ids?|slots?))?|slots?|(local|slot)[ _-]?(experts?[ _-]?)?ids?"
)
WRITTEN = {"text", "token", "tokens", "word", "piece", "string", "str", "content", "prompt", "response", "output"}
"""Words of texts that a network read or wrote."""
WHOLE = re.compile(r"(\d{1,9})(?:\.0*)?", re.ASCII)


def numbers(columns: Mapping[str, str]) -> dict[str, int]:
    """`num_experts` and `top_k` where columns say them; columns: the cell of each in all lines, by its name.

    Raises
    ------
    InputError
        A column that says that the counts are of slots or copies, or are still to be scaled, masked and the like.
    """
    told = {}
    for name, cell in columns.items():
        refuse_slots("PATHS", name, cell)
        text = cell.strip().casefold()
        meaning = next((each for each, names in NUMBERS.items() if name in names), None)
        if meaning is not None and (found := WHOLE.fullmatch(text)):
            told[meaning] = int(found[1])
        elif says_nothing(name, text):
            continue
        elif ALTERING.search(name):
            raise InputError(f"PATHS: {name}", cell, "counts alone", NOT_ALTERED)
        elif COPIES.search(name) and not re.search("local|expert_id", name):
            raise InputError(f"PATHS: {name}", cell, "counts of logical experts", f"{NOT_COPIES}; then leave it out")
    return told


def refuse_slots(where: str, name: str, cell: object) -> None:
    """Raise where a text says that experts are slots: `{"id_space": "physical"}`."""
    if isinstance(cell, str) and SLOTS.fullmatch(cell.strip().casefold()) and not words_of(name) & WRITTEN:
        raise InputError(f"{where}: {name}", cell, "logical experts", f"{NOT_COPIES}; then leave it out")


def refuse_own_layers(columns: Mapping[str, str], first: int) -> None:
    """Raise where a column says that the first layer cannot be `first`: a stage or the MoE layers have own numbers."""
    for name, cell in columns.items():
        number = WHOLE.fullmatch(cell.strip())
        if meant(name) == "layer_ids" and name not in TABLES and number and "freq" not in name:
            least = int(number[1]) if "layer" in name or "dense" in name else min(int(number[1]), 1)
            if first < least:
                found, limit = f"{cell}, but layer {first} is there", "layers numbered through the network"
                raise InputError(f"PATHS: {name}", found, limit, f"number the layers so, then leave {name} out")


def says_nothing(name: str, text: str) -> bool:
    """Whether a cell, in small letters, says that there are no copies, or that nothing is to be done to the counts."""
    if not ALTERING.search(name):
        return text in NOTHING or (text in ALL and "replicas" in name)
    if "vali" in name:
        return text not in NOT
    if "warm" in name:
        return text not in ALL  # but how many steps
    return text in NOTHING or (text in ALL and bool(re.search("scal|factor|sampl", name)))
