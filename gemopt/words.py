"""Counts in sentences for people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 layer`, `3 layers`, `0 copies`, `2 forward passes`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
