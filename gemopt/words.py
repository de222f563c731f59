"""Words for people: counts in sentences, and a line about the work (what takes long) where somebody looks on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

WHOLE = re.compile(r"(?<![\w.-])\d+(?!\.?\w)")  # a number by itself


def counted(number: int, noun: str) -> str:
    """`1 layer`, `3 layers`, `0 copies`, `2 forward passes`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def gathered(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Each text, and how often it was there: those that differ in whole numbers alone are one, with `3 to 7` in it."""
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(WHOLE.sub("#", text), []).append(text)
    found = []
    for several in alike.values():
        numbers = zip(*(map(int, WHOLE.findall(text)) for text in several), strict=True)
        ranges = [f"{min(each)}" + f" to {max(each)}" * (min(each) < max(each)) for each in numbers]
        between = WHOLE.split(several[0])
        found.append((between[0] + "".join(map(str.__add__, ranges, between[1:])), len(several)))
    return sorted(found)


def short(value: float, digits: int = 3) -> str:
    """So many digits of a number; a large one has no exponent: `332`, `1150`, `0.48`."""
    return f"{float(f'{value:.{digits}g}'):.15g}"


def outside(share: float) -> str:
    """What to say of loads that were not measured; nothing where next to all were."""
    worth_saying = share > 0.01
    return f"{100 * share:.0f} % of the loads lie outside the measured range of the profile" if worth_saying else ""


class Voice:
    """How much is said, for one command of the command line."""

    quiet = False
    verbose = False


def say(line: str) -> None:
    """Write to standard error where somebody looks on: a terminal, or an interactive session such as a notebook."""
    if not Voice.quiet and sys.stderr is not None and (sys.stderr.isatty() or hasattr(sys, "ps1")):
        print(f"gemopt: {line}", file=sys.stderr, flush=True)
