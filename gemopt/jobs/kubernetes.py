"""A Kubernetes ConfigMap that carries maps to the pods of an engine."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemopt.exceptions import MissingPackageError
from gemopt.jobs.document import Kubernetes
from gemopt.jobs.reading import as_yaml

LIMIT_BYTES = 1 << 20
"""Of the data of a ConfigMap (Kubernetes, "ConfigMaps": at most 1 MiB)."""
APPLY_BYTES = 256 << 10
"""Of all annotations; `kubectl apply` writes the manifest into one, `kubectl apply --server-side` does not."""


def config_map(settings: Kubernetes, files: Sequence[Path]) -> tuple[str, str]:
    """The manifest with every file under its name, and "" or what to know: why there is none, how it is applied."""
    contents = {path.name: path.read_bytes() for path in files}
    size = sum(map(len, contents.values()))
    if size > LIMIT_BYTES:
        return "", f"no ConfigMap: the maps have {size} bytes, Kubernetes takes at most {LIMIT_BYTES}; mount a volume"
    metadata: dict[str, Any] = {"name": settings.config_map}
    if settings.namespace is not None:
        metadata["namespace"] = settings.namespace
    metadata["labels"] = {"app.kubernetes.io/created-by": "gemopt", **settings.labels}
    manifest: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {}}
    for name, content in contents.items():
        try:
            manifest["data"][name] = content.decode()
        except UnicodeDecodeError:
            manifest.setdefault("binaryData", {})[name] = base64.b64encode(content).decode()
    told = json.dumps(manifest)
    note = (
        "configmap.yaml is too large for kubectl apply: kubectl apply --server-side" if len(told) > APPLY_BYTES else ""
    )
    try:
        return as_yaml(manifest), note
    except MissingPackageError:
        return json.dumps(manifest, indent=1) + "\n", note  # which is YAML too
