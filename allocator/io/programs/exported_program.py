"""Exported programs (``.pt2``), read without torch's own reader.

``torch.export.load`` unpickles without restrictions and evaluates the file's expressions as Python. What is needed
of the format is little: a list of ATen calls as JSON, and tensors as raw bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator.errors import FileError, UnsafeFileError, UnsupportedModelError
from allocator.io.archives import inner_names, reading
from allocator.io.pickle_rehearsal import refused_calls
from allocator.io.programs.program import Bytes, Program, Step, function_of
from allocator.torch_private import PT2_DTYPES

_PLAIN = ("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings")


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
        self.archive, self.path, self.bytes = archive, path, Bytes(path)
        self.root = archive.namelist()[0].partition("/")[0]
        models = [name for name in archive.namelist() if name.startswith(f"{self.root}/models/")]
        if len(models) != 1:
            raise FileError(f"{path} holds {len(models)} programs, expected 1")
        self.name = models[0].rpartition("/")[2].removesuffix(".json")
        self.program = Program()
        self.tensors: dict[tuple[str, str], torch.Tensor] = {}

    def read(self) -> Program:
        module = self._json(f"models/{self.name}.json")["graph_module"]
        graph, signature = module["graph"], module["signature"]
        tensors = self._tensors("weights") | self._tensors("constants")
        for spec in signature["input_specs"]:
            self._input(spec, tensors)
        for spec in signature["output_specs"]:
            if "user_output" not in spec:
                raise UnsupportedModelError(
                    f"{self.path} changes its own buffers ({', '.join(spec)}): export the model in eval mode"
                )
        self.program.gives = [output["as_tensor"]["name"] for output in graph["outputs"]]
        for node in graph["nodes"]:
            if not node["target"].startswith("torch.ops.aten._assert_"):
                self.program.aten.append(self._step(node))
        if self.program.takes:
            sizes = graph["tensor_values"][self.program.takes[0]]["sizes"]
            known = tuple(size.get("as_int", 0) for size in sizes[1:])
            self.program.input_size = known if all(known) else None
        return self.program.eval()

    def _json(self, name: str) -> Any:
        return json.loads(self.archive.read(f"{self.root}/{name}"))

    def _input(self, spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        ((kind, said),) = spec.items()
        if kind == "user_input":
            self.program.takes.append(said["arg"]["as_tensor"]["name"])
            return
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise UnsafeFileError(f"{self.path} holds a {kind}, which would have to be unpickled")
        name = said[f"{kind}_name"]
        value = tensors[name] if kind != "buffer" or said.get("persistent", True) else tensors[name].clone()
        if kind == "parameter" and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value)
        persistent = kind == "buffer" and bool(said.get("persistent", True))
        self.program.hold(said["arg"]["name"], name, value, persistent=persistent)

    def _tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers, or constants, by name."""
        found = {}
        for name, entry in self._json(f"data/{kind}/{self.name}_{kind}_config.json")["config"].items():
            key = entry["path_name"], json.dumps(entry)
            if key not in self.tensors:
                self.tensors[key] = self._read(f"{self.root}/data/{kind}/{entry['path_name']}", name, entry)
            found[name] = self.tensors[key]
        return found

    def _read(self, file: str, name: str, entry: dict[str, Any]) -> torch.Tensor:
        data = self.archive.read(file)
        said = entry["tensor_meta"]
        if said is None:
            raise UnsafeFileError(f"{self.path} holds {name}, an object that would have to be unpickled")
        if entry["use_pickle"]:
            calls = refused_calls(io.BytesIO(data))
            if calls:
                raise UnsafeFileError(f"{self.path} holds {name}, whose pickle asks for {', '.join(calls[:8])}")
            tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            if not isinstance(tensor, torch.Tensor):
                raise FileError(f"{self.path} is damaged: {name} is a {type(tensor).__name__}, not a tensor")
        else:
            sizes, strides = ([each["as_int"] for each in said[key]] for key in ("sizes", "strides"))
            tensor = self.bytes.tensor(
                data, PT2_DTYPES[said["dtype"]], sizes, strides, said["storage_offset"]["as_int"]
            )
        return nn.Parameter(tensor, requires_grad=bool(said["requires_grad"])) if entry["is_param"] else tensor

    def _step(self, node: dict[str, Any]) -> Step:
        results = [name for output in node["outputs"] for name in _names(output)]
        if not node["target"].startswith(("torch.ops.aten.", "_operator.")):
            raise UnsupportedModelError(
                f"{self.path} calls {node['target']!r:.100}, which is no ATen operator: give the Python model it "
                "was made from"
            )
        function_of(node["target"])
        step = Step(node["target"], results)
        for i, given in enumerate(node["inputs"]):
            name = given["name"] or f"_{i}"
            ((kind, value),) = given["arg"].items()
            step.order.append(name)
            if given.get("kind") == 2:
                step.keywords.append(name)
            if name in ("train", "training") and kind == "as_bool" and value:
                raise UnsupportedModelError(f"{self.path} was exported in training mode: export the model in eval mode")
            if kind in _PLAIN:
                setattr(step, f"arg_{name}", value)
            elif kind in ("as_float", "as_floats"):  # infinities are words
                setattr(step, f"arg_{name}", float(value) if kind == "as_float" else list(map(float, value)))
            else:
                self._computed(step, name, kind, value)
        return step

    def _computed(self, step: Step, name: str, kind: str, value: Any) -> None:
        """An argument that is not a plain literal."""
        if kind == "as_none":
            setattr(step, f"arg_{name}", None)
        elif kind == "as_tensor":
            step.names[name] = value["name"]
        elif kind in ("as_tensors", "as_nested_tensors"):
            step.names[name] = [each["name"] for each in value]
        elif kind == "as_optional_tensors":
            step.names[name] = [each["as_tensor"]["name"] if "as_tensor" in each else None for each in value]
        elif kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            ((how, said),) = value.items()
            if how == "as_name":
                step.names[name] = said
            else:
                setattr(step, f"arg_{name}", said)
        elif kind == "as_sym_ints":
            step.names[name] = [each["as_name"] if "as_name" in each else each["as_int"] for each in value]
        elif kind == "as_scalar_type":
            setattr(step, f"arg_{name}", PT2_DTYPES[value])
        elif kind in ("as_device", "as_layout", "as_memory_format"):
            step.order.remove(name)  # the defaults serve
        else:
            raise UnsupportedModelError(f"{self.path} calls {step.target} with {kind}: give the Python model instead")


def _names(output: dict[str, Any]) -> list[str]:
    ((kind, value),) = output.items()
    if kind == "as_none":
        return []
    if kind.startswith("as_sym"):
        return [value["as_name"]]
    return [each["name"] for each in value] if isinstance(value, list) else [value["name"]]
