"""The page, the figure and the history of the public benchmark, from its rows."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from balancers import VERSIONS
from cells import CELLS
from machine import stamp
from methods import BASE, GEM, GEM_STEPS, GEM_WINDOW, LIMIT_S, OF_PAPERS, OURS, PATIENCE, WINDOW

import gemopt
from gemopt.plotting import save, subplots

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "peers.svg"
HISTORY = ("release", "date", "cells", "lost", "level", "ahead", "median lead", "worst", "peers")
SHAPES = "osD^vP<>X*"
COLOURS = ("#b35900", "#009e73", "#a3568c", "#3d95c7", "#b8860b", "#d55e00", "#7f7f7f")  # as on the report page
EQUAL = 0.001  # a lead that the table hardly shows
Row = dict[str, Any]
ASKED: tuple[tuple[str, Callable[[str], bool]], ...] = (  # what is asked for, and of which cells
    ("behind the best peer nowhere", lambda cell: True),
    ("ahead with one slow GPU", lambda cell: "slower" in cell),
    ("ahead under a roofline, as at decode", lambda cell: "roofline" in cell),
    ("ahead on synthetic 58 x 256", lambda cell: cell.startswith("58 x 256")),
    ("ahead with spare slots", lambda cell: "slots" in cell),
    ("ahead where shifting traffic is followed", lambda cell: cell.startswith("replay")),
)
PAGE = """\
# gemopt beside published balancers

## Where it stands

Of {count} cells {lost} lost, {level} level, {ahead} ahead. Lost: {which}.

{stands}

`lead`: how far gemopt is ahead, in points of held-out change: medians of the cells, the smallest and the largest one.

![Held-out change of every method in every cell](../../docs/pictures/peers.svg)

## How it was measured

{stamp}; {versions}.

`make peers` runs what is missing and writes this page; `run` is the day of a row. The cells are fixed
(`benchmarks/peers/cells.py`). Balancers of engines are the files of their wheels, nothing rewritten; GEM and MoETuner
are those papers' methods as gemopt reads them. gemopt runs with the same options everywhere: `auto`, patience
{patience}, {limit:g} s, the defaults; under replay its controller with its own. Limits and seconds are CPU seconds of
one core, compiling left out.

Changes are of the summed makespan against contiguous placement, in per cent, on steps that nothing was fitted on (the
second half of a trace): medians over seeds, lowest and highest in brackets. A seed draws the GPUs and, where it is
synthetic, the traffic. `lead`: how far gemopt is ahead of the peer with the best median, seed by seed, in points; `on
fitted steps`: the same on the steps that both saw; `on engines'`: ahead of the best that an engine ships. `gap`: what
is left to gain on the fitted steps, at most, in per cent. Lost or ahead means in every seed, by more than {equal:.1f}
points of `lead`. Lost cells come first.

## Cell by cell

{summary}

## What to know

* Published balancers are called once with all fitted steps, from contiguous placement; vllm-ascend's from the next
  rank's first experts in spare slots, as it starts. They know no speeds of ranks and no latencies.
