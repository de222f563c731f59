"""What a call asks of the placement in force: ranks, slots, price and limits of moves, and the report at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemopt.costs import CostModel, fit
from gemopt.evaluate import check_agreement, evaluate
from gemopt.exceptions import ABOVE_0, InputError, check_number
from gemopt.links import Links
from gemopt.migration import keep_in_place
from gemopt.moves import Budget, Moves
from gemopt.placement import GivenPlacement, Placement, Split
from gemopt.problem import Problem
from gemopt.profile import Profile
from gemopt.resize import Resized, Source, resize
from gemopt.result import MovesReport
from gemopt.solvers import hurried
from gemopt.solvers.base import Row
from gemopt.solvers.nearest import fewest, home_row
from gemopt.solvers.relabel import relabelled
from gemopt.splits.senders import Senders
from gemopt.splits.weights import carried_weights, suggest_weights
from gemopt.traces import Traces

US_PER_GB_PER_S = 1e-3  # microseconds that a byte takes at 1 GB/s
SETTLING_S = 0.5  # at least, for ranks that change roles
EASING_SHARE = 0.4  # of the time, in which the fewest moves are proven to be that


@dataclass(frozen=True)
class Asked:
    """What `gemopt.solve` was asked about moves; see there."""

    current: GivenPlacement | None = None
    move_price: float | None = None
    expert_bytes: int | None = None
    bandwidth: float | None = None
    horizon_steps: float | None = None
    max_moves: int | None = None
    max_moves_per_layer: int | None = None
    max_bytes_per_rank: float | None = None
    exclude_ranks: Sequence[int] | None = ()
    add_ranks: Sequence[Source] | None = ()

    def check(self) -> None:
        """Refuse numbers that make no sense, and what needs something else that was not given.

        Raises
        ------
        InputError
            As said.
        """
        for name in ("move_price", "max_moves", "max_moves_per_layer", "max_bytes_per_rank"):
            if (value := getattr(self, name)) is not None:
                whole = name.startswith("max_moves")
                check_number(name, value, f"a {'whole ' * whole}number of at least 0", whole=whole)
        for name in ("expert_bytes", "horizon_steps"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, "a number above 0", least=ABOVE_0)
        if self.bandwidth is not None:
            check_number("bandwidth", self.bandwidth, "GB/s above 0, at most 1e6", least=ABOVE_0, most=1e6)
        if self.current is None:
            self._needs_a_placement()
        if self.move_price is not None and self.bandwidth is not None:
            raise InputError(
                "bandwidth", self.bandwidth, "move_price says already what a move takes", "give one of them"
            )
        if self.horizon_steps is not None and self.move_price is None and self.bandwidth is None:
            raise InputError(
                "horizon_steps", self.horizon_steps, "a price to spread over them", "give --move-price or --bandwidth"
            )

    def _needs_a_placement(self) -> None:
        for name in self.__dataclass_fields__:
            if self.given(name):
                limit = "moves are counted from the placement in force"
                raise InputError(name, getattr(self, name), limit, "give --current")

    def given(self, name: str) -> bool:
        """Whether the caller asked for something by this name."""
        value = getattr(self, name)
        return value not in (None, ()) and len(np.atleast_1d(np.asarray(value, dtype=object))) > 0


@dataclass(frozen=True, eq=False)
class Moving:
    """One call's placement in force, ready for solving and reporting.

    Attributes
    ----------
    current, measured
        The placement in force, and the profile of all ranks before any left or came.
    resized
        Ranks, slots and what is at home on them now.
    move_us
        Microseconds that one move takes, once; None when unknown.
    price_us
        Microseconds of the objective per move: `move_us` times the given steps over the horizon; None: no price.
    budget
        Moves that all layers share; None: any number.
    per_layer
        [L] moves that each layer may make, or None; asked_by_ranks: they are those that lost and new ranks ask for.
    into_G
        [G] moves into each rank that all layers share, or None.
    """

    current: Placement
    measured: Profile
    resized: Resized
    expert_bytes: int | None
    move_us: float | None
    price_us: float | None
    budget: int | None
    per_layer: NDArray[np.int64] | None
    into_G: NDArray[np.int64] | None
    asked_by_ranks: bool = False

    @classmethod
    def of(cls, asked: Asked, profile: Profile, traces: Traces) -> Moving | None:
        """Read what was asked; None without a placement in force.

        Raises
        ------
        InputError
            Something asked for cannot be, or does not fit the profile and the traces.
        """
        asked.check()
        if asked.current is None:
            return None
        current = Placement.of(asked.current, "current")
        check_agreement(current, traces, current.num_ranks)
        exclude = () if asked.exclude_ranks is None else asked.exclude_ranks
        add = () if asked.add_ranks is None else asked.add_ranks
        resized = resize(current, profile, exclude=exclude, add=add)
        expert_bytes = asked.expert_bytes or profile.model.expert_bytes
        move_us = asked.move_price
        if asked.bandwidth is not None:
            move_us = _known(expert_bytes, "bandwidth", asked.bandwidth) * US_PER_GB_PER_S / asked.bandwidth
        price_us = None
        if move_us is not None:
            price_us = move_us * traces.num_steps / (asked.horizon_steps or traces.num_steps)
        ranks, most = len(resized.old_rank), current.num_experts  # that a rank can receive in a layer
        into_G = None
        if asked.max_bytes_per_rank is not None:
            size = _known(expert_bytes, "max_bytes_per_rank", asked.max_bytes_per_rank)
            into_G = np.full(ranks, int(min(asked.max_bytes_per_rank // size, most * current.num_layers)))
        per_layer, by_ranks = None, False
        if asked.max_moves_per_layer is not None:
            per_layer = np.full(current.num_layers, int(min(asked.max_moves_per_layer, most * ranks)))
        elif resized.changed and price_us is None and asked.max_moves is None and into_G is None:
            per_layer, by_ranks = _asked_by_ranks(resized), True
        budget = None if asked.max_moves is None else int(min(asked.max_moves, most * ranks * current.num_layers))
        if budget is not None and into_G is not None and budget <= into_G.min():
            into_G = None  # says nothing beside it
        return cls(current, profile, resized, expert_bytes, move_us, price_us, budget, per_layer, into_G, by_ranks)

    @property
    def heeded(self) -> bool:
        """Whether moves cost or are limited, so that solvers must heed them."""
        return bool(self.price_us) or any(each is not None for each in (self.budget, self.per_layer, self.into_G))

    @property
    def shared(self) -> bool:
        """Whether several layers share a budget."""
        return self.current.num_layers > 1 and (self.budget is not None or self.into_G is not None)

    @property
    def together(self) -> Budget | None:
        """What several layers share, if they do."""
        return Budget(self.budget, self.into_G) if self.shared else None

    def at_home(self, layers: Sequence[Problem]) -> list[Row] | None:
        """The rows of the placement in force; None where some cannot stay as they are."""
        rows = [home_row(layer, Moves(home_GE)) for layer, home_GE in zip(layers, self.resized.home_LGE, strict=True)]
        found = [row for row in rows if row is not None]
        return found if len(found) == len(rows) else None

    @cached_property
    def layer_limits(self) -> list[Moves]:
        """For each layer the price, and the limits that hold for it whatever the other layers do."""
        result = []
        for layer, home_GE in enumerate(self.resized.home_LGE):
            limits = [] if self.per_layer is None else [int(self.per_layer[layer])]
            if self.budget is not None:
                limits.append(self.budget)
            result.append(Moves.make(home_GE, self.price_us or 0.0, min(limits, default=None), self.into_G))
        return result

    def apply(self, layers: Sequence[Problem]) -> list[Problem]:
        """The layers with price and limits; as they are when moves cost nothing and have no limit.

        Raises
        ------
        InputError
            The traces say which rank sends, by numbers that ranks no longer have.
        """
        numbers = self.resized.numbers
        if layers[0].senders_TGE is not None and numbers != list(range(len(numbers))):
            limit = f"ranks {numbers}, counted as in current, are numbered from 0 now: senders would be others"
            raise InputError("Traces.source_rank", "recorded", limit, "take all to send alike: --senders uniform")
        if not self.heeded:
            return list(layers)
        return [layer.with_moves(moves) for layer, moves in zip(layers, self.layer_limits, strict=True)]

    def suggest_weights(self, layers: Sequence[Problem]) -> None:
        """Static weights of the placement in force are known where its slots still are what they were."""
        current, slots_G = self.current, layers[0].slots_per_rank
        static = current.split is Split.STATIC and layers[0].split is Split.STATIC
        if not static or current.split_weights is None or not np.array_equal(current.slots_per_rank, slots_G):
            return
        for layer, row, weights_P in zip(layers, current.physical_to_logical, current.split_weights, strict=True):
            suggest_weights(layer, row, weights_P)
            home = None if layer.moves is None else layer.moves.fewest(slots_G)  # the same in another order of slots
            carried_P = None if home is None else carried_weights(layer, row, weights_P, home)
            if home is not None and carried_P is not None:
                suggest_weights(layer, home, carried_P)

    def eased(self, layers: Sequence[Problem], deadline: float) -> tuple[list[Problem], bool]:
        """The layers with the moves that ranks, rules, slots and full ones ask for, unless the caller set a limit; and
        whether it is proven of all that these are the fewest. deadline: of `time.monotonic`; part of the time until
        then is for that, so that some is left to search in.
        """
        if not self.asked_by_ranks:
            return list(layers), True
        found, all_proven, begin = list[Problem](), True, time.monotonic()
        end = begin + EASING_SHARE * max(0.0, deadline - begin)
        for number, layer in enumerate(layers):
            now = time.monotonic()
            with hurried.better_by(now + (end - now) / (len(layers) - number)):
                eased, proven = _eased(layer, self.resized.old_rank < 0)
            found.append(eased)
            all_proven &= proven
        return found, all_proven

    def missing_slots(self, slots_per_rank: object) -> int:
        """Slots that the experts lack, where ranks left and the slots are as asked for."""
        slots, ranks = np.array(slots_per_rank), len(self.resized.old_rank)
        if not self.resized.changed or slots.dtype.kind not in "iu" or (slots < 0).any():
            return 0
        return self.current.num_experts - int(slots.sum() if slots.ndim else slots * ranks)

    def settled(
        self, rows: Sequence[Row], layers: Sequence[Problem], deadline: float, *, linked: bool = False
    ) -> list[Row]:
        """The rows with fewest moves at no larger objective: equal ranks change roles, what stays keeps its slot.

        Roles stay where each rank has a limit of its own, which other roles might break, and where links tell ranks
        apart (`linked`). deadline: of `time.monotonic`.
        """
        old_G, slots_G = self.resized.old_rank, self.current.slots_per_rank
        before_G = np.where(old_G < 0, 0, slots_G[old_G])
        result, end = list[Row](), max(deadline, time.monotonic() + SETTLING_S)
        for row_P, home_GE, wanted, problem in zip(
            self.current.physical_to_logical, self.resized.home_LGE, rows, layers, strict=True
        ):
            now = time.monotonic()
            until = now + (end - now) / (len(rows) - len(result))
            named = wanted if linked or self.into_G is not None else relabelled(problem, wanted, home_GE, until)
            parts = np.split(row_P, np.cumsum(slots_G)[:-1])
            before_P = np.concatenate([parts[rank] for rank in old_G if rank >= 0] or [row_P[:0]])
            result.append(named[keep_in_place(before_P, named, before_G, problem.slots_per_rank)])
        return result

    def report(
        self, rows: Sequence[Row], layers: Sequence[Problem], objective_us: float, before_us: float
    ) -> MovesReport:
        """What the rows change."""
        into_LG = np.stack(
            [
                Moves(home_GE).into(row, problem.slots_per_rank)
                for home_GE, row, problem in zip(self.resized.home_LGE, rows, layers, strict=True)
            ]
        )
        moves = int(into_LG.sum())
        gain_us = before_us - objective_us
        paid = None
        if self.move_us is not None and gain_us > 0:
            paid = moves * self.move_us * layers[0].num_steps / gain_us
        return MovesReport(
            moves=moves,
            bytes=None if self.expert_bytes is None else moves * self.expert_bytes,
            per_layer=into_LG.sum(axis=1).tolist(),
            into_rank=into_LG.sum(axis=0).tolist(),
            makespan_before_us=before_us,
            gain_us=gain_us,
            move_us=self.move_us,
            price_us=self.price_us or 0.0,
            cost_us=moves * (self.price_us or 0.0),
            paid_after_steps=paid,
            from_checkpoint=self.resized.lost(self.current.layer_ids),
            old_rank=self.resized.old_rank.tolist(),
        )

    def before_us(self, traces: Traces, cost: CostModel, senders: Senders, links: Links | None) -> float:
        """Objective of the placement in force on the ranks that it was made for, under the same kind of cost model."""
        profile = self.measured
        if self.resized.changed:
            profile = profile.model_copy(update={"devices": profile.devices[: self.current.num_ranks]})
            cost = fit(profile, model=cost.name)[0]
        wired: dict[str, Any] = {} if links is None else {"topology": links.topology, "exchange": links.exchange}
        return evaluate(self.current, profile, traces, cost=cost, senders=senders, **wired).objective_us


def limited(problem: Problem, most: int | None = None, most_into_G: NDArray[np.int64] | None = None) -> Problem:
    """The same layer with limits that are at least as tight."""
    moves = problem.moves
    assert moves is not None
    if most is None or (moves.most is not None and moves.most < most):
        most = moves.most
    into_G = moves.most_into_G
    if most_into_G is not None:
        into_G = most_into_G if into_G is None else np.minimum(into_G, most_into_G)
    return problem.with_moves(replace(moves, most=most, most_into_G=into_G))


def _asked_by_ranks(resized: Resized) -> NDArray[np.int64]:
    """[L] moves that lost ranks and new ranks ask for: experts without a copy, and the slots of new ranks."""
    lost_L = (~resized.home_LGE.any(axis=1)).sum(axis=1)
    fresh = int(resized.slots_per_rank[resized.old_rank < 0].sum())
    return np.asarray(lost_L + fresh, dtype=np.int64)


def _eased(problem: Problem, new_G: NDArray[np.bool_]) -> tuple[Problem, bool]:
    """new_G: [G] ranks that came, with the slots that they have in the end."""
    moves = problem.moves
    assert moves is not None
    row, proven = fewest(problem.with_moves(moves.at_most(None)))
    needed = 0 if row is None else moves.count(row, problem.slots_per_rank)
    asked = int((~moves.home_GE.any(axis=0)).sum() + problem.slots_per_rank[new_G].sum())
    return problem.with_moves(moves.at_most(max(asked, needed), row)), proven or needed <= asked


def _known(expert_bytes: int | None, field: str, value: float) -> int:
    if expert_bytes is None:
        raise InputError(
            field, value, "needs the size of an expert, which the profile does not say", "give --expert-bytes"
        )
    return expert_bytes
