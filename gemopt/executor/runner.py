"""Carry out the stages of a plan: prepare on every rank, agree, commit on all ranks or on none."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from gemopt.exceptions import GemoptError, missing

try:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor import groups
from gemopt.executor.council import RESIGNED, SETUP_S, Council
from gemopt.executor.expert_parallel import SlotDispatch
from gemopt.executor.plan import Stage, checksum, slot_checksum
from gemopt.executor.splits import Routing
from gemopt.executor.transfer import Incoming, Pool, allocate, synchronize, transfer, wrong_rows
from gemopt.placement import EMPTY

COMMIT = "commit"
Event = Callable[[str, int | None], None]


class MigrationError(GemoptError, RuntimeError):
    """A migration stopped half way. Every surviving rank has the same placement in force, weights and routing alike.

    Attributes
    ----------
    stage
        `check`, `allocate`, `transfer`, `verify`, `vote`, `finish` or `probe`.
    layers
        Ids of the decoder layers that were to change together; empty outside layers.
    ranks
        What went wrong, by rank of the expert-parallel group.
    checksum
        Of the placement in force.
    """

    def __init__(self, stage: str, layers: Sequence[int], ranks: Mapping[int, str], checksum: str) -> None:
        self.stage, self.layers, self.ranks, self.checksum = stage, tuple(layers), dict(ranks), checksum
        named = ", ".join(map(str, layers))
        where = f"{stage}, layer{'s' if len(self.layers) > 1 else ''} {named}" if named else stage
        super().__init__(f"migration stopped at {where}: {_listed(ranks)}; placement in force {checksum[:12]}")

    @property
    def layer(self) -> int | None:
        """Id of the first of these layers."""
        return self.layers[0] if self.layers else None


@dataclass
class Prepared:
    """A stage that this rank could commit."""

    stage: Stage
    incoming: Incoming
    routing: Routing

    def commit(self, dispatch: SlotDispatch) -> None:
        """Put it in force; doing so again changes nothing."""
        dispatch.commit(self.stage.after, self.routing, self.incoming.tensors, self.incoming.slots)


class StageRunner:
    """Runs stages on one rank of a group, in step with the others."""

    def __init__(
        self, layers: Sequence[SlotDispatch], layer_ids: Sequence[int], timeout_s: float, on_event: Event | None
    ) -> None:
        self.layers = layers
        self.layer_ids = layer_ids
        self.rank = layers[0].rank
        self.timeout_s = timeout_s
        self.on_event = on_event
        self._ranks = dist.get_process_group_ranks(layers[0].ep_mesh.get_group())
        self._links: Any = None
        self._patience_s = max(timeout_s, SETUP_S)
        self._vote_by = 0.0
        self._pool = Pool()
        self._abandoned: list[Incoming] = []  # a late message may still be written to these
        self.council = Council(self.links, timeout_s)

    @property
    def links(self) -> Any:
        """A process group for transfers alone: with their timeout, and made anew after a failure. Collective."""
        if self._links is None:
            limit = timedelta(seconds=self._patience_s)
            self._links = groups.borrow(self._ranks, limit)
        return self._links

    def all_met(self) -> None:
        """End of the set-up, for which ranks wait longer: from here on silence of `timeout_s` counts as death."""
        self._patience_s = self.timeout_s
        _set_pg_timeout(timedelta(seconds=self.timeout_s), self.links)

    def checksum(self) -> str:
        """Digest of the placement in force on this rank."""
        return checksum([dispatch.row for dispatch in self.layers])

    def _events(self, what: str, stages: Sequence[Stage]) -> None:
        """Tell the observer, layer by layer."""
        if self.on_event is not None:
            for stage in stages:
                self.on_event(what, self.layer_ids[stage.layer])

    def run(self, stages: Sequence[Stage]) -> None:
        """All stages, one after the other."""
        for stage in stages:
            self.settle([stage], *self.prepare([stage]))
        self.finish()

    def prepare(self, stages: Sequence[Stage]) -> tuple[list[Prepared], str]:
        """Everything that can fail, up to the vote, of stages that go together: (what to commit, what went wrong)."""
        what, incoming = "allocate", list[Incoming]()
        deadline = self._begin()
        try:
            self._events(what, stages)
            layers = [(self.layers[stage.layer].row, self.layers[stage.layer].weights()) for stage in stages]
            incoming = allocate(stages, layers, self.rank, self._pool)
            routing = [self.layers[stage.layer].routing_for(stage.after) for stage in stages]
            self._events(what := "transfer", stages)
            transfer(incoming, group=self.links, deadline=deadline)
            self._events(what := "verify", stages)
            for stage, part in zip(stages, incoming, strict=True):
                self._prove(stage, part)
            return [Prepared(*each) for each in zip(stages, incoming, routing, strict=True)], ""
        except Exception as error:
            self._abandoned += incoming
            return [], f"{what}: {_short(error)}"

    def _begin(self) -> float:
        """Start the clock of a stage: half of the timeout to transfer, so that a rank that failed hears the others."""
        self._vote_by = time.monotonic() + self.timeout_s
        return self._vote_by - self.timeout_s / 2

    def _prove(self, stage: Stage, incoming: Incoming) -> None:
        dispatch = self.layers[stage.layer]
        assert dispatch.canaries is not None
        experts = {row: int(stage.after.row_P[slot]) for slot, row in incoming.row_of.items()}
        held = {row: expert for row, expert in experts.items() if expert != EMPTY}
        wrong = wrong_rows(incoming.tensors, held, dispatch.canaries)
        if wrong:
            raise RuntimeError(f"the weights that arrived for experts {wrong} are not theirs")

    def settle(
        self,
        stages: Sequence[Stage],
        prepared: Sequence[Prepared],
        problem: str,
        words: Sequence[str | None] | None = None,
    ) -> None:
        """Vote, decide, and commit all of these stages on all ranks, or none on any.

        A rank proposes to commit only when every rank has said that it is prepared, so a decision to commit can be
        carried out by all; and the decision is common to all that survive it.
        """
        if words is None:
            self._events("vote", stages)
            words = self.council.exchange(problem, self._vote_by - time.monotonic())
        faults = self._faults(words, bool)
        where = next((word.partition(":")[0] for word in words if word and not word.startswith(RESIGNED)), "vote")
        self._events("decide", stages)
        decision = self.council.decide(json.dumps({"where": where, "faults": faults}) if faults else COMMIT)
        if decision == COMMIT:
            assert len(prepared) == len(stages), "commit is only proposed when every rank is prepared"
            self._events("commit", stages)
            self._commit(prepared)
            self._events("committed", stages)
        elif not faults:
            told = json.loads(decision)
            where, faults = told["where"], {int(rank): why for rank, why in told["faults"].items()}
        if faults:
            self._links = None
            self._pool = Pool()  # a transfer may still be writing to the old one
            self._give_up(where, faults, stages)

    def _commit(self, prepared: Sequence[Prepared]) -> None:
        """Put everything in force that was decided; an interrupt meanwhile is raised when that is complete."""
        replaced = [self.layers[each.stage.layer].weights() for each in prepared if each.stage.rebuild]
        try:
            for each in prepared:
                each.commit(self.layers[each.stage.layer])
        except BaseException:
            for each in prepared:
                each.commit(self.layers[each.stage.layer])
            raise
        synchronize(self.layers[0].device)  # buffers are used again, perhaps from another stream
        for weights in replaced:
            self._pool.take_back(weights)

    def _faults(self, words: Sequence[str | None], is_fault: Callable[[str], object]) -> dict[int, str]:
        """What is wrong, by rank: lost, resigned, or a word that `is_fault`."""
        return {
            rank: self.council.lost[rank] if word is None else word.removeprefix(RESIGNED)
            for rank, word in enumerate(words)
            if word is None or word.startswith(RESIGNED) or is_fault(word)
        }

    def _give_up(self, where: str, faults: Mapping[int, str], stages: Sequence[Stage] = ()) -> NoReturn:
        """Raise, and let no other rank wait for this one, nor wonder: it may meet only this rank, not the cause."""
        error = MigrationError(where, [self.layer_ids[stage.layer] for stage in stages], faults, self.checksum())
        self.council.resign(f"gave up at {where} ({_listed(faults)})")
        raise error

    def finish(self) -> None:
        """Make sure that all ranks ended with the same placement.

        Buffers are let go of, but on CPU, where taking them anew costs the next migration a tenth of its time.
        """
        if self.layers[0].device.type != "cpu":
            self._pool = Pool()
        self._pool.keep_only(weight for dispatch in self.layers for weight in dispatch.weights().values())
        mine = slot_checksum([dispatch.row for dispatch in self.layers])
        words = self.exchange("finish", mine)
        wrong = {rank: f"has placement {word[:12]}" for rank, word in enumerate(words) if word != mine}
        if wrong:
            self._give_up("finish", wrong)

    def close(self) -> None:
        """Let go of connections and buffers; ranks that are gone are not waited for."""
        self._pool, self._abandoned = Pool(), []
        if self._links is not None:
            links, self._links = self._links, None
            groups.give_back(links, self._ranks)
        self.council.close()

    def exchange(self, stage: str, word: str) -> list[str]:
        """[G] what every rank said; raises when one is gone."""
        if self.on_event is not None:
            self.on_event(stage, None)
        words = self.council.exchange(word)
        faults = self._faults(words, lambda _: False)
        if faults:
            self._give_up(stage, faults)
        return [other for other in words if other is not None]


def _listed(faults: Mapping[int, str]) -> str:
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(faults.items()))


def _short(error: Exception) -> str:
    """First sentence of an error, without the source lines that gloo and NCCL put in front."""
    text = re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\] ?", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:200] or type(error).__name__
