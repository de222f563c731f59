"""Options of moves, shared by `gemopt solve` and `gemopt compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Current = Annotated[Path | None, typer.Option("--current", help="placement.json in force: moves are counted from it")]
MovePrice = Annotated[float | None, typer.Option("--move-price", help="microseconds that moving one expert takes")]
ExpertBytes = Annotated[float | None, typer.Option("--expert-bytes", help="bytes of one expert of one layer")]
Bandwidth = Annotated[float | None, typer.Option("--bandwidth", help="GB/s a rank receives at, instead of a price")]
Horizon = Annotated[
    float | None, typer.Option("--horizon-steps", help="steps that moves may take to pay for themselves")
]
MaxMoves = Annotated[int | None, typer.Option("--max-moves", help="experts moved at most, over all layers")]
MaxPerLayer = Annotated[int | None, typer.Option("--max-moves-per-layer", help="experts moved at most in each layer")]
MaxBytes = Annotated[float | None, typer.Option("--max-bytes-per-rank", help="bytes each rank may receive in all")]
Exclude = Annotated[str | None, typer.Option("--exclude-ranks", help="ranks that serve no longer: 3 or 3,5")]
Add = Annotated[
    list[str] | None,
    typer.Option("--add-rank", help="a new rank like that device of the profile, or the devices of a profile.json"),
]

SaveProfile = Annotated[
    Path | None, typer.Option("--save-profile", help="write the profile of the ranks that the answer has")
]


def parse_excluded(text: str | None) -> list[int]:
    """`3` or `3,5`."""
    from gemopt.exceptions import InputError

    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError("--exclude-ranks", text, "a rank, or several separated by commas") from None


def parse_bytes(given: float | None) -> int | None:
    """Whole bytes, which may be typed as `9.4e6`, as rates are."""
    from gemopt.exceptions import InputError

    if given is not None and not given.is_integer():
        raise InputError("--expert-bytes", given, "a whole number of bytes, such as 9400000 or 9.4e6")
    return None if given is None else int(given)


def parse_added(given: list[str] | None) -> list[Any]:
    """A device number, or the path of a profile, each."""
    return [int(each) if each.lstrip("-").isdigit() else Path(each) for each in given or []]
