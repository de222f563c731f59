"""How far a long command is, and how long it still takes: a bar or a table on standard error, on terminals only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

from rich import box
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gemopt.cli.app import errors
from gemopt.words import Voice

if TYPE_CHECKING:
    from gemopt.solving.layers import Standing

Advance = Callable[[int, int | None], None]
OTHER_LINES = 9  # of a screen, around the rows of a table
REFRESH_S = 0.25


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


def one_by_one(advance: Advance | None, total: int) -> Callable[..., None]:
    """What moves a bar on by one whenever it is called, with whatever."""
    done = count(1)
    return lambda *_: None if advance is None else advance(next(done), total)


@contextmanager
def layers_shown(
    title: str, layer_ids: Sequence[int], num_steps: int, *, limit_s: float, hidden: bool = False
) -> Iterator[Callable[[Sequence[Standing]], None] | None]:
    """Within, a call with how the layers stand renews a table of them; None where nobody looks, as for `progress`."""
    if hidden or Voice.quiet or not errors.is_terminal:
        yield None
        return
    begin = shown = time.monotonic()
    with Live(console=errors, transient=True, auto_refresh=False) as live:

        def renew(layers: Sequence[Standing]) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= REFRESH_S:
                heading = f"{title}, {now - begin:.0f} of {limit_s:.0f} s"
                live.update(
                    layers_table(heading, layers, layer_ids, num_steps, errors.height - OTHER_LINES), refresh=True
                )
                shown = now

        yield renew


def layers_table(
    title: str, layers: Sequence[Standing], layer_ids: Sequence[int], num_steps: int, most_rows: int
) -> Table:
    """Incumbent and bound of each layer, and of all; of too many layers those where most is open."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    for head in ("layer", "us per step", "bound", "gap %"):
        table.add_column(head, justify="right", no_wrap=True)
    chosen = sorted(range(len(layers)), key=lambda n: -_open_us(layers[n]))[: max(1, most_rows)]
    for n in sorted(chosen):
        table.add_row(str(layer_ids[n]), *_cells(*layers[n], num_steps))
    if len(chosen) < len(layers):
        table.add_row("...", "", "", "")
    values = [layer.objective_us for layer in layers if layer.objective_us is not None]
    whole = sum(values) if len(values) == len(layers) else None
    table.add_row("all", *_cells(whole, sum(layer.bound_us for layer in layers), num_steps), style="bold")
    return table


def _open_us(layer: Standing) -> float:
    return float("inf") if layer.objective_us is None else layer.objective_us - layer.bound_us


def _cells(objective_us: float | None, bound_us: float, num_steps: int) -> tuple[str, str, str]:
    bound = f"{bound_us / num_steps:.2f}" if bound_us else "-"
    if objective_us is None:
        return "-", bound, "-"
    gap = 100 * max(0.0, objective_us - bound_us) / objective_us if objective_us else 0.0
    return f"{objective_us / num_steps:.2f}", bound, f"{gap:.2f}" if bound_us else "-"
