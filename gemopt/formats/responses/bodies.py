"""Responses as clients keep them: bodies, batch lines, streams and errors, one by one or many in a file.

What may hold a body: a list, a line of JSON Lines, a line `data: ...` of an event stream, OpenAI's batch output
(`response.body`). vLLM's RequestOutput has `outputs` for choices; a row may be one of these. Chunks of a stream become
one response again; responses that routed nothing are counted by reason.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError
from gemopt.formats.files import bounded_json, size_of, text_of
from gemopt.formats.json_rows import parsed
from gemopt.formats.names import words_of
from gemopt.traces.arrays import NOT_IDS

LINE_LIMIT = 256 << 20
_HOLDERS = ("sglext", "sgl_ext", "nvext", "engine_data", "message")
PROMPTS = ("prompt_token_ids", "prompt_ids")
PROMPT_SIZES = ("prompt_tokens", "num_prompt_tokens")  # prompt_length may be that of a text
_WRAPPERS = ("response", "body", "result", "data")
_PROMPT = "prompt_routed_experts"
COUNTS = 'counts in JSON: --from array; {"logical_count": [...]} with a row for every decoder layer: sglang'
_STARTS = ("routed_experts_start_len", "routed_experts_prompt_start")


@dataclass(kw_only=True)
class Sample:
    """One sampled answer of a response.

    Attributes
    ----------
    encoded, dtype, start
        `routed_experts` as they came (several when they were streamed), type of the numbers in raw bytes, and the
        first token that has a row; None when not said.
    before
        Those of the prompt, where they come apart from those of the answer.
    prompt, generated
        Tokens of the prompt, and of the answer (the last of which is never fed back); None when not said.
    cached
        Tokens at the start of the prompt that the engine had in its prefix cache, and did not compute again.
    drafted
        Whether drafts of the answer's tokens were verified, several in a step.
    ended
        Why it has no routing, when it has none.
    """

    where: str
    encoded: list[Any]
    dtype: str | None = None
    start: int | None = None
    before: Any = None
    prompt: int | None = None
    generated: int | None = None
    cached: int = 0
    drafted: bool = False
    ended: str = ""


@dataclass(kw_only=True)
class Response:
    """The samples of a response; `answered`: tokens of all their answers together, None when not said; `model`: what
    the server calls its network."""

    name: str | None
    samples: list[Sample]
    answered: int | None = None
    model: str | None = None


@dataclass
class Bodies:
    """The bodies of some files; `skipped` counts the answers without routing by reason."""

    seen: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def read(self, path: Path) -> Iterator[Response]:
        """The responses of a file that have routing."""
        streams: dict[str, _Stream] = {}
        for number, body, streamed in _bodies(path):
            where = f"{path}: response {number}"
            for part in _unwrapped(where, body):
                name = _name(part)
                if name is not None and not _failed(part) and (name in streams or _is_chunk(part, streamed)):
                    streams.setdefault(name, _Stream(where)).add(part)
                    if part.get("finished") is True:  # vLLM's last RequestOutput: the next is of another request
                        yield from self._kept(where, streams.pop(name).body)
                else:
                    yield from self._kept(where, part)
        for stream in streams.values():
            yield from self._kept(stream.where, stream.body)

    def _kept(self, where: str, body: dict[str, Any]) -> Iterator[Response]:
        if _failed(body):
            self.seen += 1
            self.skipped["error"] += 1
            return
        response = _response(where, body)
        self.seen += len(response.samples)
        self.skipped.update(sample.ended for sample in response.samples if not sample.encoded)
        if any(sample.encoded for sample in response.samples):
            yield response

    def notes(self) -> list[str]:
        """How many were skipped, and why."""
        if not self.skipped:
            return []
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return [f"skipped {self.skipped.total()} of {self.seen} answers: {reasons}"]


def _bodies(path: Path) -> Iterator[tuple[int, Any, bool]]:
    """Number, JSON value, and whether it came as a line of an event stream."""
    if path.name.endswith((".json", ".json.gz")):
        data = bounded_json(path) if path.suffix == ".json" else parsed(str(path), text_of(path).read())
        yield from ((i, body, False) for i, body in enumerate(data if isinstance(data, list) else [data]))
        return
    size_of(path)
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LINE_LIMIT), b"")):
                if len(line) >= LINE_LIMIT:
                    limit = f"lines below {LINE_LIMIT} bytes"
                    raise InputError(f"{path}: line {number + 1}", f"{len(line)} bytes", limit)
                text, streamed = line.strip(), False
                if text.startswith((b":", b"event:", b"id:", b"retry:")):
                    text = b""
                elif text.startswith(b"data:"):
                    text, streamed = text[5:].strip(), True
                if text and text != b"[DONE]":
                    yield number, json.loads(text), streamed
    except InputError:
        raise
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: line {number + 1}", str(error), "one JSON response per line") from None


def _unwrapped(where: str, body: Any) -> Iterator[dict[str, Any]]:
    if isinstance(body, list):
        for part in body:
            yield from _unwrapped(where, part)
        return
    if not isinstance(body, dict):
        raise InputError(where, type(body).__name__, "a JSON object, the body of a response", COUNTS)
    inside = [body[key] for key in _WRAPPERS if isinstance(body.get(key), dict | list)]
    if "choices" not in body and "meta_info" not in body and len(inside) == 1 and not body.get("error"):
        yield from _unwrapped(where, inside[0])
    elif "choices" not in body and isinstance(body.get("outputs"), list):  # vLLM's RequestOutput
        yield {**body, "choices": body["outputs"]}
    elif not {"choices", "meta_info", "error"} & body.keys() and _routed(body)[0] is not None:  # a choice alone
        yield {**body, "choices": [body]}
    else:
        yield body


def _name(body: dict[str, Any]) -> str | None:
    meta = body.get("meta_info")
    name = meta.get("id") if isinstance(meta, dict) else body.get("id", body.get("request_id"))
    return str(name) if isinstance(name, str | int) else None


def _failed(body: dict[str, Any]) -> bool:
    """Whether a body is an error instead of a response."""
    if isinstance(body.get("meta_info"), dict) or body.get("choices"):
        return False
    status = body.get("status_code", body.get("code"))
    wrong = bool(body.get("error")) or body.get("object") == "error" or "detail" in body
    return wrong or (type(status) is int and status >= 400)


def _is_chunk(body: dict[str, Any], streamed: bool) -> bool:
    meta, choices = body.get("meta_info"), body.get("choices")
    if streamed or str(body.get("object", "")).endswith(".chunk") or body.get("finished") is False:
        return True
    if isinstance(meta, dict):  # in SGLang's own stream only the last chunk says why it ended
        return "finish_reason" in meta and meta["finish_reason"] is None
    return isinstance(choices, list) and any(isinstance(choice, dict) and "delta" in choice for choice in choices)


class _Stream:
    """Chunks with one id, as the response they add up to: later values stand, lists of tokens go on.

    A RequestOutput may hold all the tokens so far.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.body: dict[str, Any] = {}
        self.choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        self.body.update({key: value for key, value in chunk.items() if key != "choices" and value is not None})
        for choice in chunk.get("choices") or ():
            if not isinstance(choice, dict) or type(choice.get("index", 0)) is not int:
                raise InputError(f"{self.where}.choices", choice, "objects with an index")
            whole = self.choices.setdefault(choice.get("index", 0), {"streamed": []})
            encoded, *_ = _routed(choice)
            whole["streamed"] += [] if encoded is None else [encoded]
            tokens = choice.get("token_ids")
            if isinstance(tokens, list):
                before = whole.get("token_ids", [])
                again = "outputs" in chunk and tokens[: len(before)] == before
                whole["token_ids"] = tokens if again else [*before, *tokens]
            whole.update({key: value for key, value in choice.items() if key != "token_ids" and value is not None})
        self.body["choices"] = [self.choices[index] for index in sorted(self.choices)]


