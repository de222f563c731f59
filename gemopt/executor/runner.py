"""Carry out the stages of a plan: prepare on every rank, agree, commit on all ranks or on none."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from gemopt.exceptions import GemoptError, missing

try:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.distributed_c10d import _set_pg_timeout
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor.council import RESIGNED, SETUP_S, Council
from gemopt.executor.expert_parallel import SlotDispatch
from gemopt.executor.plan import Stage, checksum, slot_checksum
from gemopt.executor.splits import Routing
from gemopt.executor.transfer import Incoming, Pool, allocate, synchronize, transfer, wrong_rows
from gemopt.placement import EMPTY

COMMIT, PENDING = "commit", "pending"
Event = Callable[[str, int | None], None]


class MigrationError(GemoptError, RuntimeError):
    """A migration stopped half way. Every surviving rank has the same placement in force, weights and routing alike.

    Attributes
    ----------
    stage
        `check`, `allocate`, `transfer`, `verify`, `vote`, `finish` or `probe`.
    layer
        Id of the decoder layer; None outside layers.
    ranks
        What went wrong, by rank of the expert-parallel group.
    checksum
        Of the placement in force.
    """

    def __init__(self, stage: str, layer: int | None, ranks: Mapping[int, str], checksum: str) -> None:
        self.stage, self.layer, self.ranks, self.checksum = stage, layer, dict(ranks), checksum
        where = stage if layer is None else f"{stage}, layer {layer}"
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(self.ranks.items()))
        super().__init__(f"migration stopped at {where}: {reasons}; placement in force {checksum[:12]}")


@dataclass
class Prepared:
    """A stage that this rank could commit."""

    stage: Stage
    incoming: Incoming
    routing: Routing

    def commit(self, dispatch: SlotDispatch) -> None:
        """Put it in force; an interrupt meanwhile is raised after the commit is complete."""
        work = (self.stage.after, self.routing, self.incoming.tensors, self.incoming.slots)
        try:
            dispatch.commit(*work)
        except BaseException:
            dispatch.commit(*work)
            raise


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
            self._links = dist.new_group(self._ranks, timeout=limit, use_local_synchronization=True)
        return self._links

    def all_met(self) -> None:
        """End of the set-up, for which ranks wait longer: from here on silence of `timeout_s` counts as death."""
        self._patience_s = self.timeout_s
        _set_pg_timeout(timedelta(seconds=self.timeout_s), self.links)

    def checksum(self) -> str:
        """Digest of the placement in force on this rank."""
        return checksum([dispatch.row for dispatch in self.layers])

    def event(self, what: str, stage: Stage | None = None) -> None:
        """Tell the observer."""
        if self.on_event is not None:
            self.on_event(what, None if stage is None else self.layer_ids[stage.layer])

    def run(self, stages: Sequence[Stage]) -> None:
        """All stages, one after the other."""
        for stage in stages:
            self.settle(stage, *self.prepare(stage))
        self.finish()

    def prepare(self, stage: Stage) -> tuple[Prepared | None, str]:
        """Everything that can fail, up to the vote: (what to commit, what went wrong)."""
        dispatch, what, incoming = self.layers[stage.layer], "allocate", None
        deadline = self._begin()
        try:
            self.event(what, stage)
            incoming = allocate(stage, dispatch.row, self.rank, dispatch.weights(), self._pool)
            routing = dispatch.routing_for(stage.after)
            self.event(what := "transfer", stage)
            transfer(stage, dispatch.row, dispatch.weights(), incoming, group=self.links, deadline=deadline)
            self.event(what := "verify", stage)
            self._prove(stage, incoming)
            return Prepared(stage, incoming, routing), ""
        except Exception as error:
            if incoming is not None:
                self._abandoned.append(incoming)
                self._pool = Pool()
            return None, f"{what}: {_short(error)}"

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
        self, stage: Stage, prepared: Prepared | None, problem: str, words: Sequence[str | None] | None = None
    ) -> None:
        """Vote, decide, and commit on all ranks or on none.

        A rank proposes to commit only when every rank has said that it is prepared, so a decision to commit can be
        carried out by all; and the decision is common to all that survive it.
        """
        if words is None:
            self.event("vote", stage)
            words = self.council.exchange(problem, self._vote_by - time.monotonic())
        faults = self._faults(words, bool)
        where = next((word.partition(":")[0] for word in words if word and not word.startswith(RESIGNED)), "vote")
        self.event("decide", stage)
        decision = self.council.decide(json.dumps({"where": where, "faults": faults}) if faults else COMMIT)
        if decision == COMMIT:
            assert prepared is not None, "commit is only proposed when every rank is prepared"
            self.event("commit", stage)
            dispatch = self.layers[stage.layer]
            before = dispatch.weights()
            prepared.commit(dispatch)
            synchronize(dispatch.device)  # buffers are used again, perhaps from another stream
            if stage.rebuild:
                self._pool.take_back(before)
            self.event("committed", stage)
        elif not faults:
            told = json.loads(decision)
            where, faults = told["where"], {int(rank): why for rank, why in told["faults"].items()}
        if faults:
            self._links = None
            self._give_up(where, faults, stage)

    def _faults(self, words: Sequence[str | None], is_fault: Callable[[str], object]) -> dict[int, str]:
        """What is wrong, by rank: lost, resigned, or a word that `is_fault`."""
        return {
            rank: self.council.lost[rank] if word is None else word.removeprefix(RESIGNED)
            for rank, word in enumerate(words)
            if word is None or word.startswith(RESIGNED) or is_fault(word)
        }

    def _give_up(self, where: str, faults: Mapping[int, str], stage: Stage | None = None) -> NoReturn:
        """Raise, and let no other rank wait for this one."""
        layer = None if stage is None else self.layer_ids[stage.layer]
        error = MigrationError(where, layer, faults, self.checksum())
        self.council.resign(f"gave up at {where}")
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

    def exchange(self, stage: str, word: str) -> list[str]:
        """[G] what every rank said; raises when one is gone."""
        self.event(stage)
        words = self.council.exchange(word)
        faults = self._faults(words, lambda _: False)
        if faults:
            self._give_up(stage, faults)
        return [other for other in words if other is not None]


def _short(error: Exception) -> str:
    """First sentence of an error, without the source lines that gloo and NCCL put in front."""
    text = re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\] ?", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:200] or type(error).__name__


class Background:
    """A migration that overlaps with serving.

    Weights travel in a thread, on a process group of their own. Each forward pass of the model first looks whether
    all ranks have received the next stage, and commits it then. All ranks run forward passes alike, as expert
    parallelism needs anyway.
    """

    def __init__(self, runner: StageRunner, stages: Sequence[Stage], model: nn.Module) -> None:
        self._runner = runner
        self._stages = list(stages)
        self._thread: threading.Thread | None = None
        self._result: tuple[Prepared | None, str] = (None, "")
        self._hook = model.register_forward_pre_hook(lambda *_: self.poll(), prepend=True)
        self._start()

    @property
    def done(self) -> bool:
        """Whether everything is committed, or the migration has failed."""
        return self._thread is None

    def _start(self) -> None:
        """Begin the next stage, or end."""
        if not self._stages:
            self._end()
            self._runner.finish()
            return
        stage = self._stages[0]

        def work() -> None:
            with _side_stream(self._runner.layers[stage.layer].device):
                self._result = self._runner.prepare(stage)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._thread = None
        self._hook.remove()

    def poll(self) -> None:
        """Commit the next stage if all ranks are ready; every rank calls this between the same forward passes."""
        if self._thread is None:
            return
        alive = self._thread.is_alive()
        prepared, problem = (None, PENDING) if alive else self._result
        words = self._runner.council.exchange(problem)
        if PENDING in words and set(words) <= {PENDING, ""}:
            return
        try:
            stage = self._stages.pop(0)
            self._runner.settle(stage, prepared, problem, ["" if word == PENDING else word for word in words])
        except BaseException:
            self._end()
            raise
        self._start()

    def wait(self) -> None:
        """Finish without further forward passes; every rank calls this alike."""
        while self._thread is not None:
            self._thread.join()
            self.poll()


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, work beside the stream that serves."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield
