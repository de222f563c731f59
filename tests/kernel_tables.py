"""What tests of kernel tables share."""

from __future__ import annotations

from pathlib import Path

from gemopt.profile import Profile


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def loads(profile: Profile, rank: int = 0) -> list[tuple[int, int | None, float]]:
    return [(s.assignments, s.active_experts, s.latency_us) for s in profile.devices[rank].samples]
