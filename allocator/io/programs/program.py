"""Programs: a straight line of ATen calls as a plain module, whatever file it was read from.

The literal arguments of a call are attributes of its module, so that they can be rewritten like those of any other.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import allocator.operators  # noqa: F401  (what a program may call is looked up among those that are declared)
from allocator.errors import FileError, UnsafeFileError
from allocator.io.archives import most_unpacked
from allocator.torch_private import OpOverload, schema_of, tree_flatten
from allocator.tracing.operators import FUNCTIONS, operator_of

_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.eq, operator.ne,
    operator.ge, operator.gt, operator.le, operator.lt, operator.getitem,
)  # fmt: skip
_PYTHON: dict[str, Callable[..., Any]] = {f"_operator.{function.__name__}": function for function in _ARITHMETIC}
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_ATEN = re.compile(r"torch\.ops\.aten\.([a-z0-9_]+)\.([A-Za-z0-9_]+)")
# Texts that choose between ways to compute. Any other may be the name of a file or of a device.
_WORDS = frozenset({"approximate", "equation", "mode", "padding", "padding_mode", "reduce", "rounding_mode"})

MOST_STEPS = 50_000
"""Calls of a program that a file may hold; the longest networks of timm and torchvision have some five thousand."""


_MOST_PARTS = 200_000
"""Of all names together; each part of a dotted name becomes a module of its own."""


def check_names(names: Iterable[str]) -> None:
    """Raise FileError where the names of a file's tensors would make modules without end."""
    parts = sum(name.count(".") + 1 for name in names)
    if parts > _MOST_PARTS:
        raise FileError(f"the names of the program's tensors have {parts:,} parts, more than those of any network")


