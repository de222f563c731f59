"""One class for the device of this process: timing, identity, clocks, cache size.

Everything goes through `torch.accelerator` and `torch.Event`, so that CUDA, ROCm, XPU and NPU take the same path; a
machine without an accelerator is measured with `perf_counter`. What `nvidia-ml-py` adds is optional.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemopt.exceptions import InputError, missing

try:
    import torch
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None


DEFAULT_CACHE_BYTES = 64 << 20  # where a device does not tell its last-level cache


class Device:
    """The device that this process measures: the accelerator of its local rank, else the CPU."""

    def __init__(self, kind: str = "auto", *, local_rank: int = 0) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        found = accelerator.type if accelerator is not None else "cpu"
        if kind not in ("auto", "cpu", found):
            raise InputError("device", kind, f"{' or '.join(sorted({'cpu', found}))} on this machine", "leave it out")
        self.type = found if kind == "auto" else kind
        self.index = 0
        if self.type != "cpu":
            count = torch.accelerator.device_count()
            if local_rank >= count:
                raise InputError("local rank", local_rank, f"this node has {count} devices", "start fewer ranks on it")
            self.index = local_rank
            torch.accelerator.set_device_index(local_rank)
        self.torch_device = torch.device(self.type) if self.type == "cpu" else torch.device(self.type, self.index)

    @property
    def is_accelerator(self) -> bool:
        """Whether work is queued on a device, so that it must be timed by events."""
        return self.type != "cpu"

    def _properties(self) -> Any:
        module = torch.get_device_module(self.torch_device)
        return module.get_device_properties(self.index) if hasattr(module, "get_device_properties") else None

    @property
    def name(self) -> str:
        """Product name."""
        if self.is_accelerator:
            return str(getattr(self._properties(), "name", self.type))
        with suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.processor() or platform.machine()

    @property
    def uuid(self) -> str | None:
        """Identity of the physical device; None for a CPU, which several ranks may share."""
        uuid = getattr(self._properties(), "uuid", None) if self.is_accelerator else None
        return None if uuid is None else f"GPU-{uuid}" if self.type == "cuda" else str(uuid)

    @property
    def node(self) -> str:
        """Host name."""
        return socket.gethostname()

    @property
    def cache_bytes(self) -> int:
        """Size of the last-level cache, which inputs must exceed to be read from memory."""
        if self.is_accelerator:
            return int(getattr(self._properties(), "L2_cache_size", 0) or DEFAULT_CACHE_BYTES)
        with suppress(OSError, ValueError):
            sizes = [
                path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
            ]
            return max(int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes)
        return DEFAULT_CACHE_BYTES

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        if self.is_accelerator:
            torch.accelerator.synchronize(self.torch_device)

    def time_us(self, call: Callable[[], object], block_us: float) -> float:
        """Mean time of a call in microseconds over a block of calls that takes at least `block_us`.

        Device time by events on an accelerator; wall time on a CPU, where a block has a fixed length rather than a
        fixed number of calls: what the scheduler takes away then falls into every block alike.
        """
        if not self.is_accelerator:
            start, calls, end = time.perf_counter_ns(), 0, block_us * 1e3
            while True:
                call()
                calls += 1
                spent = time.perf_counter_ns() - start
                if spent >= end:
                    return spent / 1e3 / calls
        calls = 1
        while True:
            spent_us = self._time_calls_us(call, calls)
            if spent_us >= block_us / 2:
                return spent_us / calls
            calls = max(2 * calls, int(calls * block_us / max(spent_us, block_us / 100)))

    def _time_calls_us(self, call: Callable[[], object], calls: int) -> float:
        before, after = (torch.Event(self.torch_device, enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(calls):
            call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) * 1e3

    def state(self) -> dict[str, str | float | int | None]:
        """Clocks, power and temperature as seen now; empty where nothing tells."""
        if self.type == "cuda":
            with suppress(Exception):  # the library or the driver may be missing, or refuse: the numbers are a bonus
                return self._nvml()
        return {"cores": len(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else {}

    def _nvml(self) -> dict[str, str | float | int | None]:
        import pynvml as nvml

        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(self.uuid)
            return {
                "sm_mhz": int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                "memory_mhz": int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                "temperature_c": int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            }
        finally:
            nvml.nvmlShutdown()
