"""Which expert sits in which slot of which rank: the document every solver, exporter and executor shares."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gemopt.documents import Document, foreign
from gemopt.documents.arrays import FloatMatrix, IntMatrix, IntVector
from gemopt.exceptions import InputError
from gemopt.profile import plain_uuid
from gemopt.rules import Rules
from gemopt.tables import frame
from gemopt.words import counted

EMPTY = -1


def bare(name: str) -> str:
    """Name of a network without folders, case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].casefold())


class Split(StrEnum):
    """How the assignments of an expert are shared among its copies.

    `even`: copy i of r, in slot order, takes `(n + r - 1 - i) // r`. `static`: in proportion to `split_weights`.
    `nearest`: the copy nearest to the sending rank. `optimal`: chosen anew at every step.
    """

    EVEN = "even"
    STATIC = "static"
    NEAREST = "nearest"
    OPTIMAL = "optimal"


class Placement(Document):
    """Placement of the experts of all MoE layers; `placement.json`. `load` takes that of a `result.json` as well.

    Attributes
    ----------
    physical_to_logical
        [L, P] expert held by each slot, -1 for an empty slot. Slots of rank 0 come first, then rank 1, ...
    slots_per_rank
        [G] slots of each rank; may differ; sums to P.
    num_experts
        E, logical experts of a layer.
    split, split_weights
        See `Split`; the weights are [L, P], 0 for empty slots, and sum to 1 over the copies of an expert. They are of
        `static` alone: with another split, weights that it would not heed are refused.
    layer_ids, num_hidden_layers
        Index of each MoE layer among all decoder layers, and how many of those there are.
    model
        Name of the network.
    device_uuids
        Device of each rank when the placement was made; a placement is only right for that device order.
    rules, node_of_rank
        What every placement that follows this one must keep, and the [G] node of each rank, which rules may ask for.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    physical_to_logical: IntMatrix
    slots_per_rank: IntVector
    num_experts: int = Field(ge=1, le=2**31 - 1)
    split: Split = Split.EVEN
    split_weights: FloatMatrix | None = None
    layer_ids: list[int] = Field(default_factory=list)
    num_hidden_layers: int | None = Field(default=None, ge=1)
    model: str | None = None
    device_uuids: list[str | None] | None = None
    rules: Rules | None = None
    node_of_rank: IntVector | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_layer_ids(cls, data: Any) -> Any:
        given = data.get("layer_ids") if isinstance(data, dict) else True
        if given is None or (isinstance(given, list) and not given):
            rows = data.get("physical_to_logical")
            if hasattr(rows, "__len__") and not isinstance(rows, (str, dict)) and getattr(rows, "shape", None) != ():
                data = {**data, "layer_ids": list(range(len(rows)))}
        return data

    @model_validator(mode="after")
    def _check(self) -> Placement:
        check_slots(self.slots_per_rank, self.num_experts)
        table_LP = self.physical_to_logical
        if table_LP.shape[0] == 0 or table_LP.shape[1] != int(self.slots_per_rank.sum()):
            raise InputError(
                "Placement.physical_to_logical",
                f"shape {table_LP.shape}",
                f"every layer needs {int(self.slots_per_rank.sum())} slots (the sum of slots_per_rank)",
            )
        check_layer_ids(self.layer_ids, len(table_LP), self.num_hidden_layers)
        for layer_id, row in zip(self.layer_ids, table_LP, strict=True):
            check_row(row, self.slots_per_rank, self.num_experts, layer=layer_id)
        self._check_split()
        if self.device_uuids is not None and len(self.device_uuids) != self.num_ranks:
            raise InputError("Placement.device_uuids", self.device_uuids, f"one per rank, {self.num_ranks}")
        if self.node_of_rank is not None and len(self.node_of_rank) != self.num_ranks:
            raise InputError("Placement.node_of_rank", self.node_of_rank, f"one per rank, {self.num_ranks}")
        return self

    def _check_split(self) -> None:
        weights_LP = self.split_weights
        if self.split is Split.STATIC and weights_LP is None:
            raise InputError("Placement.split_weights", None, "the static split needs weights", "give [L, P]")
        if weights_LP is None:
            return
        table_LP = self.physical_to_logical
        if weights_LP.shape != table_LP.shape or (weights_LP < 0).any():
            same = weights_LP.shape == table_LP.shape
            got = float(weights_LP.min()) if same else f"shape {weights_LP.shape}"
            raise InputError("Placement.split_weights", got, f"weights >= 0 of shape {table_LP.shape}")
        for row, weights in zip(table_LP, weights_LP, strict=True):
            held = row != EMPTY
            sums = np.bincount(row[held], weights=weights[held], minlength=self.num_experts)
            if np.abs(sums - 1).max() > 1e-6:
                worst = int(np.abs(sums - 1).argmax())
                raise InputError(
                    "Placement.split_weights", float(sums[worst]), f"the copies of expert {worst} must sum to 1"
                )
        if (weights_LP[table_LP == EMPTY] != 0).any():
            raise InputError("Placement.split_weights", "a weight of an empty slot", "0 where there is no expert")
        copies_LP = np.take_along_axis(self.copies(), table_LP, axis=1)  # of empty slots any number
        even = self.split is Split.EVEN and np.abs(weights_LP * copies_LP - 1)[table_LP != EMPTY].max() <= 1e-6
        if self.has_copies and not even and self.split is not Split.STATIC:
            limit = f"none: the {self.split.value} split does not heed them"
            raise InputError("Placement.split_weights", "given", limit, 'give "split": "static", or leave them out')

    def check_devices(self, uuids: Sequence[str | None], *, in_force: bool = False) -> None:
        """`InputError` where the [G] devices of a profile are its own in another order, or (in force there) others."""
        named = [None if uuid is None else plain_uuid(uuid) for uuid in uuids]
        for rank, uuid in enumerate(self.device_uuids or [] if uuids else []):
            plain = None if uuid is None else plain_uuid(uuid)
            if plain in (None, named[rank]) or not (plain in named or (in_force and named[rank] is not None)):
                continue
            limit = f"measured as rank {named.index(plain)}" if plain in named else f"rank {rank} is {uuids[rank]}"
            way_out = "profile the devices in the order in which they serve"
            raise InputError(f"Placement.device_uuids[{rank}]", uuid, f"by the profile, {limit}", way_out)

    @property
    def num_layers(self) -> int:
        """L, MoE layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        """P, slots of a layer over all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def num_ranks(self) -> int:
        """G, ranks of the expert-parallel group."""
        return int(self.slots_per_rank.shape[0])

    def brief(self) -> str:
        """Sizes, in one line."""
        slots = f"{counted(self.num_slots, 'slot')} on {counted(self.num_ranks, 'rank')}"
        told = [counted(self.num_layers, "layer"), f"{counted(self.num_experts, 'expert')} in {slots}"]
        told += ["with copies"] * self.has_copies + ["with empty slots"] * self.has_empty_slots
        told += ["unequal slots"] * (not self.equal_slots)
        told += [] if self.rules is None else [f"rules: {self.rules.brief()}"]
        return ", ".join(told)

    @property
    def rank_of_slot(self) -> NDArray[np.int64]:
        """[P] rank that owns each slot."""
        return np.repeat(np.arange(self.num_ranks), self.slots_per_rank)

    @property
    def has_copies(self) -> bool:
        """Whether any expert is held more than once in any layer."""
        return bool(((self.physical_to_logical != EMPTY).sum(axis=1) > self.num_experts).any())

    @property
    def has_empty_slots(self) -> bool:
        """Whether any slot is empty."""
        return bool((self.physical_to_logical == EMPTY).any())

    @property
    def equal_slots(self) -> bool:
        """Whether all ranks have the same number of slots."""
        return bool((self.slots_per_rank == self.slots_per_rank[0]).all())

    def copies(self) -> NDArray[np.int64]:
        """[L, E] copies of every expert."""
        return np.stack(
            [np.bincount(row[row != EMPTY], minlength=self.num_experts) for row in self.physical_to_logical]
        )

    def under(self, rules: Rules | None, node_of_rank: object) -> Placement:
        """The same with these rules (none are None), whether it keeps them or not; nodes where rules ask for them."""
        rules = rules if rules is not None and rules.named() else None
        asked = rules is not None and rules.about_nodes
        return self.changed(rules=rules, node_of_rank=node_of_rank if asked else None)

    @classmethod
    def of(cls, value: object, name: str = "") -> Self:
        """As for every document; what holds a placement, as a `Result` does, stands for it."""
        if isinstance(value, Placed) and not isinstance(value, type):
            if value.placement is None:
                raise _without(name or "placement", getattr(value, "status", None))
            value = value.placement
        return super().of(value, name)

    @classmethod
    def _within(cls, data: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
        """That of a result, where one was given: every file that is read as a placement may be a result's."""
        if foreign.of_object(data)[0] != foreign.RESULT:
            return data
        held = data.get("placement")
        if not isinstance(held, dict):
            raise _without(str(path), data.get("status"))
        return held

    def to_dataframe(self) -> Any:
        """A pandas data frame with a row per slot: `layer_id`, `rank`, `slot`, `expert` (-1: empty).

        Raises
        ------
        MissingPackageError
            pandas is not installed.
        """
        index: NDArray[Any] = np.indices(self.physical_to_logical.shape)
        layers, slots = index[0], index[1]
        columns: dict[str, NDArray[Any]] = {"layer_id": np.array(self.layer_ids)[layers]}
        columns |= {"rank": self.rank_of_slot[slots], "slot": slots, "expert": self.physical_to_logical}
        return frame({name: values.ravel() for name, values in columns.items()})

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_ranks: int, **fields: Any) -> Placement:
        """Experts in order, `E // G` on each rank and one more on the first `E % G` (what engines start with)."""
        slots = default_slots(num_experts, num_ranks)
        rows = np.tile(np.arange(num_experts), (num_layers, 1))
        return cls(physical_to_logical=rows, slots_per_rank=slots, num_experts=num_experts, **fields)