* GEM is read twice. `{gem}` searches the true objective on every fitted step, with gemopt's cost models and kernels:
  more than the paper is known to do. Without copies it ends close to gemopt, as a search of the same kind.
  `{gem_window}` does so on the last {gem_steps} fitted steps, as many as the paper is said to record (second-hand,
  from readers' notes).
* Placements equally good on the fitted steps are not on others. FlashLB's lead on tiny-MoE shift, G=8, is such a draw:
  two of three scored phases are of a kind that the fitted ones lack, and a seed draws GPUs there, not text. Over 162
  draws each of layers, GPUs and kinds not seen, FlashLB is 0.6 ± 0.5 points behind on tiny-MoE and 0.4 ± 0.3 ahead on
  gpt-oss; single draws deviate by 7 and 4 (`fitting.md`).
* The whole list was run on 2026-12-01, one core for it and other work on the second one, which costs the large cells
  some of their CPU seconds' worth: quiet, 58 x 256 on 64 ranks with 320 slots had -51.7 in place of -50.9.
* 58 x 256 on 8 ranks, one GPU slower or not, has little left to find: gemopt is ahead by 0.5 on the fitted steps, by
  0.1 and 0.6 on the others. On 32 and 64 ranks GEM had been 9.8 and 5 points behind on a slower processor, for want of
  time; here it ends where gemopt does.
* Cells of gpt-oss and tiny-MoE that are level with GEM are so on the fitted steps too, by 0.2 points: both search for
  nearly all of the time and end at the same placements or at equal ones. At decode GEM is 0.1 points ahead on the
  fitted steps of 58 x 256, since it proves nothing.
* SwiftBalancer moves at most one expert between two ranks at a call; an engine calls it again and again.
* A second copy of an expert on one rank is left out of its table. GEM and MoETuner leave spare slots empty.
* All are scored by the cost model that gemopt fits to the profile (`auto`), copies sharing evenly.
* `gap` is proven: no placement is further below on the fitted steps. `moves` are counted from contiguous placement.
* Under replay copying is in the score. Balancers run at their engines' default periods, and once more every {window}
  steps on the last {window}, which no engine does by default; the better one counts. No gap there: placements change.
* MoETuner's ILPs do not fit the limit on 58 layers; those layers are packed by mean load, which is what the ILP levels.

{details}
## By release

{history}
"""


def read(path: Path) -> list[Row]:
    """The rows of all cells and seeds done with this release."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["release"] == gemopt.__version__]


@dataclass(frozen=True)
class Verdict:
    """A cell: every method's held-out changes by seed, and gemopt against the peer with the best median."""

    cell: str
    held: dict[str, dict[int, float]]

    @property
    def best(self) -> str:
        """The peer, contiguous placement included, with the lowest median."""
        return self._best({OURS})

    @property
    def shipped(self) -> str:
        """The same of what engines ship."""
        return self._best({OURS, *OF_PAPERS})

    def _best(self, apart: set[str]) -> str:
        return min(self.held.keys() - apart, key=lambda name: (median(self.held[name].values()), name))

    def ahead_of(self, name: str) -> list[float]:
        """By how much gemopt is ahead of a peer, seed by seed, as a share of contiguous placement."""
        return [self.held[name][seed] - ours for seed, ours in self.held[OURS].items()]

    @property
    def leads(self) -> list[float]:
        """By how much gemopt is ahead of the best peer."""
        return self.ahead_of(self.best)

    @property
    def word(self) -> str:
        """Lost or ahead: in every seed, by more than `EQUAL`; level: neither."""
        if max(self.leads) < -EQUAL:
            return "lost"
        return "ahead" if min(self.leads) > EQUAL else "level"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Lost cells first, then level ones, the smallest lead first."""
    held: dict[str, dict[str, dict[int, float]]] = {cell.name: defaultdict(dict) for cell in CELLS}
    for row in rows:
        if row["held"] is not None and row["cell"] in held:
            held[row["cell"]][row["method"]][row["seed"]] = row["held"]
    words = ("lost", "level", "ahead")
    found = [Verdict(*each) for each in held.items() if each[1]]
    return sorted(found, key=lambda each: (words.index(each.word), median(each.leads)))


def write(results: Path, *, record: bool) -> None:
    """The page beside the rows, the figure, and on request this release's line of the history."""
    rows = read(results)
    if not rows:
        raise SystemExit(f"{results}: no rows of gemopt {gemopt.__version__}")
    table = verdicts(rows)
    draw(table)
    history = results.with_name("peers_history.csv")
    if record:
        remember(history, table)
    kept = history.read_text().splitlines() if history.exists() else []
    results.with_suffix(".md").write_text(page(table, rows, [line.split(",") for line in kept]))
    print(f"wrote {results.with_suffix('.md')} and {FIGURE}")


def page(table: Sequence[Verdict], rows: Sequence[Row], history: Sequence[Sequence[str]]) -> str:
    """What was compared, what was lost, every cell, and the releases."""
    by_word = {word: [each.cell for each in table if each.word == word] for word in ("lost", "level", "ahead")}
    return PAGE.format(
        stamp=stamp("numpy", "numba", "torch"),
        versions=VERSIONS,
        patience=PATIENCE,
        limit=LIMIT_S,
        window=WINDOW,
        gem=GEM,
        gem_window=GEM_WINDOW,
        gem_steps=GEM_STEPS,
        equal=100 * EQUAL,
        count=len(table),
        **{word: len(cells) for word, cells in by_word.items()},
        which="; ".join(by_word["lost"]) or "none",
        stands="\n".join(stands(table)),
        summary="\n".join(summary(table, rows)),
        details="\n".join(details(table, rows)),
        history="\n".join("| " + " | ".join(line) + " |" for line in [HISTORY, ["---"] * len(HISTORY), *history[1:]]),
    )


def spread(values: Sequence[float], unit: float = 100.0, sign: str = "+") -> str:
    """Median, and lowest and highest where there are several."""
    shown = [f"{unit * value:{sign}z.1f}" for value in (median(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def stands(table: Sequence[Verdict]) -> list[str]:
    """One line for each thing asked for: in how many cells it holds, by how much, and against what engines ship."""
    lines = [
        "| asked | holds in | lead over the best peer | over the best that engines ship | not in |",
        "|" + "---|" * 5,
    ]
    for number, (asked, among) in enumerate(ASKED):
        cells = [each for each in table if among(each.cell)]
        missed = [each for each in cells if each.word == "lost" or (number and each.word == "level")]
        leads = [spread([median(each.ahead_of(name)) for each, name in zip(cells, names, strict=True)])
                 for names in ([each.best for each in cells], [each.shipped for each in cells])]  # fmt: skip
        where = "; ".join(f"{each.cell} ({100 * median(each.leads):+z.1f}, {each.word})" for each in missed)
        lines.append(f"| {asked} | {len(cells) - len(missed)} of {len(cells)} | {' | '.join(leads)} | {where or '-'} |")
    return lines


def summary(table: Sequence[Verdict], rows: Sequence[Row]) -> list[str]:
    """One line per cell."""
    lines = ["| cell | seeds | gemopt | best peer | which | lead | on fitted steps | CPU s | of the peer | gap | "
             "on engines' | |", "|" + "---|" * 12]  # fmt: skip
    for each in table:
        ours, best = ([row for row in rows if (row["cell"], row["method"]) == (each.cell, name)]
                      for name in (OURS, each.best))  # fmt: skip
        fitted = [theirs["fitted"] - own["fitted"] for own in ours for theirs in best
                  if own["seed"] == theirs["seed"] and own["fitted"] is not None]  # fmt: skip
        seconds = [f"{median(row['seconds'] for row in of):.3g}" for of in (ours, best)]
        lines.append(f"| {each.cell} | {len(ours)} | {_spread(ours, 'held')} | {_spread(best, 'held')} | {each.best} | "
                     f"{spread(each.leads)} | {spread(fitted) if fitted else '-'} | {' | '.join(seconds)} | "
                     f"{_spread(ours, 'gap', '')} | {spread(each.ahead_of(each.shipped))} | {each.word} |")  # fmt: skip
    return lines


def details(table: Sequence[Verdict], rows: Sequence[Row]) -> list[str]:
    """Every method on every cell."""
    lines = []
    for verdict in table:
        lines += [f"## {verdict.cell}", "", "| method | held out | fitted | moves | CPU s | gap | run |"]
        lines += ["|" + "---|" * 7]
        mine = [row for row in rows if row["cell"] == verdict.cell and row["held"] is not None]
        for name in sorted(verdict.held, key=lambda name: median(verdict.held[name].values())):
            own = [row for row in mine if row["method"] == name]
            cells = [spread([row["held"] for row in own])]
            cells += [_spread(own, "fitted"), f"{median(row['moves'] for row in own):.0f}"]
            cells += [f"{median(row['seconds'] for row in own):.3g}" if name != BASE else "-", _spread(own, "gap", "")]
            cells += [max(row["day"] for row in own)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _spread(rows: Sequence[Row], field: str, sign: str = "+") -> str:
    values = [row[field] for row in rows if row[field] is not None]
    return spread(values, sign=sign) if values else "-"


def remember(path: Path, table: Sequence[Verdict]) -> None:
    """Write this release's line, instead of an earlier one of the same release."""
    lines = list(csv.reader(path.open())) if path.exists() else [list(HISTORY)]
    words = [each.word for each in table]
    leads = [median(each.leads) for each in table]
    kept = [line for line in lines if line[0] != gemopt.__version__]
    found = [len(table), *(words.count(word) for word in ("lost", "level", "ahead"))]
    points = [f"{100 * value:+z.1f}" for value in (median(leads), min(leads))]
    kept.append([gemopt.__version__, str(date.today()), *map(str, found), *points, VERSIONS.replace(",", ";")])
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(kept)


def draw(table: Sequence[Verdict]) -> None:
    """Held-out change by cell: a mark per method, gemopt's filled and with its spread."""
    mpl.rcParams["svg.hashsalt"] = "gemopt"  # the same figure, the same file
    figure, ax = subplots(1, 1, size=(10, 1.5 + 0.36 * len(table)))
    names = [name for name in dict.fromkeys(name for each in table for name in each.held) if ", every" not in name]
    peers = [name for name in names if name not in (OURS, BASE)]
    for y, each in enumerate(reversed(table)):
        for name in peers:
            values = [
                v for key, by in each.held.items() if key.partition(", every")[0] == name for v in [median(by.values())]
            ]
            if values:
                place = peers.index(name)
                ax.plot(100 * min(values), y, SHAPES[place + 1], mfc="none", mec=COLOURS[place % len(COLOURS)], ms=7)
        ours = [100 * value for value in each.held[OURS].values()]
        ax.plot([min(ours), max(ours)], [y, y], "-", color="#0072b2", lw=3, solid_capstyle="butt")
        ax.plot(median(ours), y, SHAPES[0], color="#0072b2", ms=8)
    for place, name in enumerate(peers):
        ax.plot([], [], SHAPES[place + 1], mfc="none", mec=COLOURS[place % len(COLOURS)], label=name)
    ax.plot([], [], SHAPES[0], color="#0072b2", label=OURS)
    ax.axvline(0, color="#999999", lw=1)
    ax.set_yticks(range(len(table)), [each.cell for each in reversed(table)])
    ax.set_ylim(-0.7, len(table) - 0.3)
    ax.grid(axis="y", color="#e5e5e5")
    ax.set_xlabel("held-out change against contiguous placement, per cent (left is better)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, frameon=False)
    save(figure, FIGURE)
