"""Exported programs (``.pt2``), read without torch's own reader.

``torch.export.load`` unpickles without restrictions and evaluates the file's expressions as Python. What is needed
of the format is little: a list of ATen calls as JSON, and tensors as raw bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator.errors import FileError, UnsafeFileError, UnsupportedModelError, a_kind
from allocator.io.archives import inner_names, reading
from allocator.io.pickle_rehearsal import refused_calls
from allocator.io.programs.program import MOST_STEPS, Bytes, Program, Step, check_names, function_of
from allocator.torch_private import PT2_DTYPES


def is_program(path: Path) -> bool:
    """Whether this is an archive as ``torch.export.save`` of torch 2.8 or newer writes it."""
    inner = inner_names(path)
    return "archive_format" in inner and any(name.startswith("models/") for name in inner)


def load_program(path: Path) -> Program:
    """Read an exported program; nothing in the file is unpickled or evaluated.

    Raises:
        UnsafeFileError: it calls something else than ATen operators on tensors, or holds objects that would have
            to be unpickled.
        UnsupportedModelError: it branches, calls other programs, or changes its own buffers.
        FileError: damaged, or several programs in one file.
    """
    with reading(path) as archive:
        return _Reader(archive, path).read()


class _Reader:
    """One archive being turned into a `Program`."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path, self.bytes = archive, path, Bytes(archive, path)
        self.root = archive.namelist()[0].partition("/")[0]
        models = [name for name in archive.namelist() if name.startswith(f"{self.root}/models/")]
        if len(models) != 1:
            raise FileError(f"{path} holds {len(models)} programs, expected 1")
        self.name = models[0].rpartition("/")[2].removesuffix(".json")
        self.program = Program()
        self._read_tensors: dict[tuple[str, str], torch.Tensor] = {}

    def read(self) -> Program:
        """The whole archive."""
        module = self._json(f"models/{self.name}.json")["graph_module"]
        graph = module["graph"]
        self._signature(module["signature"])
        self.program.gives = [output["as_tensor"]["name"] for output in graph["outputs"]]
        nodes = [node for node in graph["nodes"] if not node["target"].startswith(_ASSERTIONS)]
        if len(nodes) > MOST_STEPS:
            raise FileError(f"{self.path} calls {len(nodes):,} operators, more than the {MOST_STEPS:,} of any network")
        for node in nodes:
            self.program.aten.append(self._step(node))
        if self.program.takes:
            self.program.input_size = _size_without_batch(graph["tensor_values"][self.program.takes[0]])
        return self.program.eval()

    def _json(self, name: str) -> Any:
        return json.loads(self.archive.read(f"{self.root}/{name}"))

    # -------------------------------------------------------------------------------------- tensors

    def _signature(self, signature: dict[str, Any]) -> None:
        """What goes into the program, held or given."""
        tensors = self._tensors("weights") | self._tensors("constants")
        check_names(tensors)
        for spec in signature["input_specs"]:
            self._input(spec, tensors)
        for spec in signature["output_specs"]:
            if "user_output" not in spec:
                raise UnsupportedModelError(
                    f"{self.path} changes its own buffers ({', '.join(spec)}): export the model in eval mode"
                )

    def _input(self, spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        ((kind, entry),) = spec.items()
        if kind == "user_input":
            self.program.takes.append(entry["arg"]["as_tensor"]["name"])
            return
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise UnsafeFileError(f"{self.path} holds a {kind}, which would have to be unpickled")
        name = entry[f"{kind}_name"]
        tensor = tensors[name]
        persistent = kind == "buffer" and bool(entry.get("persistent", True))
        if kind == "parameter" and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor)
        elif kind == "buffer" and not persistent:
            tensor = tensor.clone()
        self.program.hold(entry["arg"]["name"], name, tensor, persistent=persistent)

    def _tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers, or constants, by name; what names the same bytes in the same way is one tensor."""
        tensors = {}
        for name, entry in self._json(f"data/{kind}/{self.name}_{kind}_config.json")["config"].items():
            key = entry["path_name"], json.dumps(entry)
            if key not in self._read_tensors:
                self._read_tensors[key] = self._tensor(f"{self.root}/data/{kind}/{entry['path_name']}", name, entry)
            tensors[name] = self._read_tensors[key]
        return tensors

    def _tensor(self, file: str, name: str, entry: dict[str, Any]) -> torch.Tensor:
        meta = entry["tensor_meta"]
        if meta is None:
            raise UnsafeFileError(f"{self.path} holds {name}, an object that would have to be unpickled")
        if entry["use_pickle"]:
            tensor = self._unpickled(file, name)
        else:
            sizes, strides = ([number["as_int"] for number in meta[key]] for key in ("sizes", "strides"))
            offset = meta["storage_offset"]["as_int"]
            tensor = self.bytes.tensor(file, PT2_DTYPES[meta["dtype"]], sizes, strides, offset)
        return nn.Parameter(tensor, requires_grad=bool(meta["requires_grad"])) if entry["is_param"] else tensor

    def _unpickled(self, file: str, name: str) -> torch.Tensor:
        """A tensor of a kind that is more than its bytes; rehearsed, because weights-only loading still calls."""
        data = self.archive.read(file)
        calls = refused_calls(io.BytesIO(data))
        if calls:
            raise UnsafeFileError(f"{self.path} holds {name}, whose pickle asks for {', '.join(calls[:8])}")
        tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if not isinstance(tensor, torch.Tensor):
            raise FileError(f"{self.path} is damaged: {name} is {a_kind(tensor)}, not a tensor")
        return tensor

    # -------------------------------------------------------------------------------------- calls

    def _step(self, node: dict[str, Any]) -> Step:
        target = node["target"]
        if not target.startswith(("torch.ops.aten.", "_operator.")):
            raise UnsupportedModelError(
                f"{self.path} calls {target!r:.100}, which is no ATen operator: give the Python model it was made from"
            )
        function_of(target)  # raises where it does more than compute with tensors
        step = Step(target, [name for output in node["outputs"] for name in _results(output)])
        for i, argument in enumerate(node["inputs"]):
            name = argument["name"] or f"_{i}"
            ((kind, value),) = argument["arg"].items()
            if name in ("train", "training") and kind == "as_bool" and value:
                raise UnsupportedModelError(f"{self.path} was exported in training mode: export the model in eval mode")
            if kind in _DEFAULTS_SERVE:
                continue
            step.order.append(name)
            if argument.get("kind") == _BY_KEYWORD:
                step.keywords.append(name)
            self._argument(step, name, kind, value)
        return step

    def _argument(self, step: Step, name: str, kind: str, value: Any) -> None:
        """Put one argument into a step: a literal, or the name of what it is computed as."""
        if kind in _SYMBOLS:  # a number by its name, or one that turned out to be the same for all inputs
            ((how, content),) = value.items()
            kind, value = ("as_name", content) if how == "as_name" else ("as_is", content)
        if kind in _LITERALS:
            setattr(step, f"arg_{name}", _LITERALS[kind](value))
        elif kind in _NAMES:
            step.names[name] = _NAMES[kind](value)
        else:
            raise UnsupportedModelError(f"{self.path} calls {step.target} with {kind}: give the Python model instead")


# ------------------------------------------------------------------------------------------ the format's kinds


def _as_is(value: Any) -> Any:
    return value


def _none(_: Any) -> None:
    return None


def _floats(values: list[Any]) -> list[float]:
    return [float(value) for value in values]


def _tensor_name(value: dict[str, Any]) -> str:
    return str(value["name"])


def _tensor_names(values: list[dict[str, Any]]) -> list[str]:
    return [value["name"] for value in values]


def _optional_names(values: list[dict[str, Any]]) -> list[str | None]:
    return [value["as_tensor"]["name"] if "as_tensor" in value else None for value in values]


def _numbers_or_names(values: list[dict[str, Any]]) -> list[Any]:
    return [value["as_name"] if "as_name" in value else value["as_int"] for value in values]


_LITERALS: dict[str, Callable[[Any], Any]] = {
    "as_bool": _as_is,
    "as_bools": _as_is,
    "as_float": float,  # infinities are words
    "as_floats": _floats,
    "as_int": _as_is,
    "as_ints": _as_is,
    "as_is": _as_is,
    "as_none": _none,
    "as_scalar_type": PT2_DTYPES.__getitem__,
    "as_string": _as_is,
    "as_strings": _as_is,
}
_NAMES: dict[str, Callable[[Any], Any]] = {
    "as_name": _as_is,
    "as_nested_tensors": _tensor_names,
    "as_optional_tensors": _optional_names,
    "as_sym_ints": _numbers_or_names,
    "as_tensor": _tensor_name,
    "as_tensors": _tensor_names,
}
_SYMBOLS = ("as_sym_bool", "as_sym_float", "as_sym_int")
_DEFAULTS_SERVE = ("as_device", "as_layout", "as_memory_format")
_BY_KEYWORD = 2
_ASSERTIONS = "torch.ops.aten._assert_"
"""Calls that check sizes and give nothing."""


def _results(output: dict[str, Any]) -> list[str]:
    """Names of what comes out of a call."""
    ((kind, value),) = output.items()
    if kind == "as_none":
        return []
    if kind.startswith("as_sym"):
        return [value["as_name"]]
    return _tensor_names(value if isinstance(value, list) else [value])


def _size_without_batch(meta: dict[str, Any]) -> tuple[int, ...] | None:
    """Sizes of an input but the first, None where one of them is left open."""
    sizes = tuple(size.get("as_int", 0) for size in meta["sizes"][1:])
    return sizes if all(sizes) else None
