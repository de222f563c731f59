"""Put a placement in force on a live model: check, move, prove, agree, commit, layer by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gemopt.costs import CostModel
from gemopt.exceptions import InputError, missing

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.executor.background import Background
from gemopt.executor.checks import check_network, check_ranks, check_unwrapped
from gemopt.executor.council import refuse_together
from gemopt.executor.expert_parallel import NAME, SlotDispatch, dispatches
from gemopt.executor.memory import free_bytes
from gemopt.executor.plan import LayerRow, Plan, checksum, common_split, layer_rows, plan, slot_checksum
from gemopt.executor.runner import Event, MigrationError, StageRunner
from gemopt.executor.splits import check_cost, check_split, digest
from gemopt.executor.transfer import canaries
from gemopt.migration import BATCH_BYTES
from gemopt.placement import EMPTY, GivenPlacement, Placement, Split
from gemopt.splits.rules import even_weights

if TYPE_CHECKING:
    from gemopt.executor.follow import Follow
    from gemopt.online import Controller

__all__ = ["Background", "Executor", "MigrationError"]
Probe = Mapping[str, Any] | Callable[[], Tensor]


class Executor:
    """Applies placements to a model whose experts are served by `ep_implementation="gemopt"`.

    Making one is collective: every rank of the expert-parallel group does it, and calls `apply` alike. It waits up to
    ten minutes for the others, whatever `timeout_s`: some ranks take longer to load a model.

    Parameters
    ----------
    model
        transformers model loaded with `DistributedConfig(..., ep_size=N, ep_implementation="gemopt")`.
    timeout_s
        How long a stage may take, agreement included: after that every surviving rank has raised. Half of it is for
        the transfer. A rank that does not answer in time counts as dead.
    ranks_per_node
        Ranks of a node, consecutive; all on one node when absent.
    budget_bytes
        Most memory for what a rank receives at a time. When absent, `apply` takes one layer at a time, and `start`
        layers together up to 64 MiB (`gemopt.migration.BATCH_BYTES`), or one layer where that needs more.
    on_event
        Called with (what, id of the decoder layer or None) as a migration proceeds.
    cost
        Latencies of the ranks, the same on every rank, which placements with the optimal split ask for.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        timeout_s: float = 60.0,
        ranks_per_node: int | None = None,
        budget_bytes: int | None = None,
        on_event: Event | None = None,
        cost: CostModel | None = None,
    ) -> None:
        found = dispatches(model)
        if not found:
            raise InputError(
                "model",
                type(model).__name__,
                "no experts are served by gemopt",
                f'load it with DistributedConfig(..., ep_size=N, ep_implementation="{NAME}")',
            )
        check_unwrapped(model)
        if ranks_per_node is not None and ranks_per_node < 1:
            raise InputError("ranks_per_node", ranks_per_node, "at least 1")
        self.model: Any = model
        self.layers = [dispatch for _, dispatch in found]
        self.layer_ids = [_layer_id(path) for path, _ in found]
        self.budget_bytes = budget_bytes
        self.nodes = np.arange(self.layers[0].num_ranks) // (ranks_per_node or self.layers[0].num_ranks)
        self.cost, self._template = check_cost(cost, len(self.nodes)), dict[str, Any]()
        self._background: Background | None = None
        self._closed = False
        self._runner = StageRunner(self.layers, self.layer_ids, timeout_s, on_event)
        for dispatch in self.layers:
            dispatch.nodes, dispatch.cost = self.nodes.tolist(), cost
            dispatch.take_over()
            if dispatch.canaries is None:
                dispatch.canaries = self._gather_canaries(dispatch)
        self._runner.all_met()

    def _gather_canaries(self, dispatch: SlotDispatch) -> Tensor:
        mine = canaries(dispatch.weights())
        result = mine.new_empty(dispatch.num_experts, mine.shape[1])
        dist.all_gather(list(result.chunk(dispatch.num_ranks)), mine, group=self._runner.links)
        return result

    def close(self) -> None:
        """Finish what is moving and let go of connections and buffers; collective, as making one.

        The model serves on with the placement in force, and may get another Executor.
        """
        if not self._closed:
            if self._background is not None:
                self._background.wait()
            self._closed = True
            self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rank(self) -> int:
        """Of this process in the expert-parallel group."""
        return self._runner.rank

    @property
    def rows(self) -> list[LayerRow]:
        """Placement in force, layer by layer."""
        return [dispatch.row for dispatch in self.layers]

    def checksum(self) -> str:
        """Digest of the placement in force on this rank; that of `checksum(layer_rows(placement))`."""
        return self._runner.checksum()

    @property
    def placement(self) -> Placement:
        """Placement in force. Layers with fewer slots than others, after a stop half way, show empty ones.

        Raises
        ------
        InputError
            After a stop half way to another split, when layers share copies by rules that no one split can say.
        """
        rows = self.rows
        slots = np.max([row.slots_per_rank for row in rows], axis=0)
        table, weights = (np.full((len(rows), int(slots.sum())), fill) for fill in (float(EMPTY), 0.0))
        starts = np.cumsum(slots) - slots
        for layer, row in enumerate(rows):
            where = np.concatenate([np.arange(n) + s for n, s in zip(row.slots_per_rank, starts, strict=True)])
            table[layer, where] = row.row_P
            even_P = even_weights(row.row_P, self.layers[0].num_experts)
            weights[layer, where] = even_P if row.weights_P is None else row.weights_P
        split = common_split(rows, self.layer_ids)
        return Placement(
            **{
                **self._template,
                "physical_to_logical": table,
                "slots_per_rank": slots,
                "num_experts": self.layers[0].num_experts,
                "layer_ids": self.layer_ids,
                "split": split,
                "split_weights": weights if split is Split.STATIC else None,
            }
        )

    def plan(self, placement: GivenPlacement) -> Plan:
        """What `apply` would do; nothing is sent."""
        placement = Placement.of(placement)
        self._check(placement)
        return self._plan(layer_rows(placement))

    def _plan(self, wanted: Sequence[LayerRow]) -> Plan:
        sizes = [dispatch.expert_bytes for dispatch in self.layers]
        return plan(self.rows, wanted, sizes, nodes=self.nodes, budget_bytes=self.budget_bytes)

    def _check(self, placement: Placement) -> None:
        check_network(placement, self.layer_ids, self.layers[0].num_experts, self.model.config)
        check_ranks(placement, len(self.nodes), self.rank)
        check_split(placement.split, self.cost)

    def apply(self, placement: GivenPlacement, *, probe: Probe | None = None, tolerance: float | None = None) -> Plan:
        """Move to a placement between two forward passes. Does nothing where it is already in force.

        Parameters
        ----------
        placement
            A placement or the path of one, the same on every rank.
        probe
            Inputs of the model, or a function that returns its output. Run before and after; when the outputs differ
            by more than `tolerance` on any rank, the old placement is put back.
        tolerance
            Largest difference relative to the largest output; square root of the dtype's resolution when absent.

        Returns
        -------
        Plan
            What was done.

        Raises
        ------
        InputError
            On every rank with the same message, before anything moves.
        MigrationError
            When a rank died, a transfer failed or weights arrived wrong. Calling again with the group intact goes on
            from where it stopped.
        """
        steps, fields = self._agree_to(placement)
        reference = None if probe is None else self._probe(probe)
        old = self.rows
        self._runner.run(steps.stages)
        if reference is not None and probe is not None:
            self._compare(reference, self._probe(probe), tolerance, old)
        self._template = fields
        return steps

    def start(self, placement: GivenPlacement) -> Background:
        """As `apply`, but weights travel while the model serves; layers are committed between forward passes.

        Layers travel and are committed together, as many as keep what a rank receives at once within `budget_bytes`.
        """
        steps, fields = self._agree_to(placement, self._batch_bytes)
        self._template = fields
        self._background = Background(self._runner, steps.batches(self._batch_bytes), self.model)
        return self._background

    @property
    def _batch_bytes(self) -> int:
        return BATCH_BYTES if self.budget_bytes is None else self.budget_bytes

    def follow(
        self, controller: Controller | None, *, window: int = 64, log: Callable[[str], None] | None = None
    ) -> Follow:
        """Let a controller (of rank 0) follow the traffic: its decisions are applied between forward passes.

        Parameters
        ----------
        controller
            `gemopt.online.Controller` with the placement in force; other ranks may give None.
        window
            Forward passes between two decisions.
        log
            Called with the reason of every decision.
        """
        from gemopt.executor.follow import Follow

        return Follow(self, controller, window, log)

    def _agree_to(self, given: GivenPlacement, batch_bytes: int = 0) -> tuple[Plan, dict[str, Any]]:
        """Plan, and refuse on every rank what any rank would refuse. batch_bytes: of layers that travel together."""
        found: list[tuple[Plan, dict[str, Any]]] = []

        def look() -> dict[str, str]:
            check_unwrapped(self.model)
            if self._background is not None and not self._background.done:
                raise InputError("placement", "a migration is running", "one at a time", "wait for it first")
            placement = Placement.of(given)
            steps, fields = self.plan(placement), _kept_fields(placement)
            self._check_weights(steps)
            self._check_memory(steps, batch_bytes)
            found.append((steps, fields))
            return {
                "placement": checksum(layer_rows(placement)),
                "placement in force": slot_checksum(self.rows),
                "budget_bytes": str(self.budget_bytes),
                "ranks_per_node": str(self.nodes.tolist()),
                "cost": digest(self.cost),
            }

        self.agree("placement", look)
        return found[0]

    def agree(self, field: str, look: Callable[[], dict[str, str]]) -> None:
        """Refuse on every rank what `look` refuses on any, and what it answers differently; collective."""
        if self._closed:
            raise InputError("executor", "closed", "an open one is needed", "make another: Executor(model)")
        self._runner.council.begin()
        word: dict[str, Any]
        try:
            word = look()
        except InputError as error:
            shown = error.value if isinstance(error.value, str | None) else repr(error.value)
            word = {"error": [error.field, shown, error.limit, error.hint]}
        except Exception as error:
            word = {"error": [field, f"{type(error).__name__}: {error}", "it could not be looked at", ""]}
        refuse_together([json.loads(other) for other in self._runner.exchange("check", json.dumps(word))])

    def _check_weights(self, steps: Plan) -> None:
        for layer in sorted({stage.layer for stage in steps.stages}):
            if wrong := self.layers[layer].wrong():
                raise InputError(
                    "model",
                    f"other weights of experts {wrong} in layer {self.layer_ids[layer]} than when it got an Executor",
                    "what moves must be what was loaded",
                    "load it anew, and cast or change its weights before it gets an Executor",
                )

    def _check_memory(self, steps: Plan, batch_bytes: int) -> None:
        free, needed = free_bytes(self.layers[0].device), steps.buffer_bytes(batch_bytes)
        if free is not None and needed > free:
            raise InputError(
                "memory",
                f"{free} bytes free",
                f"a buffer of {needed} bytes is needed",
                f"give budget_bytes of at least {max(steps.expert_bytes)}, the bytes of one expert",
            )

    def verify(self) -> None:
        """Check on this rank that every slot holds the weights of the expert that routing sends there.

        Raises
        ------
        MigrationError
            Naming the layer and the experts.
        """
        for layer, dispatch in zip(self.layer_ids, self.layers, strict=True):
            if wrong := dispatch.wrong():
                raise MigrationError("verify", [layer], {self.rank: f"wrong weights of {wrong}"}, self.checksum())

    @torch.no_grad()
    def _probe(self, probe: Probe) -> Tensor:
        output = probe() if callable(probe) else self.model(**probe).logits
        return output.detach().clone()

    def _compare(self, before: Tensor, after: Tensor, tolerance: float | None, old: Sequence[LayerRow]) -> None:
        limit = torch.finfo(before.dtype).eps ** 0.5 if tolerance is None else tolerance
        scale = float(before.abs().max()) if before.numel() else 0.0
        error = float((after.double() - before.double()).abs().max()) / max(scale, 1e-30) if before.numel() else 0.0
        words = self._runner.exchange("probe", repr(error))
        bad = {
            rank: f"output differs by {float(word):.2g}" for rank, word in enumerate(words) if not float(word) <= limit
        }
        if bad:
            self._runner.run(self._plan(old).stages)
            raise MigrationError("probe", [], bad, self.checksum())


def _layer_id(path: str) -> int:
    return int(re.findall(r"(?:^|\.)layers\.(\d+)\.", path)[-1])


def _kept_fields(placement: Placement) -> dict[str, Any]:
    names = ("model", "num_hidden_layers", "device_uuids", "rules", "node_of_rank")
    return {name: getattr(placement, name) for name in names}
