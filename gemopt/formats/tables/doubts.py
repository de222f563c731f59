"""What in an imported profile is hardly right, in words: it is taken as it is, and said."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from gemopt.formats.tables.columns import ENOUGH, LoadOf
from gemopt.formats.tables.files import Table
from gemopt.profile import Device, Profile, Sample, unit_doubt

DISAGREE = 0.2  # of a latency: repeats that lie further around their median are hardly of one kind
SLOW = 1.5  # times what a larger load takes, or smaller ones one after the other
APART = 4.0  # times what another device takes
DIGITS, COPIES = 5, 3
TICK_US = 0.032  # events of CUDA count in these, or in 1.024 us
STEADY = 1.1  # times what another repeat takes, under every load: not by chance
ROUGH, EXACT = 0.1, 1e-6  # of the shortest time; of a multiple
SHORT = 4  # times as far as another device was measured


def doubts(profile: Profile, *, numbered: bool) -> list[str]:
    """One sentence each on units, repeats that disagree, times that were copied, slow loads, devices far apart.

    numbered: a column numbers repeats, or was said to; rows of one load that nothing tells apart are named else.
    """
    asked = (unit_doubt, _disagreeing, *(() if numbered else (_merged,)), _copied, _rounded, _slow, apart, _short)
    return [found for ask in asked if (found := ask(profile))]


def repeats_apart(devices: Sequence[Table], columns: Sequence[str], load_of: LoadOf, time: str) -> list[str]:
    """A sentence on each column of repeats of which one takes longer than another under every load.

    columns: those that tell repeats; time: the column with the time.
    """
    found = []
    for name in columns:
        times: dict[str, dict[tuple[float, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
        for i, device in enumerate(devices):
            for row in device.rows:
                times[row.cells[name]][i, *load_of(row)].append(float(row.cells[time]))
        shared = sorted(set.intersection(*(set(each) for each in times.values())))
        if not 1 < len(times) <= len(shared) or len(shared) < ENOUGH:
            continue
        median = {one: np.array([statistics.median(times[one][at]) for at in shared]) for one in times}
        fast, slow = (pick(median, key=lambda one: float(np.median(median[one]))) for pick in (min, max))
        ratio = median[slow] / np.maximum(median[fast], 1e-300)
        if ratio.min() > STEADY:
            told = f"{name} {slow} takes {np.median(ratio):.3g} times what {fast} takes, and longer under every load"
            found.append(f"{told}: repeats of one kind?")
    return found


def _merged(profile: Profile) -> str:
    rows = [sample.repeats or 1 for each in profile.devices for sample in each.samples]
    several = sum(each > 1 for each in rows)
    if not several or _disagreeing(profile):
        return ""
    told = f"{several} of {len(rows)} loads have up to {max(rows)} rows"
    return f"{told} that no column tells apart: their medians are taken"


def _disagreeing(profile: Profile) -> str:
    samples = [sample for each in profile.devices for sample in each.samples]
    apart = [sample for sample in samples if (sample.spread_us or 0) > DISAGREE * sample.latency_us]
    if not apart:
        return ""
    worst = max(apart, key=lambda sample: (sample.spread_us or 0) / sample.latency_us)
    times = f"{_said(worst)}, half of them off by {worst.spread_us:.4g}"
    return f"the times of {len(apart)} of {len(samples)} loads disagree ({times}): are all rows of one kind?"


def _copied(profile: Profile) -> str:
    """The loads far apart that take the same to more digits than any clock repeats."""
    for device in profile.devices:
        alike: dict[str, list[int]] = {}
        for sample in device.samples:
            alike.setdefault(f"{sample.latency_us:.10g}", []).append(sample.assignments)
        for told, loads in alike.items():
            ticks = f"{float(told) / TICK_US:.10g}"
            exact = min(len(each.replace(".", "").strip("0")) for each in (told, ticks)) >= DIGITS
            if exact and len(loads) >= COPIES and max(loads) >= SHORT * min(loads):
                few = f"{len(loads)} loads from {min(loads)} to {max(loads)}"
                return f"{few} take exactly {told} us: copied, not measured?"
    return ""


def _rounded(profile: Profile) -> str:
    """The times that are multiples of a power of ten of microseconds, which is much of the shortest."""
    each = [[sample.latency_us for sample in device.samples if sample.assignments] for device in profile.devices]
    if all(len(set(times)) == len(times) for times in each):
        return ""
    times = sorted({time for times in each for time in times})
    unit = 10.0 ** np.ceil(np.log10(times[0]))
    while abs(np.array(times) / unit - np.rint(np.array(times) / unit)).max() > EXACT and unit > ROUGH * times[0]:
        unit /= 10
    told = f"times are multiples of {unit:g} us, and the shortest is {times[0]:g}: rounded? write more digits"
    return told if unit > ROUGH * times[0] else ""


def _slow(profile: Profile) -> str:
    """The sample that takes longest beside what serving it in runs of another sample's load would take."""
    pairs = [pair for each in profile.devices for pair in _beaten(each)]
    if not pairs:
        return ""
    _, slow, fast = max(pairs, key=lambda pair: pair[0])
    return f"{_said(slow)}, but {_said(fast)}: a first run, or a failed one?"


def _beaten(device: Device) -> list[tuple[float, Sample, Sample]]:
    """How many times what runs of another load would take each sample takes, where above `SLOW`, and that load.

    The other has at least as many active experts; a load above it takes several runs.
    """
    table = np.nan_to_num(device.table())
    found = []
    for sample, (load, active, latency, _) in zip(device.samples, table, strict=True):
        runs = np.maximum(np.ceil(load / np.maximum(table[:, 0], 1)), 1)
        usable = (table[:, 0] > 0) & (table[:, 1] >= active)
        times = np.where(usable, runs * table[:, 2], np.inf)
        best = int(times.argmin())
        if latency > SLOW * times[best]:
            found.append((latency / times[best], sample, device.samples[best]))
    return found


def apart(profile: Profile) -> str:
    """The two devices that are furthest apart at one load, idling aside."""
    at: dict[tuple[int, int | None], list[tuple[float, int]]] = {}
    for device in profile.devices:
        for sample in filter(lambda each: each.assignments, device.samples):
            at.setdefault((sample.assignments, sample.active_experts), []).append((sample.latency_us, device.rank))
    worst = max(at.values(), key=lambda found: max(found)[0] / min(found)[0], default=[(1.0, 0)])
    (fast, quick), (slow, late) = min(worst), max(worst)
    if slow <= APART * fast:
        return ""
    return f"at one load rank {late} takes {slow:.4g} us and rank {quick} {fast:.4g}: are all times in one unit?"


def _short(profile: Profile) -> str:
    """The devices that were measured least and furthest."""
    reach = [(max(sample.assignments for sample in each.samples), each.rank) for each in profile.devices]
    (least, near), (most, far) = min(reach), max(reach)
    if most <= SHORT * least:
        return ""
    return f"rank {near} was measured up to {least} assignments, rank {far} up to {most}: beyond, it is a guess"


def _said(sample: Sample) -> str:
    return f"{sample.assignments} assignments: {sample.latency_us:.4g} us"
