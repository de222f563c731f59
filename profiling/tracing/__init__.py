"""Record the routing of a live transformers model: counts per step, pairs, transitions, straight to files.

While a model runs, hooks only copy what its routers returned into buffers made once; the counting is done for many
steps at once, on the device of the model (overhead: `benchmarks/tracing_overhead.py`). Keeping the routers' own tensors
alive instead would scatter the allocator's free memory, which slows the model itself down on CPU.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import TracebackType
from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

from gemopt.models import describe, find_moe_layers, num_hidden_layers
from gemopt.profiling.tracing.counts import Part
from gemopt.profiling.tracing.files import TraceFolder, load_ranks
from gemopt.profiling.tracing.heeded import check_heeded, plain
from gemopt.profiling.tracing.hidden import Hidden, HiddenSample
from gemopt.profiling.tracing.pending import Pending, Step, requests_of
from gemopt.profiling.tracing.streams import Streams, cache_in, cache_of, eos_tokens, mark_real, ranks_of
from gemopt.traces import Phase, Traces, hidden_path, save_hidden

__all__ = ["HiddenSample", "Tracer", "load_ranks"]

PENDING_BYTES = 8 << 20


class Tracer:
    """Record what a model routes while the `with` block runs.

        with Tracer(model, "traces", ids=True) as tracer:
            with tracer.task("maths"):
                model.generate(**batch, max_new_tokens=64)
        traces = Traces.load("traces")

    One forward of the decoder is one step. Steps of prompts and of next tokens are told apart, and batches that are
    computed in turn, by their caches. Left out of all counts: padding (by the two-dimensional attention mask) and
    sequences that have ended (a token fed after an end-of-sequence token), which a serving engine would not compute.

    Under tensor plus expert parallelism all ranks share a batch and rank 0 records it. Where ranks have batches of
    their own, each writes `path/rank-NNNN`; `load_ranks(path)` joins them. Only then is it known which rank sends
    a token; the tokens of one process, or of a batch that ranks share, have no `source_rank`.

    Parameters
    ----------
    model
        A transformers model with MoE layers, run eagerly (compiled graphs skip hooks).
    path
        New or empty folder; files `000000.safetensors`, ... appear in it, each complete, so that a kill at any
        moment loses at most what came after the last one.
    ids
        Also keep every token: its experts, step, vocabulary id and request.
    hidden
        Also keep, of these requests, what entered the routers, and `ids`: in memory until the block ends, then in
        `hidden.safetensors` of the folder (`gemopt.traces.with_hidden`).
    pairs
        Also count pairs of experts within a token and transitions between consecutive MoE layers.
    seconds, steps_per_file
        A file is written after this much time or this many steps, whichever comes first.
    eos_token_ids
        Tokens that end a sequence; default: those of the model's generation config. `()` counts everything.

    Raises
    ------
    InputError
        No MoE layers, a folder that is taken, a full disk (what was written stays), a forward that bypassed its
        routers, whose attention mask does not show the padding or whose cache does not tell its length, two forwards
        at a time, or no forward at all.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        *,
        ids: bool = False,
        hidden: HiddenSample | None = None,
        pairs: bool = True,
        seconds: float = 10.0,
        steps_per_file: int = 4096,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        if steps_per_file < 1:
            raise InputError("steps_per_file", steps_per_file, "at least 1")
        self._layers = find_moe_layers(model)
        self._decoder = model.get_submodule(self._layers[0].path.rpartition(".layers.")[0])
        self._model = model
        self._parameters = {m: list(inspect.signature(m.forward).parameters) for m in (model, self._decoder)}
        self._num_layers = len(self._layers)
        self._num_experts = self._layers[0].num_experts
        rank, share, world = ranks_of(model)
        own_batch = share < world
        self._sender = rank if own_batch and share == 1 else None
        self.path = path
        self._folder = None if rank % share else TraceFolder(path, rank=rank if own_batch else None)
        if hidden is not None and own_batch:
            raise InputError("hidden", "ranks with batches of their own", "hidden states need ranks that share a batch")
        self._keep_ids, self._pairs = ids or hidden is not None, pairs
        self._seconds, self._steps_per_file = seconds, steps_per_file
        self._eos = eos_tokens(model) if eos_token_ids is None else list(eos_token_ids)
        self._metadata = {
            "layer_ids": tuple(layer.layer_id for layer in self._layers),
            "num_hidden_layers": num_hidden_layers(model),
            "top_k": self._layers[0].top_k,
            "model": describe(model).name,
        }
        self._task, self._task_names = -1, list[str]()
        self._streams = Streams()
        self._lock = threading.Lock()
        self._thread: int | None = None  # these three are of the forward that is running
        self._cache: Any = None
        self._step: Step | None = None
        self._refused: InputError | None = None
        self._called = dict[str, Any]()
        self._pending: Pending | None = None
        self._handles: list[Any] = []
        self._part = Part()
        self._hidden = None if hidden is None else Hidden(hidden, len(self._layers), self._layers[0].hidden_size)
        self.num_steps = 0

    def __enter__(self) -> Tracer:
        if self._handles:
            raise InputError("Tracer", "a block within its own", "one at a time", "use another Tracer and folder")
        self._refused = None
        if self._folder is not None:
            self._last_write = time.monotonic()
            hook = self._decoder.register_forward_pre_hook(self._noting(self._begin), with_kwargs=True)
            self._handles = [hook, self._decoder.register_forward_hook(self._noting(self._end), always_call=True)]
            if self._model is not self._decoder:
                self._handles.append(self._model.register_forward_pre_hook(self._call, with_kwargs=True))
            for index, layer in enumerate(self._layers):
                self._handles.append(layer.router.register_forward_hook(self._router_hook(index)))
                look = self._experts_hook(index)
                self._handles.append(layer.experts.register_forward_pre_hook(look, with_kwargs=True))
                if self._hidden is not None:
                    self._handles.append(layer.router.register_forward_pre_hook(self._hidden_hook(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recording = bool(self._handles)
        self._remove_hooks()
        if recording:  # False after a failed write: there is nothing more to save
            self._write()
            if kind is None and not self.num_steps:
                limit = "at least one forward of the traced model"
                raise self._refused or InputError("model", "no forward", limit, "is it compiled?")
            if self._hidden is not None and self._folder is not None and self.num_steps:
                save_hidden(hidden_path(self._folder.path), Traces.load(self._folder.path), *self._hidden.arrays())

    @contextmanager
    def task(self, name: str | None) -> Iterator[None]:
        """Tag the steps of this block with a task; None: with none."""
        if name is not None and name not in self._task_names:
            self._task_names.append(name)
        before, self._task = self._task, -1 if name is None else self._task_names.index(name)
        try:
            yield
        finally:
            self._task = before

    def _noting(self, hook: Any) -> Any:
        """Keep what a forward is refused for: who generates in a thread of its own tells nobody."""

        def noted(*given: Any) -> None:
            try:
                hook(*given)
            except InputError as error:
                self._refused = error
                raise

        return noted

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the whole network was called with: one that sees gives its decoder neither token ids nor their mask."""
        self._called = {**dict(zip(self._parameters[module], args, strict=False)), **kwargs}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._parameters[module], args, strict=False)), **kwargs}
        called, self._called = self._called, {}
        token_ids = given.get("input_ids")
        shaped = token_ids if token_ids is not None else given.get("inputs_embeds")
        if token_ids is None and shaped is not None:
            outer = called.get("input_ids")
            token_ids = outer if outer is not None and outer.shape == shaped.shape[:2] else None
        mask = given.get("attention_mask")
        if isinstance(mask, dict) and called:
            mask = called.get("attention_mask")
        if shaped is None or torch._C._current_graph_task_id() != -1:
            return  # the decoder itself refuses this, or runs again within a backward pass
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise InputError("model", "forwards in two threads", "one at a time while it is traced", "take a lock")
            self._thread = threading.get_ident()
        rows, length = shaped.shape[:2]
        self._cache, cached = cache_in(given)
        phase = Phase.DECODE if length == 1 and cached else Phase.PREFILL
        if given.get("cu_seq_lens_q") is not None:
            phase = Phase.MIXED
        stream = self._streams.find(self._cache, rows, cached)
        pending = self._room(rows * length, shaped.device)
        begin, size = pending.used, rows * length
        real_BS = pending.real_C.narrow(0, begin, size).view(rows, length)
        mark_real(real_BS, mask, cached, more=self._cache is not None)
        picked = None if self._hidden is None else self._hidden.pick(real_BS, stream.request)
        if token_ids is not None:
            pending.token_ids_C.narrow(0, begin, size).view(rows, length).copy_(token_ids)
        targets = pending.ids_LCK.narrow(1, begin, size).unbind()
        seen: list[int | None] = [None] * self._num_layers
        told = token_ids is not None, seen, targets, picked
        self._step = Step((rows, length), phase, stream, self._task, begin, begin + size, *told)

    def _room(self, tokens: int, device: torch.device) -> Pending:
        """Buffers with room for a step of so many tokens; what was pending is counted first where it must be."""
        if self._pending is not None and self._pending.used + tokens > self._pending.capacity:
            self._digest()
        if self._pending is None or self._pending.capacity < tokens:
            top_k = self._layers[0].top_k
            capacity = max(tokens, PENDING_BYTES // (4 * self._num_layers * top_k))
            self._pending = Pending(self._num_layers, top_k, capacity, device)
        return self._pending

    def _router_hook(self, index: int) -> Any:
        layer = self._layers[index]
        chosen = layer.chosen

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            step = self._step
            if step is None:  # recomputed for a backward pass, or called outside the decoder
                return
            ids_NK, target_NK = plain(chosen(output)), step.targets[index]
            step.seen[index] = (step.seen[index] or 0) + ids_NK.shape[0]  # twice where layers share it
            if ids_NK.shape[0] == target_NK.shape[0]:
                target_NK.copy_(ids_NK)

        return hook

    def _experts_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (torch.compiler.is_compiling() or self.num_steps or self._pending is None or self._step is None):
                check_heeded(self._layers[index], index, self._step, self._pending, (*args, *kwargs.values()))

        return hook

    def _hidden_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._step is not None and self._step.picked is not None:
                self._step.picked.take(index, plain(args[0]))

        return hook

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._thread != threading.get_ident():
            return
        step, cache, self._step, self._cache, self._thread = self._step, self._cache, None, None, None
        if step is None or self._pending is None or output is None:  # nothing came out: it failed
            return
        for index, seen in enumerate(step.seen):
            if seen != step.end - step.begin:
                raise InputError(
                    self._layers[index].path,
                    "router did not run" if seen is None else f"router saw {seen} tokens",
                    f"the router of every MoE layer must see the {step.shape[0]} x {step.shape[1]} tokens of a forward",
                    "load the model without fused MoE kernels and without compiling it",
                )
        self._pending.steps.append(step)
        if self._hidden is not None:
            self._hidden.count(step.picked)
        self._streams.keep(step.stream, cache_of(output) if cache is None else cache)
        self.num_steps += 1
        waiting = len(self._pending.steps) + self._part.num_steps
        if waiting >= self._steps_per_file or time.monotonic() - self._last_write > self._seconds:
            self._write()

    def _write(self) -> None:
        self._digest()
        self._last_write = time.monotonic()
        if self._part.num_steps and self._folder is not None:
            part, self._part = self._part, Part()
            try:
                self._folder.append(part.traces(task_names=tuple(self._task_names), **self._metadata))
            except BaseException:
                self._remove_hooks()
                raise

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _digest(self) -> None:
        """Count the pending steps: N tokens together, L layers, K experts each."""
        pending = self._pending
        if pending is None or not pending.steps:
            return
        N, device = pending.used, pending.ids_LCK.device
        steps, pending.steps = pending.steps, []
        ids_LKN = pending.ids_LCK[:, :N].transpose(1, 2).contiguous()
        sizes = torch.tensor([step.end - step.begin for step in steps], device=device)
        step_N = torch.repeat_interleave(torch.arange(len(steps), device=device), sizes)
        kept: dict[str, Tensor] = {}
        if self._keep_ids:
            if all(step.phase is not Phase.MIXED for step in steps):  # rows of packed sequences are no requests
                kept["request"] = torch.cat([requests_of(step, device) for step in steps])
            if all(step.has_token_ids for step in steps):
                kept["token_ids"] = pending.token_ids_C[:N]
        for _, run in groupby(steps, lambda step: (id(step.stream), self._may_end(step))):
            self._drop_ended(list(run), pending)
        keep_N = pending.real_C[:N]
        if self._hidden is not None:
            self._hidden.add([(step.begin, step.picked) for step in steps], keep_N)
        if not bool(keep_N.all()):
            ids_LKN, step_N = ids_LKN[:, :, keep_N], step_N[keep_N]
            kept = {name: column[keep_N] for name, column in kept.items()}
        self._part.add(ids_LKN, step_N, [(step.phase, step.task) for step in steps], self._num_experts, self._pairs)
        if self._keep_ids:
            self._part.keep(ids_LKN, step_N, sender=self._sender, num_experts=self._num_experts, **kept)

    def _may_end(self, step: Step) -> bool:
        return step.phase is Phase.DECODE and step.has_token_ids and bool(self._eos)

    def _drop_ended(self, run: list[Step], pending: Pending) -> None:
        """Mark what lies behind the end of its sequence as not real, in consecutive steps of one batch of B rows."""
        stream = run[0].stream
        if not self._may_end(run[0]):
            stream.alive = None
            return
        begin, size = run[0].begin, run[-1].end - run[0].begin
        token_ids_TB = pending.token_ids_C.narrow(0, begin, size).view(len(run), stream.rows)
        alive_TB = ~torch.isin(token_ids_TB, torch.tensor(self._eos, device=token_ids_TB.device)).cummax(dim=0).values
        if stream.alive is not None:
            alive_TB &= stream.alive
        stream.alive = alive_TB[-1]
        pending.real_C.narrow(0, begin, size).logical_and_(alive_TB.view(-1))
