"""Put a placement in force on a live model: check, move, prove, agree, commit, layer by layer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemopt.exceptions import GemoptError, InputError
from gemopt.executor.council import Council
from gemopt.executor.expert_parallel import SlotDispatch, dispatches
from gemopt.executor.memory import free_bytes
from gemopt.executor.plan import LayerRow, Plan, Stage, checksum, layer_rows, plan
from gemopt.executor.splits import Routing, check_split
from gemopt.executor.transfer import Incoming, allocate, canaries, transfer, wrong_rows
from gemopt.placement import EMPTY, Placement

COMMIT = "commit"
Probe = Mapping[str, Any] | Callable[[], Tensor]


class MigrationError(GemoptError, RuntimeError):
    """A migration stopped half way. Every surviving rank has the same placement in force and serves it correctly.

    Attributes
    ----------
    stage
        `check`, `transfer`, `verify`, `vote`, `finish` or `probe`.
    layer
        Index of the layer in the placement, None outside layers.
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


class Executor:
    """Applies placements to a model whose experts are served by `ep_implementation="gemopt"`.

    Making one is collective: every rank of the expert-parallel group does it, and calls `apply` alike.

    Parameters
    ----------
    model
        transformers model loaded with `DistributedConfig(..., ep_size=N, ep_implementation="gemopt")`.
    timeout_s
        How long a stage may take on any rank; a rank that does not answer for longer counts as dead.
    ranks_per_node
        Ranks of a node, consecutive; all on one node when absent.
    budget_bytes
        Most memory for what a rank receives at a time; one layer when absent.
    on_event
        Called with (what, layer) as a migration proceeds.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        timeout_s: float = 60.0,
        ranks_per_node: int | None = None,
        budget_bytes: int | None = None,
        on_event: Callable[[str, int | None], None] | None = None,
    ) -> None:
        found = dispatches(model)
        if not found:
            raise InputError(
                "model",
                type(model).__name__,
                "no experts are served by gemopt",
                'load it with DistributedConfig(..., ep_size=N, ep_implementation="gemopt")',
            )
        if ranks_per_node is not None and ranks_per_node < 1:
            raise InputError("ranks_per_node", ranks_per_node, "at least 1")
        self.model: Any = model
        self.layers = [dispatch for _, dispatch in found]
        self.layer_ids = [_layer_id(path) for path, _ in found]
        self.timeout_s = timeout_s
        self.budget_bytes = budget_bytes
        self._on_event = on_event
        self._group = self.layers[0].ep_mesh.get_group()
        self.rank = self.layers[0].rank
        self.nodes = np.arange(self.layers[0].num_ranks) // (ranks_per_node or self.layers[0].num_ranks)
        self._template: dict[str, Any] = {}
        self._abandoned: list[Incoming] = []
        self._links = self._new_links()
        self.council = Council(self._links, timeout_s)
        for dispatch in self.layers:
            dispatch.nodes = self.nodes.tolist()
            dispatch.take_over()
            if dispatch.canaries is None:
                dispatch.canaries = self._gather_canaries(dispatch)

    def _new_links(self) -> Any:
        """A process group of its own for transfers: its timeout, and no mixing with a forward pass."""
        from datetime import timedelta

        ranks = dist.get_process_group_ranks(self._group)
        limit = timedelta(seconds=self.timeout_s)
        return dist.new_group(ranks, timeout=limit, use_local_synchronization=True)

    def _gather_canaries(self, dispatch: SlotDispatch) -> Tensor:
        mine = canaries(dispatch.weights())
        result = mine.new_empty(dispatch.num_experts, mine.shape[1])
        dist.all_gather_into_tensor(result, mine, group=self._links)
        return result

    @property
    def rows(self) -> list[LayerRow]:
        """Placement in force, layer by layer."""
        return [dispatch.row for dispatch in self.layers]

    def checksum(self) -> str:
        """Digest of the placement in force on this rank."""
        return checksum(self.rows)

    @property
    def placement(self) -> Placement:
        """Placement in force. Layers with fewer slots than others, after a stop half way, show empty ones."""
        rows = self.rows
        slots = np.max([row.slots_per_rank for row in rows], axis=0)
        table, weights = (np.full((len(rows), int(slots.sum())), fill) for fill in (float(EMPTY), 0.0))
        starts = np.cumsum(slots) - slots
        for layer, row in enumerate(rows):
            where = np.concatenate([np.arange(n) + s for n, s in zip(row.slots_per_rank, starts, strict=True)])
            table[layer, where] = row.row_P
            weights[layer, where] = _even_weights(row.row_P) if row.weights_P is None else row.weights_P
        splits = {row.split for row in rows}
        static = any(row.weights_P is not None for row in rows)
        return Placement(
            **{
                **self._template,
                "physical_to_logical": table,
                "slots_per_rank": slots,
                "num_experts": self.layers[0].num_experts,
                "layer_ids": self.layer_ids,
                "split": "static" if static else next(iter(splits)),
                "split_weights": weights if static else None,
            }
        )

    def plan(self, placement: Placement) -> Plan:
        """What `apply` would do. Pure: nothing is sent."""
        self._check(placement)
        sizes = [sum(w[:1].nbytes for w in d.weights().values()) for d in self.layers]
        return plan(self.rows, layer_rows(placement), sizes, nodes=self.nodes, budget_bytes=self.budget_bytes)

    def _check(self, placement: Placement) -> None:
        if placement.num_layers != len(self.layers) or list(placement.layer_ids) != self.layer_ids:
            raise InputError("Placement.layer_ids", placement.layer_ids, f"the model's MoE layers are {self.layer_ids}")
        if placement.num_experts != self.layers[0].num_experts:
            raise InputError(
                "Placement.num_experts", placement.num_experts, f"the model has {self.layers[0].num_experts}"
            )
        if placement.num_ranks != len(self.nodes):
            raise InputError(
                "Placement.slots_per_rank", f"{placement.num_ranks} ranks", f"the model runs on {len(self.nodes)} ranks"
            )
        check_split(placement.split)
        config = self.model.config
        path = str(getattr(config, "_name_or_path", "") or "")
        names = {path, path.rstrip("/").rpartition("/")[2], str(config.model_type)} - {""}
        if placement.model is not None and placement.model.rstrip("/").rpartition("/")[2] not in names:
            raise InputError("Placement.model", placement.model, f"the model is {' or '.join(sorted(names))}")
        _check_devices(placement, self.rank)

    def apply(self, placement: Placement, *, probe: Probe | None = None, tolerance: float | None = None) -> Plan:
        """Move to a placement between two forward passes. Does nothing where it is already in force.

        Parameters
        ----------
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
        steps = self._agree_to(placement)
        reference = None if probe is None else self._probe(probe)
        old = self.rows
        self._run(steps)
        self._template = _kept_fields(placement)
        if reference is not None and probe is not None:
            self._compare(reference, self._probe(probe), tolerance, old)
        return steps

    def _agree_to(self, placement: Placement) -> Plan:
        """Plan, and refuse on every rank what any rank would refuse."""
        self._event("check", None)
        steps, word = None, ""
        try:
            steps = self.plan(placement)
            free = free_bytes(next(iter(self.layers[0].weights().values())).device)
            if free is not None and steps.buffer_bytes > free:
                hint = "give budget_bytes, at least the bytes of one expert"
                raise InputError("memory", f"{free} bytes free", f"the buffer takes {steps.buffer_bytes}", hint)
            word = json.dumps({"wanted": checksum(layer_rows(placement)), "current": self.checksum()})
        except InputError as error:
            word = json.dumps({"error": [error.field, str(error.value), error.limit, error.hint]})
        except Exception as error:
            word = json.dumps(
                {"error": ["placement", f"{type(error).__name__}: {error}", "a plan could not be made", ""]}
            )
        words = self._exchange("check", None, word)
        said = [json.loads(other) for other in words]
        errors = {rank: answer["error"] for rank, answer in enumerate(said) if "error" in answer}
        if errors:
            rank, (field, value, limit, hint) = next(iter(errors.items()))
            raise InputError(field, value, limit + ("" if len(errors) == len(said) else f" (rank {rank})"), hint)
        for key, field in (("wanted", "placement"), ("current", "placement in force")):
            kinds = {answer[key]: [r for r, other in enumerate(said) if other[key] == answer[key]] for answer in said}
            if len(kinds) > 1:
                groups = " and ".join(f"ranks {ranks}" for ranks in kinds.values())
                raise InputError(field, f"differs between {groups}", "the same one on every rank")
        assert steps is not None
        return steps

    def _run(self, steps: Plan) -> None:
        if self._links is None and steps.stages:  # a failed transfer leaves a group in an unknown state
            self._links = self._new_links()
        for stage in steps.stages:
            prepared, problem = self._prepare(stage)
            self._settle(stage, prepared, problem)
        words = self._exchange("finish", None, self.checksum())
        if len(set(words)) > 1:
            wrong = {r: f"placement {w[:12]}" for r, w in enumerate(words) if w != self.checksum()}
            raise MigrationError("finish", None, wrong, self.checksum())

    def _prepare(self, stage: Stage) -> tuple[Prepared | None, str]:
        """Everything that can fail, up to the vote: (what to commit, what went wrong)."""
        dispatch, what, incoming = self.layers[stage.layer], "allocate", None
        deadline = time.monotonic() + self.timeout_s
        try:
            self._event("allocate", stage.layer)
            incoming = allocate(stage, dispatch.row, self.rank, dispatch.weights())
            routing = dispatch.routing_for(stage.after)
            what = "transfer"
            self._event("transfer", stage.layer)
            transfer(stage, dispatch.row, dispatch.weights(), incoming, group=self._links, deadline=deadline)
            what = "verify"
            self._event("verify", stage.layer)
            self._prove(stage, incoming)
            return Prepared(stage, incoming, routing), ""
        except Exception as error:
            if incoming is not None:
                self._abandoned.append(incoming)
            return None, f"{what}: {' '.join(str(error).split())[:200] or type(error).__name__}"

    def _prove(self, stage: Stage, incoming: Incoming) -> None:
        dispatch = self.layers[stage.layer]
        assert dispatch.canaries is not None
        filled = {s: r for s, r in incoming.row_of.items() if stage.after.row_P[s] != EMPTY}
        rows = list(filled.values())
        tensors = {name: tensor[rows] for name, tensor in incoming.tensors.items()}
        wrong = wrong_rows(tensors, [int(stage.after.row_P[slot]) for slot in filled], dispatch.canaries)
        if wrong:
            raise RuntimeError(f"the weights that arrived for experts {wrong} are not theirs")

    def _settle(
        self, stage: Stage, prepared: Prepared | None, problem: str, words: list[str | None] | None = None
    ) -> None:
        """Vote, decide and commit on all ranks or on none."""
        if words is None:
            self._event("vote", stage.layer)
            words = self.council.exchange(problem)
        faults = {rank: word or self.council.lost[rank] for rank, word in enumerate(words) if word != ""}
        where = next((w.partition(":")[0] for w in words if w), "vote")
        self._event("decide", stage.layer)
        reason = json.dumps({"where": where, "faults": faults})
        decision = self.council.decide(reason if faults else COMMIT)
        if decision == COMMIT:
            assert prepared is not None, "commit is only proposed when every rank is prepared"
            self._event("commit", stage.layer)
            prepared.commit(self.layers[stage.layer])
            self._event("committed", stage.layer)
        elif not faults:
            told = json.loads(decision)
            where, faults = told["where"], {int(rank): why for rank, why in told["faults"].items()}
        if faults:
            self._links = None
            raise MigrationError(where, stage.layer, faults, self.checksum())

    def _exchange(self, stage: str, layer: int | None, word: str) -> list[str]:
        words = self.council.exchange(word)
        faults = {rank: self.council.lost[rank] for rank, other in enumerate(words) if other is None}
        if faults:
            raise MigrationError(stage, layer, faults, self.checksum())
        return [other for other in words if other is not None]

    def _event(self, what: str, layer: int | None) -> None:
        if self._on_event is not None:
            self._on_event(what, layer)

    def verify(self) -> None:
        """Check on this rank that every slot holds the weights of the expert that routing sends there.

        Raises
        ------
        MigrationError
            Naming the layer and the experts.
        """
        for layer, dispatch in enumerate(self.layers):
            assert dispatch.canaries is not None
            start = int(dispatch.row.slots_per_rank[: self.rank].sum())
            mine = dispatch.row.row_P[start : start + int(dispatch.row.slots_per_rank[self.rank])]
            rows = np.flatnonzero(mine != EMPTY).tolist()
            tensors = {name: weight[rows] for name, weight in dispatch.weights().items()}
            wrong = wrong_rows(tensors, mine[rows].tolist(), dispatch.canaries)
            if wrong:
                raise MigrationError("verify", layer, {self.rank: f"wrong weights of {wrong}"}, self.checksum())

    @torch.no_grad()
    def _probe(self, probe: Probe) -> Tensor:
        output = probe() if callable(probe) else self.model(**probe).logits
        return output.detach().clone()

    def _compare(self, before: Tensor, after: Tensor, tolerance: float | None, old: Sequence[LayerRow]) -> None:
        limit = torch.finfo(before.dtype).eps ** 0.5 if tolerance is None else tolerance
        scale = float(before.abs().max()) if before.numel() else 0.0
        error = float((after.double() - before.double()).abs().max()) / max(scale, 1e-30) if before.numel() else 0.0
        words = self._exchange("probe", None, repr(error))
        bad = {
            rank: f"output differs by {float(word):.2g}" for rank, word in enumerate(words) if not float(word) <= limit
        }
        if bad:
            sizes = [sum(w[:1].nbytes for w in d.weights().values()) for d in self.layers]
            self._run(plan(self.rows, old, sizes, nodes=self.nodes, budget_bytes=self.budget_bytes))
            raise MigrationError("probe", None, bad, self.checksum())


def _layer_id(path: str) -> int:
    return int(re.findall(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", path)[-1])


def _even_weights(row_P: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    full = row_P != EMPTY
    copies = np.bincount(row_P[full])
    return np.where(full, 1.0 / np.maximum(copies[row_P], 1), 0.0)


def _kept_fields(placement: Placement) -> dict[str, Any]:
    return {name: getattr(placement, name) for name in ("model", "num_hidden_layers", "device_uuids")}


def _check_devices(placement: Placement, rank: int) -> None:
    """A placement made for one order of devices is wrong for another."""
    if placement.device_uuids is None or not torch.cuda.is_available():
        return
    wanted = placement.device_uuids[rank]
    here = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    if wanted is not None and wanted.removeprefix("GPU-") != here.removeprefix("GPU-"):
        raise InputError("Placement.device_uuids", here, f"rank {rank} should be {wanted}", "start ranks in that order")