def _routed(holder: dict[str, Any]) -> tuple[Any, str | None, Any]:
    """`routed_experts` of an object or of an extension in it, the type of its numbers, and where its rows start."""
    if holder.get("routed_experts") is not None:
        start = next((holder[key] for key in _STARTS if holder.get(key) is not None), None)
        return holder["routed_experts"], holder.get("routed_experts_dtype"), start
    for key in _HOLDERS:
        if isinstance(holder.get(key), dict):
            found = _routed(holder[key])
            if found[0] is not None:
                return found
    return None, None, None


def _response(where: str, body: dict[str, Any]) -> Response:
    meta, choices = body.get("meta_info"), body.get("choices")
    if isinstance(meta, dict):
        return Response(name=_name(body), samples=[_sample(where, meta, meta)])
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        ids = any({"ids", "topk", "indices", "selected"} & words_of(key) for key in body)
        limit = "choices, or meta_info, with routed_experts"
        raise InputError(where, f"keys {', '.join(body)[:200]}", limit, NOT_IDS if ids else COUNTS)
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    whole, *_ = _routed(body)
    if whole is not None and len(choices) > 1:
        raise InputError(f"{where}: routed_experts", f"one for {len(choices)} choices", "those of every choice")
    samples = []
    for choice in choices:
        known = dict(usage or {})
        if len(choices) > 1:  # a sum over the choices: it says nothing of one of them
            known.pop("completion_tokens", None)
        prompts = [each[n] for each in (choice, body) for n in PROMPTS if isinstance(each.get(n), list)]
        lengths = [len(each) for each in prompts if list not in map(type, each)]  # and not of several prompts
        sizes = [each[n] for each in (choice, body) for n in PROMPT_SIZES if each.get(n) is not None]
        if lengths or (sizes and known.get("prompt_tokens") is None):
            known["prompt_tokens"] = (lengths or sizes)[0]
        known.setdefault("cached_tokens", body.get("num_cached_tokens"))  # vLLM's RequestOutput
        sample = _sample(where, choice if whole is None else body, {**choice, **known})
        before = choice.get(_PROMPT, body.get(_PROMPT))
        if before is not None and sample.encoded:
            sample.before = before
        elif before is not None:
            sample.encoded = [before]  # an answer of one token, which is never fed back
        samples.append(sample)
    answered = _count(where, (usage or {}).get("completion_tokens"), "usage")
    model = body.get("model")
    return Response(
        name=_name(body), samples=samples, answered=answered, model=model if isinstance(model, str) else None
    )


def _sample(where: str, holder: dict[str, Any], known: dict[str, Any]) -> Sample:
    encoded, dtype, start = _routed(holder)
    generated = _count(where, known.get("completion_tokens"), "completion_tokens")
    tokens = known.get("token_ids")
    if isinstance(tokens, list):
        if generated not in (None, len(tokens)):
            raise InputError(f"{where}: completion_tokens", generated, f"{len(tokens)}, the token_ids there are")
        generated = len(tokens)
    details = known.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else known.get("cached_tokens")
    reason = known.get("finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return Sample(
        where=where,
        encoded=known.get("streamed") or ([] if encoded is None else [encoded]),
        dtype=dtype,
        start=_count(where, start, "start"),
        prompt=_count(where, known.get("prompt_tokens"), "prompt_tokens"),
        generated=generated,
        cached=_count(where, cached, "cached_tokens") or 0,
        drafted=bool(known.get("spec_verify_ct")),  # SGLang's
        ended="aborted" if reason == "abort" else "without routed_experts",
    )


def _count(where: str, value: Any, key: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise InputError(f"{where}: {key}", value, "a whole number >= 0")
    return value