@runtime_checkable
class Placed(Protocol):
    """What holds a placement, or None where none was found: a `Result`."""

    @property
    def placement(self) -> Placement | None:
        """The placement."""


GivenPlacement = Placement | Placed | str | os.PathLike[str]


def _without(field: str, status: object) -> InputError:
    return InputError(field, f"a result without one, {status}", "a placement is needed")


def default_slots(num_experts: int, num_ranks: int) -> NDArray[np.int64]:
    """[G] just enough slots: `E // G` each, the first `E % G` ranks one more."""
    if num_ranks < 1 or num_experts < 1:
        raise InputError("num_ranks", num_ranks, "at least one rank and one expert are needed")
    return np.full(num_ranks, num_experts // num_ranks) + (np.arange(num_ranks) < num_experts % num_ranks)


def check_slots(slots_per_rank: NDArray[np.int64], num_experts: int) -> None:
    """Refuse slot counts that are negative, empty or too few for the experts."""
    if slots_per_rank.ndim != 1 or not len(slots_per_rank) or (slots_per_rank < 0).any():
        raise InputError("slots_per_rank", slots_per_rank, "one number >= 0 per rank, at least one rank")
    if slots_per_rank.max() > num_experts:
        raise InputError(
            "slots_per_rank",
            int(slots_per_rank.max()),
            f"at most {num_experts}, since a rank never holds two copies of one expert",
            f"use {num_experts} or fewer slots per rank",
        )
    total = int(slots_per_rank.sum())
    if total < num_experts:
        raise InputError(
            "slots_per_rank",
            total,
            f"{num_experts} experts need at least {num_experts} slots in all",
            f"use {-(-num_experts // len(slots_per_rank))} slots per rank or more ranks",
        )


def check_row(row: NDArray[np.int64], slots_per_rank: NDArray[np.int64], num_experts: int, *, layer: int) -> None:
    """Refuse a layer that misses an expert, holds an unknown one, or holds one twice on a rank."""
    where = f"physical_to_logical[layer {layer}]"
    bad = row[(row < EMPTY) | (row >= num_experts)]
    if len(bad):
        raise InputError(where, int(bad[0]), f"experts 0 to {num_experts - 1}, or -1 for an empty slot")
    counts = np.bincount(row[row != EMPTY], minlength=num_experts)
    if (counts == 0).any():
        raise InputError(where, f"no slot for expert {int(counts.argmin())}", "every expert needs a slot")
    ranks = np.repeat(np.arange(len(slots_per_rank)), slots_per_rank)
    held = row != EMPTY
    keys, seen = np.unique(ranks[held] * num_experts + row[held], return_counts=True)
    if (seen > 1).any():
        rank, expert = divmod(int(keys[seen > 1][0]), num_experts)
        raise InputError(where, f"expert {expert} twice on rank {rank}", "at most one copy of an expert per rank")


def check_layer_ids(layer_ids: Sequence[int], num_layers: int, num_hidden_layers: int | None) -> None:
    """Refuse layer ids that are not increasing, of another number than the layers, or beyond the network."""
    if len(layer_ids) != num_layers or list(layer_ids) != sorted(set(layer_ids)) or min(layer_ids, default=0) < 0:
        raise InputError("layer_ids", list(layer_ids), f"{num_layers} increasing layer indices >= 0")
    if num_hidden_layers is not None and layer_ids[-1] >= num_hidden_layers:
        raise InputError("layer_ids", layer_ids[-1], f"below num_hidden_layers = {num_hidden_layers}")