class Step(nn.Module):
    """One call. Its literal arguments are attributes named ``arg_...``; the others are looked up by name.

    Attributes:
        target: the operator, as exported programs name it.
        names: per argument that is computed, the value or list of values it takes; None in place of None.
        keywords: the arguments that have to be passed by name.
        results: names of what comes out, one by one; or one name for all of it.
    """

    def __init__(self, target: str, results: list[str] | str) -> None:
        super().__init__()
        self.target, self.results = target, results
        self.order: list[str] = []
        self.names: dict[str, Any] = {}
        self.keywords: list[str] = []

    def forward(self, values: dict[str, Any]) -> dict[str, Any]:
        """Call the operator with values by name; what comes out, by name."""
        args, kwargs = [], {}
        for name in self.order:
            if name in self.keywords:
                kwargs[name] = self._argument(name, values)
            else:
                args.append(self._argument(name, values))
        # Asked each time, so that a step that was unpickled calls no more than one that was read.
        output = function_of(self.target)(*args, **kwargs)
        if isinstance(self.results, str):
            return {self.results: output}
        if len(self.results) == 1:
            return {self.results[0]: _only(output)}
        return dict(zip(self.results, tree_flatten(output)[0]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        literals = {name: _as_json(getattr(self, f"arg_{name}")) for name in self.order if name not in self.names}
        plain = {key: getattr(self, key) for key in ("target", "results", "order", "names", "keywords")}
        return {**plain, "literals": literals}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Step:
        """Make what `to_dict` gave; see `Program.from_dict`."""
        function_of(data["target"])
        step = cls(data["target"], data["results"])
        step.order, step.names, step.keywords = list(data["order"]), dict(data["names"]), list(data["keywords"])
        for name, value in data["literals"].items():
            setattr(step, f"arg_{name}", _DTYPES[value["dtype"]] if isinstance(value, dict) else value)
        return step

    def _argument(self, name: str, values: dict[str, Any]) -> Any:
        if name not in self.names:
            return getattr(self, f"arg_{name}")
        source = self.names[name]
        if isinstance(source, list):
            return [values[entry] if isinstance(entry, str) else entry for entry in source]
        return values[source]


class Program(nn.Module):
    """A straight line of ATen calls over tensors that keep the names they had.

    Attributes:
        held: per value that is a parameter or buffer, its name.
        takes, gives: the values that go in and come out.
        input_size: sizes of the first input, without its batch.
        aten: the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, str] = {}
        self.takes: list[str] = []
        self.gives: list[str] = []
        self.input_size: tuple[int, ...] | None = None
        self.aten = nn.ModuleList()

    def forward(self, *inputs: Any) -> Any:
        """Run the calls; gives one tensor, or a tuple of them."""
        if len(inputs) != len(self.takes):
            raise TypeError(f"this program takes {len(self.takes)} inputs, got {len(inputs)}")
        values = dict(zip(self.takes, inputs, strict=True))
        values.update((value, _tensor(self, name)) for value, name in self.held.items())
        for step in self._steps():
            values.update(step(values))
        outputs = tuple(values[name] for name in self.gives)
        return outputs[0] if len(outputs) == 1 else outputs

    def hold(self, value: str, name: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
        """Keep a tensor under its dotted name: a parameter, or a buffer that is saved or not.

        Raises:
            FileError: the name would hide the calls.
            KeyError: the name would hide an attribute of a module.
        """
        *path, key = name.split(".")
        if path[:1] == ["aten"]:
            raise FileError(f"there is a tensor called {name}, where the calls are kept")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(key, tensor)
        else:
            owner.register_buffer(key, tensor, persistent=persistent)
        self.held[value] = name

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is held, by name, with the buffers that a state_dict leaves out."""
        return {name: _tensor(self, name) for name in self.held.values()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form of all but the tensors' values."""
        saved = self.state_dict().keys()
        kinds = {}
        for name, tensor in self.tensors().items():
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            kinds[name] = [kind, name in saved, tensor.requires_grad]
        plain = {key: getattr(self, key) for key in ("held", "takes", "gives", "input_size")}
        return {**plain, "tensors": kinds, "steps": [step.to_dict() for step in self._steps()]}

    @classmethod
    def from_dict(cls, data: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Program:
        """Make what `to_dict` gave, around these tensors.

        Raises:
            UnsafeFileError: it calls something else than ATen operators on tensors.
            FileError, KeyError, TypeError, ValueError, AttributeError: not what `to_dict` gave, or a tensor is missing.
        """
        check_names(data["held"].values())
        if len(data["steps"]) > MOST_STEPS:
            raise FileError(
                f"the program has {len(data['steps']):,} calls, more than the {MOST_STEPS:,} of any network"
            )
        program = cls()
        parameters: dict[int, nn.Parameter] = {}
        for value, name in data["held"].items():
            kind, persistent, learns = data["tensors"][name]
            tensor = tensors[name]
            if kind == "parameter":
                tensor = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=bool(learns)))
            program.hold(value, name, tensor, persistent=bool(persistent))
        program.takes, program.gives = list(data["takes"]), list(data["gives"])
        program.input_size = None if data["input_size"] is None else tuple(map(int, data["input_size"]))
        program.aten.extend(map(Step.from_dict, data["steps"]))
        return program

    def _steps(self) -> Iterator[Step]:
        for step in self.aten:
            assert isinstance(step, Step)
            yield step


def _as_json(literal: Any) -> Any:
    return {"dtype": str(literal)} if isinstance(literal, torch.dtype) else literal


def _only(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    assert isinstance(tensor, torch.Tensor)
    return tensor


@functools.lru_cache(None)
def function_of(target: str) -> Callable[..., Any]:
    """The operator or function that a file names: ATen alone, and of that nothing that touches the outside.

    Raises:
        UnsafeFileError: anything else.
    """
    if target in _PYTHON:
        return _PYTHON[target]
    match = _ATEN.fullmatch(target)
    overload = None
    if match is not None:
        overload = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
    if match is None or not isinstance(overload, OpOverload):
        raise UnsafeFileError(f"the program calls {target!r:.200}, which is not an ATen operator")
    if not _computes_with_tensors(overload):
        raise UnsafeFileError(f"the program calls {target}, which does more than compute with tensors")
    # Where a forward calls a Python function, that is what is followed as a whole.
    declared = FUNCTIONS.get(match[1])
    if declared is None or declared.callable is None:
        return overload
    return declared.callable


def _computes_with_tensors(overload: OpOverload) -> bool:
    """By its schema: `aten::from_file` takes a file's name, and others count threads or warn."""
    takes_tensors = operator_of(overload).declared.creates
    for argument in schema_of(overload).arguments:
        kind = str(argument.type)
        if "str" in kind and argument.name not in _WORDS:
            return False
        if "Tensor" in kind:
            takes_tensors = True
    return bool(takes_tensors)


class Bytes:
    """Tensors out of the raw bytes of one archive; together they take no more than a few times its size.

    Args:
        archive: opened.
        path: of its file.
    """

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path, self.left = archive, path, most_unpacked(path)
        self._known: set[str] = set()
        self._last: tuple[str, bytearray] = ("", bytearray())

    def tensor(
        self, entry: str, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], offset: int
    ) -> torch.Tensor:
        """A tensor of its own.

        Args:
            entry: of the archive, where its numbers lie.
            dtype, sizes, strides, offset: as torch means them.

        Raises:
            FileError: its shape does not lie within the data, or the file's tensors take far more than it holds.
            KeyError: there is no such entry.
        """
        data = self._read(entry)
        if not math.prod(sizes):
            return torch.zeros(tuple(sizes), dtype=dtype)
        count = len(data) // dtype.itemsize
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if min([*sizes, *strides, offset]) < 0 or last >= count or math.prod(sizes) > count:
            raise FileError(f"{self.path} is damaged: a tensor of shape {tuple(sizes)} has only {count} numbers")
        self._spend(math.prod(sizes) * dtype.itemsize)
        flat = torch.frombuffer(data, dtype=dtype, count=count)
        # A copy: aligned as torch's kernels expect it, and without the rest of the data.
        return flat.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)

    def _read(self, entry: str) -> bytearray:
        """The bytes of an entry. Views of one storage follow each other; other tensors that read it again are few."""
        if self._last[0] != entry:
            data = bytearray(self.archive.read(entry))
            if entry in self._known:
                self._spend(len(data))
            self._known.add(entry)
            self._last = entry, data
        return self._last[1]

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise FileError(f"{self.path} is damaged: its tensors take far more than its own bytes, over and over")
