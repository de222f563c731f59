"""What people demand of a placement, whatever it costs: experts pinned, kept off, apart or together; `rules.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gemopt.documents import Document, Settings
from gemopt.exceptions import InputError


def _number(value: Any) -> Any:
    if isinstance(value, (bool, str)) or str(getattr(value, "dtype", "")).endswith("bool"):  # a mask is no list of ids
        raise PydanticCustomError("number", "input should be a whole number")
    return value


Number = Annotated[int, BeforeValidator(_number)]


class Rule(Settings):
    """A rule on some layers. `layers`: their ids; null: all."""

    layers: list[Number] | None = Field(default=None, min_length=1)


class Pinned(Rule):
    """The experts are on these ranks only."""

    experts: list[Number] = Field(min_length=1)
    ranks: list[Number] = Field(min_length=1)


class KeptOff(Rule):
    """The experts are on none of these ranks."""

    experts: list[Number] = Field(min_length=1)
    ranks: list[Number] = Field(min_length=1)


class Reserved(Rule):
    """The ranks hold none but these experts, as a slow tier would."""

    ranks: list[Number] = Field(min_length=1)
    experts: list[Number] = Field(min_length=1)


class Apart(Rule):
    """No rank holds two of the experts."""

    experts: list[Number] = Field(min_length=2)


class Together(Rule):
    """One rank, or one node, holds all of the experts, and no other holds any: on a rank they have no copies."""

    experts: list[Number] = Field(min_length=1)
    on: Literal["rank", "node"] = "rank"


class Groups(Rule):
    """The experts are `num_groups` groups of equally many neighbours (`n_group` of DeepSeek), each on one node."""

    num_groups: Number = Field(ge=1)


class Rules(Document):
    """What every placement must keep; rules of all kinds hold together.

    Attributes
    ----------
    pinned, kept_off, reserved, apart, together, groups
        The rules of each kind. Messages name a rule by its kind and place, as `apart[0]`.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    pinned: list[Pinned] = Field(default_factory=list)
    kept_off: list[KeptOff] = Field(default_factory=list)
    reserved: list[Reserved] = Field(default_factory=list)
    apart: list[Apart] = Field(default_factory=list)
    together: list[Together] = Field(default_factory=list)
    groups: list[Groups] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> Rules:
        for name, rule in self.named():
            for field in ("layers", "experts", "ranks"):
                numbers = getattr(rule, field, None) or []
                if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
                    raise InputError(f"Rules.{name}.{field}", numbers, "numbers from 0, each once")
        return self

    def named(self) -> list[tuple[str, Rule]]:
        """Every rule with its name."""
        kinds = ("pinned", "kept_off", "reserved", "apart", "together", "groups")
        return [(f"{kind}[{n}]", rule) for kind in kinds for n, rule in enumerate(getattr(self, kind))]

    @property
    def about_nodes(self) -> bool:
        """Whether any rule asks which ranks share a node."""
        return bool(self.groups) or any(rule.on == "node" for rule in self.together)

    def homeless(self, numbers: Sequence[int]) -> str:
        """Name of a rule that pins experts to ranks none of which is among these; empty where there is none."""
        pinned = [(name, rule) for name, rule in self.named() if isinstance(rule, Pinned)]
        return next((name for name, rule in pinned if not set(rule.ranks) & set(numbers)), "")

    def on_layers(self, layer_ids: Sequence[int]) -> Rules:
        """What they ask of these layers alone."""
        data = self.model_dump()
        for kind in {name.partition("[")[0] for name, _ in self.named()}:
            for rule in data[kind]:
                rule["layers"] = rule["layers"] and [layer for layer in rule["layers"] if layer in layer_ids]
            data[kind] = [rule for rule in data[kind] if rule["layers"] != []]
        return Rules(**data)

    def renumbered(self, numbers: Sequence[int]) -> Rules:
        """The same where ranks left, came or changed places; no rule may be `homeless`.

        Parameters
        ----------
        numbers
            Of each rank that serves, the number that the rules have for it. What they say of other ranks is left out.
        """
        data = self.model_dump()
        for kind in ("pinned", "kept_off", "reserved"):
            for rule in data[kind]:
                rule["ranks"] = [new for new, old in enumerate(numbers) if old in rule["ranks"]]
            data[kind] = [rule for rule in data[kind] if rule["ranks"]]
        return Rules(**data)

    def brief(self) -> str:
        """How many rules there are of each kind."""
        counts = {kind: len(getattr(self, kind)) for kind in type(self).model_fields if kind != "schema_version"}
        return ", ".join(f"{number} {kind}" for kind, number in counts.items() if number) or "no rules"
