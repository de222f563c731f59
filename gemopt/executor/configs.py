"""What the JSON files beside the weights say about single experts: names are renumbered, what cannot be is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemopt.documents import read_json
from gemopt.exceptions import InputError
from gemopt.executor.permutation import Permutation
from gemopt.models.checkpoint_names import tensor_role

INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
_TEXTS = re.compile(r"tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|processor")
# What stands where the number of an expert would, in a name or in a pattern of names.
_PLACE = re.compile(r"(?<!shared_)experts?(?:\\?\.|\[|/)(?:[A-Za-z]\w*\\?\.)?((?:\[[^\]]*\]|\([^)]*\)|\\[^.]|[^.\\])*)")
# Or what is no number of one: any digit, a name, a size as in `experts/128e`, the next word of a sentence.
_ANY_DIGIT = re.compile(r"\\d|\[0-9\]|\{[\d,]*\}|^[A-Za-z_]\w*|^\d+[A-Za-z][\w/-]*$|^\s.*")
ABOUT_EXPERTS = re.compile(r"expert|rout|e_score|eplb|physical_to_logical|phy2log|log2phy")
_COUNTS = re.compile(r": (?:num|n)_\w+$")  # alike in all layers, they may be listed for each
DATA = {".yaml", ".yml", ".csv", ".tsv", ".txt", ".npy", ".npz", ".pkl"}
HINT = "write the names of the modules out, or apply the placement live (gemopt apply)"


def other_files(source: Path, permutation: Permutation) -> dict[str, str | None]:
    """Files of a checkpoint beside its weights -> new content; None for those that stay as they are.

    Raises
    ------
    InputError
        Naming the file and the entry, where one speaks of single experts in a way that cannot be renumbered.
    """
    found: dict[str, str | None] = {}
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.suffix in {".safetensors", *OTHER_WEIGHTS}:
            continue
        if file.name == INDEX:
            index = dict(read_json(file))
            names = dict(index.get("weight_map", {}))
            index["weight_map"] = {permutation.new_name(name): part for name, part in names.items()}
            found[file.name] = json.dumps(index, indent=2) + "\n"
        elif not file.name.endswith(".index.json"):  # an index of weights that are not copied
            found[file.name] = _renumbered(file, permutation)
    return found


def _renumbered(file: Path, permutation: Permutation) -> str | None:
    if _TEXTS.search(file.name):
        return None
    if file.suffix in DATA and ABOUT_EXPERTS.search(file.name):
        raise InputError(str(file), "a file about experts", "what it says of single experts cannot be renumbered", HINT)
    if file.suffix != ".json" or not ABOUT_EXPERTS.search(file.name + file.read_bytes().decode(errors="replace")):
        return None
    before = read_json(file)
    after = renamed_modules(before, file.name, permutation)
    return None if after == before else json.dumps(after, indent=2) + "\n"


def renamed_modules(value: Any, where: str, permutation: Permutation) -> Any:
    """A JSON value with the modules of single experts renumbered, in keys and in strings; `where` is its path."""
    if isinstance(value, dict):
        if ABOUT_EXPERTS.search(where) and value and all(re.fullmatch(r"\d+", str(key)) for key in value):
            raise InputError(where, value, "settings by the number of an expert cannot be renumbered", HINT)
        return {
            _renamed(key, where, permutation): renamed_modules(item, f"{where}: {key}", permutation)
            for key, item in value.items()
        }
    if isinstance(value, list):
        numbers = [item for item in _flat(value) if not isinstance(item, str | dict | None)]
        if numbers and ABOUT_EXPERTS.search(where) and not (_COUNTS.search(where) and len(set(numbers)) == 1):
            raise InputError(where, value, "a list that may be by expert, or of experts, cannot be renumbered", HINT)
        return [renamed_modules(item, where, permutation) for item in value]
    return _renamed(value, where, permutation) if isinstance(value, str) else value


def renamed_metadata(metadata: dict[str, str], where: str, permutation: Permutation) -> dict[str, str]:
    """Metadata of a file of weights with the tensors and modules of single experts renumbered, in texts of JSON too."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {of(key): of(item) for key, item in value.items()}
        if isinstance(value, list):
            return [of(item) for item in value]
        return _renamed(value, where, permutation) if isinstance(value, str) else value

    def of_text(text: str) -> str:
        try:
            value = json.loads(text) if text.startswith(("{", "[")) else text
            after = of(value)
        except (ValueError, RecursionError):
            value, after = text, of(text)
        return text if after == value else after if isinstance(after, str) else json.dumps(after)

    return {of(key): of_text(text) for key, text in metadata.items()}


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]


def _renamed(text: str, where: str, permutation: Permutation) -> str:
    """A string that may be the name of a module or tensor, or a pattern of such names."""
    if not _names_one(text):
        return text
    if re.fullmatch(r"[\w.]+", text):
        role = tensor_role(permutation.family, text + ".")
        if role is None or role.layer not in (-1, *permutation.expert_of):
            return text  # shared, or of a layer that stays
        if role.kind == "expert":
            return permutation.new_name(text + ".").removesuffix(".")
    raise InputError(where, text, "a single expert, in a way that cannot be renumbered", HINT)


def _names_one(text: str) -> bool:
    """Whether a name or a pattern picks single experts rather than all of them."""
    return any(re.search(r"\d", _ANY_DIGIT.sub("", str(place))) for place in _PLACE.findall(text))
