"""Kernels compiled by numba: what is compiled is kept where that is possible, and nothing fails where it is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])
WRITABLE: Any = CompileResultCacheImpl._locator_classes


class _ReadOnly:
    """A folder of compiled kernels that need not be writable, as in an image that is mounted read-only."""

    def ensure_cache_path(self) -> None:
        if not os.path.isdir(self.get_cache_path()):  # type: ignore[attr-defined]
            raise FileNotFoundError


class _Where(CompileResultCacheImpl):
    _locator_classes = WRITABLE + [type(each.__name__, (_ReadOnly, each), {}) for each in WRITABLE]


class _Kept(FunctionCache):
    _impl_class = _Where

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What another user keeps for himself is compiled."""
        with suppress(OSError):
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """A full disk, or a folder that became read-only, costs the next process another compilation, no more."""
        with suppress(OSError):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def njit(**options: Any) -> Callable[[Function], Function]:
    """numba's, with a cache that lies where numba would have it, or nowhere."""

    def compiled(function: Function) -> Function:
        kernel: Any = numba.njit(**options)(function)
        with suppress(RuntimeError):  # no folder at all
            kernel._cache = _Kept(function)  # type: ignore[no-untyped-call]
        return kernel  # type: ignore[no-any-return]

    return compiled
