"""What a call proved, for anyone to check: `certificate.json`, and its multipliers in a safetensors file beside it."""

from __future__ import annotations

import hashlib
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gemopt.documents import Document, Part, read_bytes, replacing
from gemopt.exceptions import InputError
from gemopt.traces import Traces

UNIT = 1 << 24  # multipliers, planes and factors are whole numbers of 1 / UNIT
ENDING = ".duals.safetensors"
IntArray = NDArray[np.int64]
Senders = Literal["traces", "uniform"]


class Proof(StrEnum):
    """How a layer's bound can be checked.

    `dual`: multipliers of the co-location programme or of copies, and floors of the steps, checked in full. `tree`: the
    solver has searched every placement; the verifier searches again, up to a number of nodes. `columns`: multipliers of
    all contents of a rank, each priced again; where the bound is above theirs, the contents that they leave are
    searched again like a tree, where they are few enough to be listed. `claimed`: a solver's word, or a bound that only
    it can compute.
    """

    DUAL = "dual"
    TREE = "tree"
    COLUMNS = "columns"
    CLAIMED = "claimed"


class LayerProof(Part):
    """One layer: its placement [P], what it is worth, what no placement falls below, and why.

    bound_us: the solver's bound, which the tree proves; that of the multipliers where contents were not searched to the
    end, or where it is that of copies but for rounding. dual_us, columns_us, copies_us: what the multipliers of the
    co-location programme, of the contents of ranks and of copies prove, None where there are none.
    weights: [P] static ones of the slots, where the split is that.
    planes: [C, K, 1 + F] intercept and slopes of each group in 2^-24 picoseconds; group, factor: [G] of each rank that
    has slots, the factor in 2^-24. See docs/bounds.md.
    """

    layer_id: int
    proof: Proof
    row: list[int]
    weights: list[float] = Field(default_factory=list)
    objective_us: float = Field(ge=0)
    bound_us: float
    dual_us: float | None = None
    columns_us: float | None = None
    copies_us: float | None = None
    planes: list[list[list[int]]] = Field(default_factory=list)
    group: list[int] = Field(default_factory=list)
    factor: list[int] = Field(default_factory=list)


class Certificate(Document):
    """What was proved of a placement on some traces; `certificate.json`.

    Attributes
    ----------
    objective_us, bound_us, gap
        Sums over the layers, in microseconds, and `(objective - bound) / objective`: the solvers' word.
    cost
        Cost model fitted to the profile, as `--cost` names it.
    slots_per_rank
        [G] slots of each rank.
    split, senders
        How copies share, and where it is by who sends the assignments, whether `traces` say it or all ranks send alike.
    profile_sha256, traces_sha256, duals_sha256, own_sha256
        Digests of the profile, of the counts, of the file of multipliers ("" without one), and of all the rest here.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    objective_us: float = Field(ge=0)
    bound_us: float
    gap: float
    cost: str
    slots_per_rank: list[int]
    split: Literal["even", "static", "nearest", "optimal"] = "even"
    senders: Senders = "uniform"
    layers: list[LayerProof] = Field(min_length=1)
    profile_sha256: str
    traces_sha256: str
    duals_sha256: str = ""
    own_sha256: str = ""

    def own_digest(self) -> str:
        """Digest of everything but itself."""
        return self.model_copy(update={"own_sha256": ""}).digest()

    def write(self, path: str | os.PathLike[str], duals: dict[str, IntArray]) -> None:
        """Write the document, and the multipliers by layer id beside it first.

        `mu.0`, `v.0`, `y.0` of the co-location programme; `level.0`, `share.0`, `price.0` of contents of ranks;
        `pair.0`, `slot.0` of copies; and `part.0`, [T, C] what the slots whose experts have others take, under the
        optimal split.
        """
        content = save(duals) if duals else b""
        digest = hashlib.sha256(content).hexdigest() if duals else ""
        if duals:
            with replacing(duals_path(path)) as stream:
                stream.write(content)
        signed = self.model_copy(update={"duals_sha256": digest, "own_sha256": ""})
        signed.model_copy(update={"own_sha256": signed.own_digest()}).save(path)

    def duals(self, path: str | os.PathLike[str]) -> dict[str, IntArray]:
        """The multipliers beside the certificate at `path`.

        Raises
        ------
        InputError
            The file is missing, not whole, of another certificate, or holds what is no whole number.
        """
        if not self.duals_sha256:
            return {}
        where = duals_path(path)
        if not where.exists():
            hint = "copy or rename both files"
            raise InputError(str(where), "no such file", "the multipliers of the certificate lie beside it", hint)
        content = read_bytes(where)
        if hashlib.sha256(content).hexdigest() != self.duals_sha256:
            raise InputError(
                str(where),
                f"{len(content)} bytes",
                "the multipliers that the certificate names (sha256)",
                "write both again",
            )
        try:
            found = load(content)
        except (SafetensorError, json.JSONDecodeError, ValueError) as error:
            raise InputError(str(where), str(error), "a complete safetensors file is needed") from None
        for name, array in found.items():
            if array.dtype != np.int64:
                raise InputError(f"{where}: {name}", str(array.dtype), "whole numbers (int64)")
        return found


def duals_path(path: str | os.PathLike[str]) -> Path:
    """Where the multipliers of a certificate lie."""
    return Path(path).with_name(Path(path).stem + ENDING)


def counts_digest(traces: Traces, senders: Senders = "uniform") -> str:
    """Hex sha256 of what a placement is scored on: counts, their shape, layers' ids; and who sends, if `traces` say."""
    digest = hashlib.sha256(json.dumps([list(traces.counts.shape), list(traces.layer_ids)]).encode())
    digest.update(np.ascontiguousarray(traces.counts, dtype="<i4").reshape(-1).data)
    if senders == "traces" and traces.tokens is not None and traces.tokens.source_rank is not None:
        for array in (traces.tokens.step_of_token, traces.tokens.source_rank, traces.tokens.ids):
            digest.update(np.ascontiguousarray(array, dtype="<i8").reshape(-1).data)
    return digest.hexdigest()
