"""What dispatch and combine send over the links of a topology, and how long that takes; no solver involved.

A token goes from its sender to the ranks of its experts (dispatch) and what they computed comes back (combine). Both
take as long as their fullest port: latency and bytes over bandwidth, or what was measured. Formulas: docs/topology.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gemopt.documents import Settings
from gemopt.exceptions import InputError, check_kind
from gemopt.latency import FloatArray
from gemopt.links.flows import Flow, Routes, deal, evenly, first_slot, from_counts, routes, uniform
from gemopt.links.report import BytesSaved, LinksReport
from gemopt.placement import Split
from gemopt.profile import Profile
from gemopt.topology import LEVELS, Topology, load
from gemopt.traces import Traces

IntArray = NDArray[Any]
WORD_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "bf16": 2, "fp16": 2}


class Exchange(Settings):
    """How an engine exchanges tokens; what a topology cannot know.

    Attributes
    ----------
    dispatch_bytes, combine_bytes
        Of one token to one destination and back. Default: hidden size and type of the profile.
    once_per
        A token goes to a destination once per `assignment` (DeepEP low latency), once per `rank` (the default: DeepEP
        within a node), or between nodes once per `node`, to the rank at the sender's place in it, and from there to its
        ranks (DeepEP between nodes).
    senders
        Where a token starts from: the rank that `recorded` it, every rank alike (`uniform`), or the rank that had the
        first of its experts in the `previous` MoE layer, where it then stays (context-coherent, as ExFlow); results go
        back to the sender, and with `previous` to the first expert's rank. Default: recorded where it is, else uniform.
    overlap
        Whether communication hides behind computing, as with two batches in turn: the longer of both counts.
    """

    dispatch_bytes: int | None = Field(default=None, gt=0)
    combine_bytes: int | None = Field(default=None, gt=0)
    once_per: Literal["assignment", "rank", "node"] = "rank"
    senders: Literal["recorded", "uniform", "previous"] | None = None
    overlap: bool = False


def check_asked(exchange: Exchange | None, topology: object) -> None:
    """Refuse to be told how tokens are exchanged where there are no links."""
    if exchange is not None and topology is None:
        raise InputError("exchange", repr(exchange), "says how tokens go over links", "give a topology")


@dataclass(frozen=True, eq=False)
class Communication:
    """What a placement's exchanges take on some steps. T steps, L layers, R ports.

    dispatch_TL, combine_TL: [T, L] microseconds. bytes_R: [R] through every port, over all steps and layers.
    cross_node_bytes, cross_rank_bytes: sent between nodes, and between ranks at all, both directions of an exchange.
    fullest_bytes: largest number of bytes through one port of each level, by its name.
    """

    dispatch_TL: FloatArray
    combine_TL: FloatArray
    bytes_R: FloatArray
    cross_node_bytes: float
    cross_rank_bytes: float
    fullest_bytes: dict[str, float]
    fullest_port: str

    @property
    def fullest_between(self) -> float:
        """Bytes through the fullest port between nodes; where links are of pairs, of the fullest one of all."""
        return self.fullest_bytes.get("between_nodes", self.fullest_bytes.get("pairs", 0.0))

    @property
    def time_TL(self) -> FloatArray:
        """[T, L] microseconds of dispatch and combine."""
        return self.dispatch_TL + self.combine_TL

    def exposed(self, makespan_TL: FloatArray, *, overlap: bool) -> FloatArray:
        """[T, L] microseconds that the exchanges add to the makespans."""
        return np.maximum(self.time_TL - makespan_TL, 0.0) if overlap else self.time_TL


@dataclass(frozen=True, eq=False)
class Links:
    """A topology, how tokens are exchanged over it, and which tokens: what couples ranks, and layers, beside `Problem`.

    traces: whose tokens are sent. senders: as in `Exchange`, decided. dispatch_bytes, combine_bytes: decided. even: as
    if all ports of a kind carried as much; for searches, which so see every byte instead of those of the fullest port.
    """

    topology: Topology
    exchange: Exchange
    traces: Traces
    senders: str
    dispatch_bytes: int
    combine_bytes: int
    even: bool = False
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        topology: Topology | str | os.PathLike[str],
        traces: Traces,
        num_ranks: int,
        *,
        profile: Profile | None = None,
        exchange: Exchange | None = None,
    ) -> Links:
        """Decide what was left open.

        Raises
        ------
        InputError
            The topology misses ranks, bytes of a token are not known, or the traces lack what was asked for.
        """
        topology, exchange = load(topology), Exchange() if exchange is None else exchange
        check_kind("exchange", exchange, Exchange)
        topology.check_ranks(num_ranks)
        size = _token_bytes(profile)
        dispatch = exchange.dispatch_bytes or exchange.combine_bytes or size
        combine = exchange.combine_bytes or exchange.dispatch_bytes or size
        if dispatch is None or combine is None:
            limit = "bytes of a token's activations: the profile says no hidden size and type of 2 or 4 bytes"
            raise InputError("token_bytes", None, limit, "give them: twice the hidden size in bfloat16")
        tokens = traces.tokens
        source = None if tokens is None else tokens.source_rank
        senders = exchange.senders or ("uniform" if source is None else "recorded")
        if tokens is None and (senders != "uniform" or exchange.once_per != "assignment"):
            asked = f"once per {exchange.once_per}, senders {senders}"
            raise InputError(
                "Traces.ids", None, f"the links need the token-level record ({asked})",
                "trace with token ids, or ask for once per assignment and uniform senders",
            )  # fmt: skip
        if senders == "recorded" and source is None:
            raise InputError("Traces.source_rank", None, "the rank of every token is not recorded", "uniform senders")
        if source is not None and len(source) and not (source.min() >= 0 and source.max() < num_ranks):
            worst = int(source.max()) if source.max() >= num_ranks else int(source.min())
            raise InputError("Traces.source_rank", worst, f"ranks 0 to {num_ranks - 1}")
        if exchange.senders is None and source is not None and len(source) and source.max() < num_ranks - 1:
            raise InputError(
                "Traces.source_rank", f"ranks 0 to {source.max()}", f"some token from each of {num_ranks} ranks",
                "ask for senders recorded if the others send none, or for uniform",
            )  # fmt: skip
        return cls(topology, exchange, traces, senders, dispatch, combine)

    def on(self, traces: Traces) -> Links:
        """The same links under other steps."""
        decided = {
            "senders": self.senders, "dispatch_bytes": self.dispatch_bytes, "combine_bytes": self.combine_bytes,
        }  # fmt: skip
        exchange = self.exchange.model_copy(update=decided)
        return Links.of(self.topology, traces, self.topology.num_ranks, exchange=exchange)

    def report(self, sent: Communication, exposed_us: float, saved: BytesSaved | None = None) -> LinksReport:
        """What is said of it in a result."""
        return LinksReport(
            topology=self.topology.name,
            once_per=self.exchange.once_per,
            senders=self.senders,
            overlap=self.exchange.overlap,
            dispatch_bytes=self.dispatch_bytes,
            combine_bytes=self.combine_bytes,
            dispatch_us=float(sent.dispatch_TL.sum()),
            combine_us=float(sent.combine_TL.sum()),
            exposed_us=exposed_us,
            cross_node_bytes=sent.cross_node_bytes,
            cross_rank_bytes=sent.cross_rank_bytes,
            fullest_bytes=sent.fullest_bytes,
            fullest_port=sent.fullest_port,
            saved=saved,
        )

    @property
    def coupled(self) -> bool:
        """Whether what one layer costs depends on where another has its experts."""
        return self.senders == "previous"

    @property
    def per_node(self) -> bool:
        """Whether a token goes to another node once."""
        return self.exchange.once_per == "node"

    def routes(self, *, spread: bool) -> tuple[Routes, Routes]:
        """Ports of every sender and destination, of dispatch and of combine; `spread`: senders are all ranks alike."""
        if spread not in self._cache:
            out = routes(self.topology, per_node=self.per_node, token_bytes=self.dispatch_bytes, back=False)
            back = routes(self.topology, per_node=self.per_node, token_bytes=self.combine_bytes, back=True)
            if self.even:
                kinds = np.stack([self.topology.ports.level_of, self.topology.ports.into], axis=1)
                kind_R = np.unique(kinds, axis=0, return_inverse=True)[1].ravel()
                out, back = evenly(out, kind_R), evenly(back, kind_R)
            self._cache[spread] = (uniform(out), uniform(back)) if spread else (out, back)
        found: tuple[Routes, Routes] = self._cache[spread]
        return found

    def spread(self, layer: int) -> bool:
        """Whether tokens come to a layer from all ranks alike."""
        unknown = self.traces.tokens is None or self.traces.tokens.source_rank is None
        return self.senders == "uniform" or (self.coupled and layer == 0 and unknown)

    def flows(
        self, layer: int, rows_LP: Sequence[IntArray], slots_G: IntArray, split: Split = Split.EVEN,
        weights_LP: Sequence[FloatArray] | None = None,
    ) -> list[Flow]:  # fmt: skip
        """Who sends what to which slots in one layer: one flow for dispatch and combine, or one for each."""
        row, weights = rows_LP[layer], None if weights_LP is None else weights_LP[layer]
        rank_P, steps = np.repeat(np.arange(len(slots_G)), slots_G).astype(np.int32), self.traces.num_steps
        tokens, spread = self.traces.tokens, self.spread(layer)
        out, back = self.routes(spread=spread)
        if tokens is None:
            slot_NK, step_N, weight_N = from_counts(self.traces.counts[:, layer], row, split, weights)
            sender_N = np.zeros(len(step_N), np.int32)
            return [Flow(slot_NK, step_N, weight_N, sender_N, rank_P, (out, back), steps)]
        step_N = tokens.step_of_token.astype(np.int32)
        slot_NK = deal(tokens.ids[:, layer], step_N, row, steps, split, weights)
        follow_N = None
        if spread:
            sender_N = np.zeros(len(step_N), np.int32)
        elif self.coupled and layer > 0:
            each = None if weights_LP is None else weights_LP[layer - 1]
            before = deal(tokens.ids[:, layer - 1], step_N, rows_LP[layer - 1], steps, split, each)
            follow_N = first_slot(before)
            sender_N = rank_P[follow_N]
        else:
            assert tokens.source_rank is not None
            sender_N = tokens.source_rank.astype(np.int32)
        first_N = first_slot(slot_NK) if self.coupled else None
        weight_N = np.ones(len(step_N), np.int32)
        if self.exchange.once_per == "assignment":
            token, place = np.nonzero(slot_NK >= 0)
            slot_NK, step_N = slot_NK[token, place][:, None], step_N[token]
            weight_N, sender_N = weight_N[token], sender_N[token]
            first_N, follow_N = (None if each is None else each[token] for each in (first_N, follow_N))
        if first_N is None:
            return [Flow(slot_NK, step_N, weight_N, sender_N, rank_P, (out, back), steps)]
        _, home = self.routes(spread=False)
        return [
            Flow(slot_NK, step_N, weight_N, sender_N, rank_P, (out,), steps, follow_N),
            Flow(slot_NK, step_N, weight_N, rank_P[first_N], rank_P, (home,), steps, first_N),
        ]

    def communication(
        self, rows_LP: Sequence[IntArray], slots_G: IntArray, split: Split = Split.EVEN,
        weights_LP: Sequence[FloatArray] | None = None,
    ) -> Communication:  # fmt: skip
        """What the rows of all layers exchange, on every step."""
        ports = self.topology.ports
        times: list[list[FloatArray]] = [[], []]
        total_R = np.zeros(len(ports.names) + 2)
        for layer in range(len(rows_LP)):
            for side, (bytes_R, time_T) in enumerate(self._sent(layer, rows_LP, slots_G, split, weights_LP)):
                times[side].append(time_T)
                total_R += bytes_R
        through_R = total_R[:-2]
        names = (*LEVELS, "pairs")
        fullest = {names[k]: float(through_R[ports.level_of == k].max()) for k in np.unique(ports.level_of).tolist()}
        slowest = int(through_R.argmax()) if len(through_R) else -1
        return Communication(
            dispatch_TL=np.stack(times[0], axis=1),
            combine_TL=np.stack(times[1], axis=1),
            bytes_R=through_R,
            cross_node_bytes=float(total_R[-2]),
            cross_rank_bytes=float(total_R[-1]),
            fullest_bytes=fullest,
            fullest_port=ports.names[slowest] if slowest >= 0 else "",
        )

    def _sent(
        self, layer: int, rows_LP: Sequence[IntArray], slots_G: IntArray, split: Split,
        weights_LP: Sequence[FloatArray] | None,
    ) -> list[tuple[FloatArray, FloatArray]]:  # fmt: skip
        """([R + 2] bytes over all steps, [T] microseconds) of dispatch and combine; what was asked last is known."""
        seen = slice(max(0, layer - 1) if self.coupled else layer, layer + 1)
        asked = [slots_G, *rows_LP[seen], *([] if weights_LP is None else weights_LP[seen])]
        key = (split, *(part.tobytes() for part in asked))
        known = self._cache.get(("sent", layer))
        if known is None or known[0] != key:
            parts = [part for flow in self.flows(layer, rows_LP, slots_G, split, weights_LP) for part in flow.parts()]
            known = key, [(bytes_TR.sum(axis=0), time_T) for bytes_TR, time_T in parts]
            self._cache[("sent", layer)] = known
        found: list[tuple[FloatArray, FloatArray]] = known[1]
        return found


def _token_bytes(profile: Profile | None) -> int | None:
    if profile is None or profile.model.hidden_size is None:
        return None
    word = WORD_BYTES.get((profile.model.dtype or "").removeprefix("torch."))
    return None if word is None else profile.model.hidden_size * word
