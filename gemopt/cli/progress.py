"""How far a long command is, and how long it still takes: a bar on standard error, on terminals only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from gemopt.cli.app import Voice, errors

Advance = Callable[[int, int | None], None]


class TimeLeft(ProgressColumn):
    """What is left by the pace so far, and never more than the limit leaves."""

    def __init__(self, limit_s: float | None = None) -> None:
        super().__init__()
        self.limit_s = limit_s

    def render(self, task: Task) -> Text:
        """`0:12 left`, or nothing while there is no telling."""
        seconds = None if task.total is None else task.time_remaining
        if self.limit_s is not None:
            most = max(0.0, self.limit_s - (task.elapsed or 0.0))
            seconds = most if seconds is None else min(seconds, most)
        if seconds is None or task.finished:
            return Text("")
        minutes, rest = divmod(round(seconds), 60)
        return Text(f"{minutes}:{rest:02d} left")


@contextmanager
def progress(
    title: str, *, total: int | None = None, limit_s: float | None = None, hidden: bool = False
) -> Iterator[Advance | None]:
    """Within, a call with (done, total) moves the bar; None where nobody looks: no terminal, --quiet, --json."""
    if hidden or Voice.quiet or not errors.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeLeft(limit_s), console=errors, transient=True) as bar:
        task = bar.add_task(title, total=total)

        def advance(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
