"""Files that a command will write, looked at before it works."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gemopt.exceptions import InputError

PICTURES = (".pdf", ".png", ".svg", ".jpg", ".jpeg")
NO_PAGES = (*PICTURES, ".json", ".md", ".txt", ".csv", ".docx")
Named = tuple[str, Path | None]
"""An option, and the file given with it."""


def check_outputs(*written: tuple[str, Path | None, str], read: Sequence[Named] = ()) -> None:
    """Refuse what cannot be written, two options of one file, and a file that another kind of document would replace.

    Parameters
    ----------
    written
        Option, its file, and what it will hold: "placement", "traces", "page", ...; "" for pictures and other files.
    read
        Files that the command reads, none of which it may write.
    """
    from gemopt.documents import check_writable, foreign

    taken = {os.path.realpath(path): option for option, path in read if path is not None}
    for option, path, kind in written:
        if path is None:
            continue
        if str(path) == "-":
            raise InputError(option, "-", "the name of a file", "--json prints on standard output")
        try:
            check_writable(path)
        except InputError as error:
            raise InputError(option, str(path), f"{error.limit}: there is {error.value}") from None
        if option == "--plot":
            from gemopt.plotting import check_picture

            check_picture(path)
        if kind == "traces":
            from gemopt.traces.files import check_name

            check_name(path, option)
        if kind == "page" and path.suffix.lower() in NO_PAGES:
            raise InputError(option, str(path), "the page is HTML", "end its name in .html")
        if kind not in ("", "page", "traces") and path.suffix.lower() in PICTURES:
            raise InputError(option, str(path), f"no picture: it holds {kind}", "another ending")
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise InputError(option, str(path), f"also the file of {other}", "give each its own")
        found = foreign.of_file(path)[0]
        if found.endswith(foreign.OURS) and foreign.kind(found) != kind:
            raise InputError(option, str(path), f"it is {found}, which would be lost", "give another name")
