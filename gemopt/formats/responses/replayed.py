"""`routed_experts` in the responses of SGLang, vLLM and LMDeploy, replayed as continuous batching.

* vLLM 0.33.0: `choices[i].routed_experts`, base64 of .npy bytes [tokens, layers, top-k].
* SGLang 0.5.23: `routed_experts` in `meta_info`, `sglext` or `sgl_ext`, base64 of int32 (or `routed_experts_dtype`)
  without a shape, a row for every decoder layer.
* LMDeploy 0.18: `choices[i].routed_experts`, nested lists [tokens, layers, top-k].
* Dynamo: `nvext.routed_experts`, an object of data, shape, dtype and start.

All hold logical ids for every token of the sequence but the last one, which is never fed back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemopt.exceptions import InputError
from gemopt.formats.engine import IntArray, Loaded, TraceOptions, check_sizes
from gemopt.formats.findings import experts_of, fewer, ranges
from gemopt.formats.recorded_files import files_of
from gemopt.formats.responses.bodies import Bodies, Response, Sample
from gemopt.formats.responses.routed_ids import (
    blank_tokens,
    check_zero_tokens,
    decode,
    has_shape,
    moe_layers,
    narrowed,
    refuse_split,
)
from gemopt.traces import Phase
from gemopt.traces.batching import from_tokens
from gemopt.words import counted

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

BATCH_SIZE, PREFILL_TOKENS = 64, 4096
MANY_ROWS = 8  # of several layers, that two answers never share by chance


def read_traces(paths: Sequence[Path], options: TraceOptions, *, raw_int32: bool = False) -> Loaded:
    """Traces from responses with `routed_experts`.

    A .json holds one or a list of them, a .jsonl one per line or the events of a stream; either may be gzipped.

    `--phase decode` takes the generated tokens, `prefill` those of the prompt, `all` both; token counts in the
    responses tell them apart.
    """
    bodies = Bodies()
    files = files_of(paths, *SUFFIXES, both_phases=True)
    found = (response for path in files for response in bodies.read(path))
    return replayed(found, options, bodies.notes, raw_int32=raw_int32)


def replayed(
    responses: Iterable[Response],
    options: TraceOptions,
    skipped: Callable[[], list[str]],
    *,
    raw_int32: bool = False,
    all_layers: bool = True,
) -> Loaded:
    """Traces from responses; `skipped` says, when all are read, which have no routing.

    all_layers: whether there is a row for every decoder layer, and for none that the network lacks.
    """
    options.refuse_unused("responses", "batch_size", "prefill_tokens", "phase", "keep_tokens")
    phase = Phase.DECODE if options.phase is None else options.phase
    kept = _Kept(options=options, phase=phase, raw_int32=raw_int32)
    for response in responses:
        kept.add(response)
    if not kept.pieces:
        said = [f"no {_phase_name(phase)}token", *skipped()]
        said += [kept._cached()] if kept.cached else []
        found = "; ".join([*said, *([f"{counted(kept.padding, 'token')} of padding"] if kept.padding else [])])
        hint = "ask the engine to return routed experts" if not kept.samples else "ask for longer answers, or --phase"
        raise InputError("routed_experts", found, "responses with routed_experts", hint)
    pieces = kept.pieces
    if len({piece.shape[1:] for piece in pieces}) > 1:
        shapes = sorted({piece.shape[1:] for piece in pieces})
        raise InputError("routed_experts", shapes, "one number of layers and experts per token: one network")
    used = np.any([(piece >= 0).any(axis=(0, 1)) for piece in pieces], axis=0)
    pieces = [piece[:, :, used] for piece in pieces]  # without columns of padding
    check_sizes(options, where="routed_experts", layers=pieces[0].shape[1], top_k=pieces[0].shape[2])
    if kept.hinted:
        refuse_split(pieces)
    layers = moe_layers(pieces, options)
    ids = np.concatenate([narrowed("PATHS", piece[:, layers]) for piece in pieces])
    notes = [*skipped(), *kept.notes(layers), *fewer((ids >= 0).sum(axis=2, dtype=np.int16).reshape(-1))]
    if len(pieces) == 1 and phase is not Phase.PREFILL and len(ids) > 1:
        notes.append("a single sequence: every step is of one token, which tells nothing of batches")
    if ids.shape[2] == 1:
        notes += check_zero_tokens(ids)
    experts = experts_of(
        "routed_experts", np.flatnonzero(np.bincount(ids[ids >= 0])).tolist(), options.num_experts, notes
    )
    traces = from_tokens(
        ids,
        np.cumsum([0, *(len(piece) for piece in pieces)])[:-1],
        num_experts=experts,
        batch_size=options.batch_size or BATCH_SIZE,
        phase=Phase.DECODE if phase is Phase.MIXED else phase,
        prefill_tokens=options.prefill_tokens or PREFILL_TOKENS,
        layer_ids=tuple(layers),
        num_hidden_layers=pieces[0].shape[1] if all_layers else options.num_hidden_layers,
        model=options.model,
    )
    return Loaded(traces=traces, notes=tuple(notes))


def _phase_name(phase: Phase) -> str:
    return "" if phase is Phase.MIXED else f"{phase.name.lower()} "


@dataclass
class _Kept:
    """The ids of the tokens that are wanted, a piece [N, layers, K] for each sample, and what was left out."""

    options: TraceOptions
    phase: Phase
    raw_int32: bool
    pieces: list[NDArray[np.int16]] = field(default_factory=list)
    samples: int = 0
    padding: int = 0
    uncounted: int = 0
    again: int = 0
    shared: int = 0
    cut: int = 0
    cached: int = 0
    drafted: int = 0
    hinted: int = 0
    confirmed: int = 0
    alike: int = 0
    digests: set[bytes] = field(default_factory=set)
    routes: set[bytes] = field(default_factory=set)
    models: set[str] = field(default_factory=set)

    def add(self, response: Response) -> None:
        """Add the samples of a response, each aligned with its prompt and its answer."""
        if response.name is not None:
            text = json.dumps([response.name, [sample.encoded for sample in response.samples]])
            digest = hashlib.sha256(text.encode()).digest()
            if digest in self.digests:
                self.again += len(response.samples)
                return
            self.digests.add(digest)
        self.models |= set() if response.model is None else {response.model}
        samples = [sample for sample in response.samples if sample.encoded]
        arrays = [decode(sample, self.options, raw_int32=self.raw_int32) for sample in samples]
        rows = [self._trimmed(sample, ids) for sample, ids in zip(samples, arrays, strict=True)]
        one_prompt = _settle(response, samples, rows)
        if len(response.samples) > 1 and not one_prompt and samples[0].cached and self.phase is not Phase.DECODE:
            found, hint = (
                f"{samples[0].cached} of several prompts together",
                "send prompts one by one, or --phase decode",
            )
            raise InputError(f"{samples[0].where}: cached_tokens", found, "those of each prompt", hint)
        for number, (sample, ids) in enumerate(zip(samples, rows, strict=True)):
            self._check_length(sample, ids)
            self.samples += 1
            self.drafted += sample.drafted
            if len(ids) >= MANY_ROWS:
                route = hashlib.sha256(np.ascontiguousarray(ids).data).digest()
                self.alike += route in self.routes
                self.routes.add(route)
            again = number > 0 and one_prompt and (sample.prompt is not None or sample.generated is not None)
            self.shared += again and self.phase is not Phase.DECODE
            if again and self.phase is Phase.PREFILL:
                continue
            wanted = _of_phase(sample, ids, Phase.DECODE if again else self.phase)
            if sample.cached and self.phase is not Phase.DECODE and not again:
                wanted = self._computed(sample, wanted, len(ids))
            blank = blank_tokens(wanted) if ids.shape[2] > 1 else (wanted < 0).all(axis=(1, 2))
            self.padding += int(blank.sum())
            if len(wanted := wanted[~blank] if blank.any() else wanted):
                self.pieces.append(_checked(sample, wanted, self.options))

    def _trimmed(self, sample: Sample, ids: IntArray) -> IntArray:
        """Without the padding before or after the tokens there are."""
        if not ids.size:
            raise InputError(f"{sample.where}: routed_experts", f"shape {ids.shape}", "at least one token and layer")
        if sample.prompt is None or sample.generated is None:
            return ids
        excess = len(ids) + (sample.start or 0) - max(sample.prompt + sample.generated - 1, 0)
        if excess <= 0:
            return ids
        hinted = not has_shape(sample.encoded[-1])
        blank = blank_tokens(ids)
        for part, rest in ((blank[-excess:], ids[:-excess]), (blank[:excess], ids[excess:])):
            if len(part) == excess and part.all():
                self.padding += excess
                return rest
        if excess == 1 and not hinted:  # the count leaves out the token that ended the answer
            self.uncounted += 1
            sample.generated += 1
            return ids
        raise InputError(
            f"{sample.where}: routed_experts",
            f"{len(ids)} tokens",
            f"at most the {sample.prompt} of the prompt + {sample.generated} of the answer - 1",
            "give the right --num-hidden-layers and --top-k" if hinted else "",
        )

    def _computed(self, sample: Sample, wanted: IntArray, rows: int) -> IntArray:
        """Without the tokens that the engine had in its prefix cache: they have rows, but it did not compute them."""
        first = sample.start  # token of the first row
        if first is None and sample.prompt is not None and sample.generated is not None:
            first = max(sample.prompt + sample.generated - 1 - rows, 0)
        begin = max(sample.cached - (first or 0), 0)
        self.cached += min(begin, len(wanted))
        return wanted[begin:]

    def _check_length(self, sample: Sample, ids: IntArray) -> None:
        hinted = not has_shape(sample.encoded[-1])
        self.hinted += hinted
        if sample.prompt is None or sample.generated is None:
            return
        missing = max(sample.prompt + sample.generated - 1, 0) - (sample.start or 0) - len(ids)
        if missing > 0 and hinted:
            raise InputError(
                f"{sample.where}: routed_experts",
                f"{len(ids)} tokens",
                f"the {sample.prompt} of the prompt + {sample.generated} of the answer - 1",
                "give the right --num-hidden-layers and --top-k; add routed_experts_start_len to it if it was set",
            )
        self.confirmed += hinted
        self.cut += missing > 0 or bool(sample.start)

    def notes(self, layers: list[int]) -> list[str]:
        """What was left out or taken on trust."""
        count, top_k = self.pieces[0].shape[1:]
        dense = set(range(count)) - set(layers)
        said = [
            (self.again, f"{self.again} answers came twice: counted once"),
            (self.alike, f"{self.alike} answers choose the experts of another, token by token: one request twice?"),
            (self.shared, f"{counted(self.shared, 'further sample')} of a prompt: it is counted once"),
            (self.padding, f"left out: {counted(self.padding, 'token')} without any expert (padding)"),
            (
                self.uncounted,
                f"{self.uncounted} answers have a row more than tokens: taken as their last, uncounted one",
            ),
            (self.cached, f"left out: {self._cached()}"),
            (self.cut, f"{self.cut} answers have no rows for the start of their prompt"),
            (self.hinted, f"read as tokens x {count} layers x {top_k} experts, as you say: " + self._trust()),
            (
                dense and self.options.layer_ids is None,
                f"layers {ranges(dense)} repeat experts: taken as layers without experts",
            ),
            (
                self.drafted and self.phase is Phase.DECODE,
                f"{self.drafted} answers were decoded with draft tokens: a step has several of a sequence then, and "
                "those that were rejected; replayed as one token a step",
            ),
            (
                len(self.models) > 1,
                f"answers of {', '.join(sorted(self.models))}: counted together, as if they were one network",
            ),
            (self.phase is Phase.MIXED, "prompts are replayed as if they had been generated"),
        ]
        return [text for wanted, text in said if wanted]

    def _cached(self) -> str:
        return f"{counted(self.cached, 'token')} of prompts from the engine's prefix cache, computed before"

    def _trust(self) -> str:
        if self.confirmed == self.hinted:
            return "the number of tokens fits, but the same bytes would fit another split of layers and experts"
        return "nothing in the responses confirms it"


def _settle(response: Response, samples: list[Sample], rows: list[IntArray]) -> bool:
    """Check several samples against the tokens of the whole response; whether they share one prompt."""
    prompt = samples[0].prompt
    if len(response.samples) == 1 or any(sample.prompt != prompt for sample in samples):
        return False
    counted = [sample.generated for sample in response.samples if sample.generated is not None]
    if len(counted) == len(response.samples) and response.answered not in (None, sum(counted)):
        found = f"{samples[0].where}: completion_tokens"
        raise InputError(found, response.answered, f"{sum(counted)}, the token_ids of all choices")
    if all(sample.generated is not None for sample in samples):
        own = [len(ids) + (s.start or 0) - max((s.generated or 0) - 1, 0) for s, ids in zip(samples, rows, strict=True)]
        if prompt is not None and len(samples) == len(response.samples) and sum(own) == prompt != own[0]:
            for sample, tokens in zip(samples, own, strict=True):  # prompts of their own, sent as one request
                sample.prompt = tokens
            return False
        return True
    if prompt is None:
        return True
    answered = [len(ids) + (s.start or 0) - prompt + 1 for s, ids in zip(samples, rows, strict=True)]
    whole = len(samples) == len(response.samples)
    if min(answered) < 1 or (whole and response.answered not in (None, sum(answered))):
        raise InputError(
            f"{samples[0].where}: usage",
            f"{prompt} tokens of the prompt and {response.answered} of all answers",
            f"those of {len(samples)} samples of {', '.join(str(len(ids)) for ids in rows)} rows",
            "ask the engine for token_ids (return_token_ids)",
        )
    for sample, tokens in zip(samples, answered, strict=True):
        sample.generated = tokens
    return True


def _of_phase(sample: Sample, ids: IntArray, phase: Phase) -> IntArray:
    """The rows of one phase: the last `generated - 1` tokens were decoded, all before them were prompt."""
    if phase is Phase.MIXED:
        return ids
    if sample.generated is None and sample.prompt is not None:
        sample.generated = max(len(ids) + (sample.start or 0) - sample.prompt + 1, 0)
    if sample.generated is None:
        raise InputError(
            f"{sample.where}: usage",
            None,
            "completion_tokens, prompt_tokens or token_ids, to tell the prompt from the answer",
            "--phase all takes every token",
        )
    decoded = max(sample.generated - 1, 0)
    if decoded > len(ids):
        found = f"{sample.where}: completion_tokens"
        raise InputError(found, sample.generated, f"at most the {len(ids)} recorded tokens + 1")
    if sample.prompt is None and decoded and ids.shape[2] > 1 and blank_tokens(ids)[-1]:
        raise InputError(
            f"{sample.where}: routed_experts", "padded at the end", "prompt_tokens, to tell where it begins"
        )
    cut = len(ids) - decoded
    return ids[cut:] if phase is Phase.DECODE else ids[:cut]


def _checked(sample: Sample, ids: IntArray, options: TraceOptions) -> NDArray[np.int16]:
    """The ids in a small type; those of layers that the user leaves out may be anything."""
    if options.layer_ids is not None and max(options.layer_ids) < ids.shape[1]:
        others = np.setdiff1d(np.arange(ids.shape[1]), options.layer_ids)
        ids = ids.copy()
        ids[:, others] = 0
    return narrowed(sample.where, ids)
