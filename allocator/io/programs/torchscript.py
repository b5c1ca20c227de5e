"""TorchScript archives, read without torch's own reader.

``torch.jit.load`` compiles what the file says and runs some of it: ``__setstate__`` methods, and default arguments.
Either may write files. What is needed is little: the code is Python source, which is parsed and never run (see
`interpret`), and the objects are a pickle that may build nothing but plain records and tensors.
"""

from __future__ import annotations

import ast
import io
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator.errors import FileError, UnsafeFileError, UnsupportedModelError, a_kind
from allocator.io.archives import inner_names, reading
from allocator.io.plain_unpickler import PlainUnpickler
from allocator.io.programs.program import Bytes, Program, check_names
from allocator.io.programs.torchscript_interpreter import interpret
from allocator.io.programs.torchscript_source import Code, Record

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_MOST_BYTES = {".py": 2 * 2**20, ".pkl": 4 * 2**20}
"""Of source and objects, which take hundreds of times their size in memory; densenet121 has 0.3 MB of both."""
# What stands for the functions that TorchScript's pickles name, beside those that make tensors.
_CALLED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.jit._pickle.build_boollist": list,
    "torch.jit._pickle.build_doublelist": list,
    "torch.jit._pickle.build_intlist": list,
    "torch.jit._pickle.build_tensorlist": list,
}


def is_script(path: Path) -> bool:
    """Whether this is an archive as ``torch.jit.save`` writes it."""
    inner = inner_names(path)
    return "constants.pkl" in inner or any(name.startswith("code/") for name in inner)


def load_script(path: Path) -> Program:
    """Read a TorchScript archive as what its forward does in eval mode, for inputs of its weights' type.

    Nothing in the file is run.

    Raises:
        UnsafeFileError: it calls something else than ATen operators on tensors, or holds other objects than
            modules, tensors and plain data.
        UnsupportedModelError: its forward branches on its input, or keeps state.
        FileError: damaged.
    """
    try:
        with reading(path) as archive:
            return _read(archive, path)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error


def _check_text(archive: zipfile.ZipFile, path: Path) -> None:
    for suffix, most in _MOST_BYTES.items():
        size = sum(item.file_size for item in archive.infolist() if item.filename.endswith(suffix))
        if size > most:
            raise FileError(f"{path} holds {size:,} bytes of {suffix}, more than the {most:,} that any network needs")


def _read(archive: zipfile.ZipFile, path: Path) -> Program:
    _check_text(archive, path)
    names = set(archive.namelist())
    root = archive.namelist()[0].partition("/")[0]
    code = Code(lambda name: ast.parse(archive.read(f"{root}/code/{name}")))

    def objects(name: str, *, values: bool = True) -> Any:
        if f"{root}/{name}.pkl" not in names:
            return None
        return _Objects(archive, f"{root}/{name}", path, code, values).load()

    code.constants = objects("constants") or ()
    top = objects("data")
    if not isinstance(top, Record):
        raise FileError(f"{path} is damaged: it holds {a_kind(top)}, not a module")
    program = Program()
    _hold(program, top, code)
    interpret(program, top, code)
    traced = (objects("traced_inputs", values=False) or {}).get("forward")
    if traced and isinstance(traced[0], torch.Tensor):
        program.input_size = tuple(traced[0].shape[1:])
    return program.eval()


def _hold(program: Program, top: Record, code: Code) -> None:
    """Put the module's tensors into the program under their names; one that is used twice stays one."""
    tensors = list(_tensors(top, "", set()))
    check_names(name for name, _, _, _ in tensors)
    parameters: dict[int, nn.Parameter] = {}
    for name, owner, key, tensor in tensors:
        held = tensor.detach()
        if key in code.listed(owner.path, "__parameters__"):
            held = parameters.setdefault(id(tensor), nn.Parameter(held, requires_grad=tensor.requires_grad))
        program.hold(f"%{name}", name, held, persistent=key in code.listed(owner.path, "__buffers__"))
        owner.values[key] = f"%{name}"


def _tensors(record: Record, prefix: str, seen: set[int]) -> Iterator[tuple[str, Record, str, torch.Tensor]]:
    """(name, owner, key, tensor) of all tensors, each by the first of its names."""
    if id(record) in seen:
        return
    seen.add(id(record))
    for key, value in record.fields.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", record, key, value
        elif isinstance(value, Record):
            yield from _tensors(value, f"{prefix}{key}.", seen)


class _Objects(PlainUnpickler):
    """A pickle of plain records, lists, numbers and tensors; it can name nothing else.

    Its tensors lie in the folder of its name, or have none but their shapes.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str, path: Path, code: Code, values: bool) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}.pkl")))
        self.archive, self.folder, self.path, self.has_values = archive, folder, path, values
        self.bytes, self.code = Bytes(archive, path), code
        self.tensors: dict[Any, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A class of records for what the archive defines itself, and else what is listed here."""
        path = f"{module}.{name}"
        if path.startswith("__torch__.torch.classes."):
            raise UnsupportedModelError(f"it holds {path[10:]:.200}, an object of C++: give the Python model instead")
        if path.startswith("__torch__."):
            return self.code.record_class(path)
        if module == "torch" and name in _STORAGES:
            return name
        if path in _CALLED:
            return _CALLED[path]
        if path == "torch.jit._pickle.restore_type_tag":
            return _untagged
        if path == "torch._utils._rebuild_tensor_v2":
            return self._tensor
        raise UnsafeFileError(f"{self.path} asks for {path:.200}, which no module's tensors and numbers need")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        """A storage: its type and its name."""
        _, kind, key, _, _ = pid
        return _STORAGES[kind], str(key)

    def _tensor(
        self, storage: tuple[torch.dtype, str], offset: int, sizes: Any, strides: Any, requires_grad: Any, *_: Any
    ) -> Any:
        if not self.has_values:
            return torch.empty(tuple(sizes), device="meta")
        identity = storage, offset, tuple(sizes), tuple(strides)
        if identity not in self.tensors:
            dtype, key = storage
            tensor = self.bytes.tensor(f"{self.folder}/{key}", dtype, sizes, strides, offset)
            self.tensors[identity] = tensor.requires_grad_(bool(requires_grad))
        return self.tensors[identity]


def _untagged(value: Any, _: str) -> Any:
    """A list or dictionary without the note of what its entries are."""
    return value
