"""What it takes to make an answer again: the call, versions, and digests of what it was made from."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import gemopt
from gemopt.certificate import counts_digest
from gemopt.profile import Profile
from gemopt.result import Origin
from gemopt.traces import Traces

PACKAGES = ("numpy", "numba", "scipy", "ortools", "highspy")  # what answers and bounds depend on
SILENT = ("progress", "on_layers", "notice")  # change nothing in the answer


def origin(function: Callable[..., Any], given: Mapping[str, Any], profile: Profile, traces: Traces) -> Origin:
    """Of a call of `function` with the arguments `given`, which led to this profile and these traces."""
    return Origin(
        call=call(function, given),
        versions=", ".join(_versions()),
        profile_sha256=profile.digest(),
        traces_sha256=counts_digest(traces),
    )


def _versions() -> Iterator[str]:
    yield f"gemopt {gemopt.__version__}"
    yield f"Python {platform.python_version()}"
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"


def call(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """The call in Python, with what differs from the defaults; objects stand by the name of their argument."""
    words = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = given[name]
        if parameter.default is parameter.empty:
            words.append(_shown(name, value))
        elif name not in SILENT and not (value is parameter.default or (_plain(value) and value == parameter.default)):
            words.append(f"{name}={_shown(name, value)}")
    return f"gemopt.{function.__name__}({', '.join(words)})"


def _shown(name: str, value: object) -> str:
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    return repr(value) if _plain(value) else name


def _plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float))
