"""Run prompts through a model to trace its routing: what `gemopt trace` does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None
from safetensors import SafetensorError

from gemopt.documents import foreign, read_bytes
from gemopt.models import TINY_MOE, auto_class, from_files, model_path
from gemopt.profiling.tracing import HiddenSample, Tracer
from gemopt.profiling.tracing.hidden import hidden_bytes
from gemopt.traces import Traces, hidden_path

_OWN_CODE = "code that comes with weights is not run here: load it in Python, for gemopt.profiling.tracing.Tracer"


@dataclass(frozen=True)
class Prompt:
    """One request: its text and the task it is tagged with."""

    text: str
    task: str | None = None


def read_prompts(path: str | os.PathLike[str], *, task: str | None = None) -> list[Prompt]:
    """Prompts of a text file, one a line, or of a `.jsonl` file of `{"prompt": ..., "task": ...}`.

    `task` tags the prompts that name none. Blank lines are skipped.

    Raises
    ------
    InputError
        Naming the file and the line that is wrong.
    """
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(str(path), str(error), "UTF-8 text is needed") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(str(path), "no prompts", "one prompt per line is needed")
    if Path(path).suffix != ".jsonl":
        found = foreign.of_file(path)[0]
        if found == "a JSON document" or found.endswith("of gemopt"):
            raise InputError(str(path), found, "one prompt per line is needed", "JSON lines go in a file .jsonl")
        return [Prompt(line, task) for _, line in numbered]
    return [_json_prompt(line, f"{path}, line {number}", task) for number, line in numbered]


def _json_prompt(line: str, where: str, task: str | None) -> Prompt:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(where, line, 'a JSON object {"prompt": text, "task": name} is needed')
    text, own = value.get("prompt"), value.get("task", task)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}, prompt", text, "a text that is not empty is needed")
    if own is not None and (not isinstance(own, str) or not own):
        raise InputError(f"{where}, task", own, "a name is needed")
    return Prompt(text, own)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of at most `size` prompts of one task each, tasks in the order in which they first appear."""
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        mine = [prompt for prompt in prompts if prompt.task == task]
        for start in range(0, len(mine), size):
            yield mine[start : start + size]


def load_model(model: str, *, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, the local Hugging Face cache, or the shipped `tiny-moe`.

    Nothing is downloaded. Under torchrun the experts are sharded over all ranks, which share each batch. On the CPU
    the weights become float32, which most CPUs compute several times faster than bfloat16.

    Raises
    ------
    InputError
        When there is no such model, or it has no tokenizer.
    """
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = model_path(model)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = device or default_device()
    options: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32 if device == "cpu" else "auto"}
    if world > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=world, tp_plan="auto", ep_size=world)
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        loaded = from_files(auto_class(config), name, **options)
    except InputError as error:
        raise error.about(f"model {model}: {error.field}") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        found = f"{model} ({_first_line(error)})" if Path(name).is_dir() else model
        limit = f"a folder of a transformers model, a name in the local Hugging Face cache, or {TINY_MOE}"
        raise InputError("model", found, limit, _OWN_CODE if "custom code" in str(error) else "") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError("model", f"{model} ({_first_line(error)})", "a tokenizer saved beside the weights") from None
    if world == 1:
        try:
            loaded = loaded.to(device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
            raise InputError("device", f"{device} ({_first_line(error)})", "a device of this machine") from None
    return loaded, tokenizer


def default_device() -> str:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def record(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    path: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    max_prompt_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    tokens: bool = False,
    hidden: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Generate from all prompts while tracing to the folder `path`; returns the number of prompts cut short.

    Every batch is one prefill step and up to `max_new_tokens - 1` decode steps: the last new token is not fed back.
    With `max_new_tokens` 0 only the prompts are computed. `hidden` above 0 also keeps the tokens, and what entered the
    routers of whole requests drawn by the seed, which have at most so many tokens together.

    Raises
    ------
    InputError
        A prompt and its answer do not fit into the model's context, and whatever `Tracer` raises.
    """
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
    limit = min(max_prompt_tokens, context - max_new_tokens)
    if limit < 1:
        raise InputError("max_new_tokens", max_new_tokens, f"below the model's context of {context} tokens")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    vocabulary = model.get_input_embeddings().num_embeddings
    groups = list(batches(prompts, batch_size))
    encoded = [[_encoded(tokenizer, prompt.text, vocabulary) for prompt in group] for group in groups]
    num_cut = sum(len(row) > limit for rows in encoded for row in rows)
    sizes = [min(len(row), limit) + max(0, max_new_tokens - 1) for rows in encoded for row in rows]
    sample = HiddenSample.draw(sizes, hidden, seed) if hidden else None
    with Tracer(model, path, ids=tokens, hidden=sample) as tracer, torch.inference_mode():
        for group, rows in zip(groups, encoded, strict=True):
            pad = next(p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if p is not None)
            inputs = _left_padded([row[:limit] for row in rows], pad, model.device)
            with tracer.task(group[0].task):
                if max_new_tokens:
                    model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
                else:
                    model(**inputs, use_cache=False)
            if progress is not None:
                progress(len(group))
    return num_cut


def _encoded(tokenizer: Any, text: str, vocabulary: int) -> list[int]:
    row: list[int] = tokenizer(text)["input_ids"]
    if not row or max(row) >= vocabulary:
        found = f"token {max(row)}" if row else "no tokens"
        limit = f"tokens 0 to {vocabulary - 1} for a prompt"
        raise InputError("tokenizer", found, limit, "is it saved beside the weights, and is it the model's own?")
    return row


def _left_padded(rows: list[list[int]], pad: int, device: Any) -> dict[str, Any]:
    length = max(len(row) for row in rows)
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


@dataclass(frozen=True)
class Destination:
    """Where a trace goes: a folder that stays, or one beside a file, which replaces it at the end."""

    path: Path

    @property
    def folder(self) -> Path:
        """The folder that grows while the model runs."""
        return self.path.with_name(self.path.name + ".parts") if self.path.suffix == ".safetensors" else self.path

    @property
    def hidden(self) -> Path:
        """Where hidden states go."""
        return hidden_path(self.path)

    def room_for_hidden(self, model: Any, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens; `InputError` when the disk has fewer free."""
        size, free = hidden_bytes(model, tokens), shutil.disk_usage(self.path.absolute().parent).free
        if size > free:
            found = f"{tokens} tokens, {size / 1e6:.0f} MB"
            raise InputError("hidden", found, f"at most the {free / 1e6:.0f} MB that are free", "fewer tokens")
        return size

    def check(self) -> None:
        """`InputError` when the destination cannot be what it should, before any work is done."""
        if self.path.suffix not in ("", ".safetensors"):
            raise InputError("output", str(self.path), "a .safetensors file or a folder")
        if self.path.suffix and self.path.is_dir():
            raise InputError("output", str(self.path), "a file: a folder of this name exists")
        if not self.path.suffix and self.path.is_file():
            raise InputError("output", str(self.path), "a folder: a file of this name exists")
        if self.folder != self.path and next(self.folder.glob("*"), None) is not None:
            raise InputError(
                "output",
                str(self.folder),
                "left by a run that was cut short",
                "it can be read as traces; move or remove it",
            )

    def finish(self) -> Traces:
        """Read the trace back; for a file, write it and remove the folder."""
        traces = Traces.load(self.folder)
        if self.folder != self.path:
            traces.save(self.path)
            if hidden_path(self.folder).exists():
                hidden_path(self.folder).replace(hidden_path(self.path))
            shutil.rmtree(self.folder)
        return traces


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
