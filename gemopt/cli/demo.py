"""Command `gemopt demo`: real routing of gpt-oss-20b on eight GPUs as fast as GPUs of a measured fleet.

Fits every solver on the first half of the steps, scores it on the second half, prints one table per case, and writes a
picture of all and a page about one. Exact solvers stand in the last case only, the one of a size at which they answer
in seconds.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemopt.cli.app import app, console, examples, notice, say, show
from gemopt.exceptions import EXTRAS, InputError, MissingPackageError, install_hint

if TYPE_CHECKING:
    from gemopt.compare import Comparison
    from gemopt.profile import Profile
    from gemopt.result import Result
    from gemopt.traces import Traces

DATA = Path(__file__).resolve().parents[1] / "data"
TABLES = ("h100_vllm_gptoss20b_ep8.csv", "moe_block_rtxpro6000_qwen3_30b.csv", "gpu_variability.csv", "prompts.jsonl")
SOLVERS = ("linear", "eplb", "lpt", "gem", "conflict", "local-search")
EXACT = ("linear", "lpt", "local-search", "cpsat", "milp")
SMALL_LAYER, SMALL_STEPS = 12, 64
RANKS = 8
SLOW_RANK, SLOWER = 3, 1.3
REPORTED = 2  # the case that the page is about: one GPU is slower


@dataclass(frozen=True)
class Case:
    """One table: what is asked, on which devices, with which traffic, of whom, within how many seconds each.

    patience: as in `gemopt.solve`.
    """

    title: str
    profile: Profile
    traces: Traces
    solvers: tuple[str, ...] = SOLVERS
    time_limit: float = 1.5
    patience: int | None = None


def cases() -> list[Case]:
    """The cases, from the measured tables that come with gemopt."""
    from gemopt.formats.tables.kernel import Unit, read_fleet, read_table, slow_down, what_if
    from gemopt.traces import Traces

    fleet = read_fleet(DATA / "gpu_variability.csv", "longhorn_sgemm")
    h100 = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=4, ep=RANKS)
    h100 = h100.model_copy(update={"devices": [each.model_copy(update={"name": "H100"}) for each in h100.devices]})
    cluster = what_if(h100, fleet, ranks=RANKS, seed=0)
    mixed = Traces.load(DATA / "gptoss20b_trace_mixed_b64.npz")
    few = Traces(counts=mixed.counts[:SMALL_STEPS, SMALL_LAYER : SMALL_LAYER + 1])
    surface = on_surface(2, slow_rank=1)
    shift = Traces.load(DATA / "gptoss20b_trace_shift_b32.npz")
    return [
        Case("mixed traffic, eight H100 as fast as eight GPUs of a fleet", cluster, mixed),
        Case("the same, and one GPU is 30 % slower", slow_down(cluster, SLOW_RANK, SLOWER), mixed),
        Case("traffic that shifts from one domain to the next", cluster, shift),
        Case("latency by assignments and activated experts: two RTX PRO 6000, one 30 % slower",
             surface, mixed),
        Case(f"for exact solvers: the same two GPUs, layer {SMALL_LAYER} alone, {SMALL_STEPS} steps",
             surface, few, EXACT, 6.0, patience=20),
    ]  # fmt: skip


def on_surface(ranks: int, *, slow_rank: int) -> Profile:
    """GPUs whose latency was measured by assignments and activated experts, of which there were 8 at least.

    On two ranks every load of 32 experts is within what was measured; on more, some have fewer active experts.
    """
    from gemopt.formats.tables.kernel import Unit, read_fleet, read_table, slow_down, what_if

    fleet = read_fleet(DATA / "gpu_variability.csv", "longhorn_sgemm")
    memory = read_fleet(DATA / "gpu_variability.csv", "longhorn_bert")
    surface = read_table(DATA / "moe_block_rtxpro6000_qwen3_30b.csv", unit=Unit.TOKENS, top_k=8)
    return slow_down(what_if(surface, fleet, ranks=ranks, seed=0, memory=memory), slow_rank, SLOWER)


def plot(tables: list[tuple[str, list[Comparison]]], path: Path) -> None:
    """One panel per case."""
    from gemopt.plotting import plot_comparison, save, subplots

    figure, axes = subplots(3, 2, size=(15, 15))
    for ax in axes.flat[len(tables) :]:
        ax.set_axis_off()
    for ax, (title, rows) in zip(axes.flat, tables, strict=False):
        plot_comparison(rows, title=title, ax=ax)
    save(figure, path)


@app.command("demo", epilog=examples("gemopt demo", "gemopt demo --files ."))
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="folder for the page, the picture and the placements")] = Path(
        "out"
    ),
    files: Annotated[
        Path | None,
        typer.Option("--files", metavar="FOLDER", help="solve nothing; write the data there, to try commands on"),
    ] = None,
) -> None:
    """Solve five cases on real routing and measured GPUs, or write that data to try commands on."""
    if files is not None:
        for path in write_files(files):
            say(f"wrote {path}")
        return
    out.mkdir(parents=True, exist_ok=True)
    main(out)


def write_files(folder: Path) -> list[Path]:
    """A profile, traces and the tables behind them; `InputError` when one of them is there already."""
    from gemopt.documents import check_writable

    first, _, shifting, *_ = cases()
    folder.mkdir(parents=True, exist_ok=True)
    of_network: dict[str, Any] = {"top_k": 4, "num_hidden_layers": 24, "model": "gpt-oss-20b"}
    documents: dict[str, Any] = {
        "profile.json": first.profile,
        "traces.safetensors": replace(first.traces, **of_network),
        "shifting.safetensors": replace(shifting.traces, **of_network),
    }
    paths = [folder / name for name in (*documents, *TABLES)]
    for path in paths:
        check_writable(path)
        if path.exists():
            raise InputError("--files", str(path), "a folder without files of these names", "give another folder")
    for name, document in documents.items():
        document.save(folder / name)
    for name in TABLES:
        shutil.copyfile(DATA / name, folder / name)
    return paths


def main(out: Path) -> None:
    """Solve all cases and print."""
    from gemopt.cli.tables import comparison_table
    from gemopt.compare import compare

    notice("compiling kernels on the first run: a minute or two")
    _warm_up()
    begin = time.monotonic()
    tables: list[tuple[str, list[Comparison]]] = []
    results: dict[int, Result] = {}
    for number, case in enumerate(cases(), start=1):
        console.print(f"\n[bold]{number}. {case.title}[/bold]")

        def keep(row: Comparison, result: Result | None, number: int = number) -> None:
            if row.solver == "local-search" and result is not None and result.placement is not None:
                result.placement.save(out / f"placement_{number}.json")
                results[number] = result

        limits: dict[str, Any] = {"time_limit": case.time_limit, "patience": case.patience}
        rows = compare(case.profile, case.traces, solvers=case.solvers, on_result=keep, **limits)
        show(comparison_table(rows))
        tables.append((case.title, rows))
    say(f"\n{time.monotonic() - begin:.0f} s of solving. Changes are against contiguous placement; "
        f"held out is the second half of each trace.")  # fmt: skip
    say(f"wrote {out}/placement_[1-{len(tables)}].json")
    try:
        plot(tables, out / "demo.png")
        say(f"wrote {out}/demo.png")
    except MissingPackageError:
        say(f"no picture: {install_hint(EXTRAS['matplotlib'])}")
    _report(cases()[REPORTED - 1], results.get(REPORTED), out)


def _report(case: Case, result: Result | None, out: Path) -> None:
    """The page about one case, for a browser; `out` keeps what `gemopt report` needs to make it again."""
    if result is None:  # interrupted before
        return
    from gemopt.report import report

    result.save(out / "result.json")
    case.profile.save(out / "profile.json")
    case.traces.save(out / "traces.safetensors")
    files = [out / name for name in ("result.json", "profile.json", "traces.safetensors", "report.html")]
    line = "gemopt report {} --profile {} --traces {} -o {}".format(*map(str, files))
    try:
        made = report(*files[:3], command=line)
        made.save(files[3])
        say(f"{made.headline}\nwrote {files[3]}: open it in a browser")
    except MissingPackageError:
        say(f"no page: {install_hint(EXTRAS['plotly'])}")


def _warm_up() -> None:
    """Compile the kernels and load the exact solvers once, so that the seconds below are of solving."""
    from gemopt.compare import compare
    from gemopt.traces import Traces

    first, *_, surface, small = cases()
    searches, exact = ("local-search", "gem"), ("cpsat", "milp")
    for case, solvers in ((first, searches), (surface, searches), (small, exact)):
        few = Traces(counts=case.traces.counts[:8, :1])
        compare(case.profile, few, solvers=solvers, patience=1, time_limit=case.time_limit)
