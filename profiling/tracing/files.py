"""The folder a running tracer grows: numbered files, each complete; and joining those of several ranks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gemopt.exceptions import InputError
from gemopt.traces import Phase, Tokens, Traces, concatenate
from gemopt.traces.files import numbered_files


class TraceFolder:
    """Writes parts of one trace as `000000.safetensors`, `000001.safetensors`, ...

    With `rank`, in the folder `rank-NNNN` of the path, for ranks that have batches of their own.

    Raises
    ------
    InputError
        When the folder already holds a trace, or cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int | None = None) -> None:
        self.path = Path(path) if rank is None else Path(path) / f"rank-{rank:04d}"
        self.num_parts = 0
        try:
            Path(path).mkdir(exist_ok=True)
            self.path.mkdir(exist_ok=True)
            taken = next(self.path.glob("*.safetensors"), None)
        except OSError as error:
            raise InputError(str(path), error.strerror or str(error), "a folder for the trace is needed") from None
        if taken is not None:
            raise InputError(
                str(path), taken.name, "a new or empty folder is needed", "an earlier trace is there: move it away"
            )

    def append(self, part: Traces) -> None:
        """Write the next part; `InputError` when the disk is full, with all earlier parts in place."""
        part.save(self.path / f"{self.num_parts:06d}.safetensors")
        self.num_parts += 1


def load_ranks(path: str | os.PathLike[str]) -> Traces:
    """Join what ranks with batches of their own recorded: step by step, their assignments added up.

    After a kill the ranks may have written different numbers of steps: the steps that all of them have are kept,
    and with them pair counts and transitions only when nothing was cut.

    Raises
    ------
    InputError
        When a rank's folder is missing or holds another network.
    """
    folders = sorted(Path(path).glob("rank-[0-9]*"))
    if not folders:
        raise InputError(str(path), "no rank-... folder", "a folder written by several tracing ranks is needed")
    parts = [concatenate([Traces.load(file) for file in numbered_files(folder)]) for folder in folders]
    ranks = [int(folder.name.removeprefix("rank-")) for folder in folders]
    num_steps = min(part.num_steps for part in parts)
    parts = [part if part.num_steps == num_steps else part.steps(slice(0, num_steps)) for part in parts]
    side_by_side = concatenate(parts)  # checks that all are of one network
    return Traces(
        counts=np.stack([part.counts for part in parts]).sum(axis=0, dtype=np.int64),
        layer_ids=side_by_side.layer_ids,
        num_hidden_layers=side_by_side.num_hidden_layers,
        top_k=side_by_side.top_k,
        model=side_by_side.model,
        phase=_agreed(side_by_side.phase, num_steps, otherwise=Phase.MIXED),
        task=_agreed(side_by_side.task, num_steps, otherwise=-1),
        task_names=side_by_side.task_names,
        pair_counts=side_by_side.pair_counts,
        transitions=side_by_side.transitions,
        tokens=_join_tokens(parts, ranks),
    )


def _agreed(tags: np.ndarray | None, num_steps: int, *, otherwise: int) -> np.ndarray | None:
    """[T] the tag of each step where all ranks have the same."""
    if tags is None:
        return None
    by_rank = tags.reshape(-1, num_steps)
    return np.where((by_rank == by_rank[0]).all(axis=0), by_rank[0], otherwise)


def _join_tokens(parts: list[Traces], ranks: list[int]) -> Tokens | None:
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if len(tokens) < len(parts):
        return None
    steps = np.concatenate([token.step_of_token for token in tokens])
    order = np.argsort(steps, kind="stable")
    senders = None  # unknown where several ranks share a batch
    if all(token.source_rank is not None for token in tokens):
        senders = np.repeat(ranks, [len(token.ids) for token in tokens])[order]
    offset, requests = 0, []
    for token in tokens:
        if token.request is not None:
            requests.append(token.request.astype(np.int64) + offset)  # files keep the smallest type that fits
            offset = int(requests[-1].max(initial=offset - 1)) + 1
    token_ids = [token.token_ids for token in tokens if token.token_ids is not None]
    return Tokens(
        ids=np.concatenate([token.ids for token in tokens])[order],
        step_of_token=steps[order],
        source_rank=senders,
        token_ids=np.concatenate(token_ids)[order] if len(token_ids) == len(parts) else None,
        request=np.concatenate(requests)[order] if len(requests) == len(parts) else None,
    )
