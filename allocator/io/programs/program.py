"""Programs: a straight line of ATen calls as a plain module, whatever file it was read from.

The literal arguments of a call are attributes of its module, so that they can be rewritten like those of any other.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator.errors import FileError, UnsafeFileError
from allocator.io.archives import most_unpacked
from allocator.torch_private import OpOverload, schema_of, tree_flatten
from allocator.tracing.operators import FUNCTIONS, operator_of

_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.eq, operator.ne,
    operator.ge, operator.gt, operator.le, operator.lt, operator.getitem,
)  # fmt: skip
_PYTHON: dict[str, Callable[..., Any]] = {f"_operator.{each.__name__}": each for each in _ARITHMETIC}
_DTYPES = {str(found): found for found in vars(torch).values() if isinstance(found, torch.dtype)}
_ATEN = re.compile(r"torch\.ops\.aten\.([a-z0-9_]+)\.([A-Za-z0-9_]+)")
_WORDS = frozenset({"approximate", "equation", "mode", "padding", "padding_mode", "reduce", "rounding_mode"})


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
        function = function_of(self.target)
        arguments = {name: self._argument(name, values) for name in self.order}
        keywords = {name: value for name, value in arguments.items() if name in self.keywords}
        made = function(*(value for name, value in arguments.items() if name not in self.keywords), **keywords)
        if isinstance(self.results, str):
            return {self.results: made}
        return dict(zip(self.results, tree_flatten(made)[0] if len(self.results) > 1 else [_only(made)]))

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
        found = self.names[name]
        if isinstance(found, list):
            return [values[each] if isinstance(each, str) else each for each in found]
        return values[found]


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
        found = tuple(values[name] for name in self.gives)
        return found[0] if len(found) == 1 else found

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
        kinds = {
            name: ["parameter" if isinstance(tensor, nn.Parameter) else "buffer", name in saved, tensor.requires_grad]
            for name, tensor in self.tensors().items()
        }
        plain = {key: getattr(self, key) for key in ("held", "takes", "gives", "input_size")}
        return {**plain, "tensors": kinds, "steps": [step.to_dict() for step in self._steps()]}

    @classmethod
    def from_dict(cls, data: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Program:
        """Make what `to_dict` gave, around these tensors.

        Raises:
            UnsafeFileError: it calls something else than ATen operators on tensors.
            FileError, KeyError, TypeError, ValueError, AttributeError: not what `to_dict` gave, or a tensor is missing.
        """
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
        program.aten.extend(Step.from_dict(each) for each in data["steps"])
        return program

    def _steps(self) -> Iterator[Step]:
        for step in self.aten:
            assert isinstance(step, Step)
            yield step


def _as_json(literal: Any) -> Any:
    return {"dtype": str(literal)} if isinstance(literal, torch.dtype) else literal


def _only(made: Any) -> Any:
    return made[0] if isinstance(made, (tuple, list)) and len(made) == 1 else made


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
    found = getattr(getattr(torch.ops.aten, match[1], None), match[2], None) if match else None
    if match is None or not isinstance(found, OpOverload):
        raise UnsafeFileError(f"the program calls {target!r:.200}, which is not an ATen operator")
    arguments = schema_of(found).arguments
    takes_tensors = any("Tensor" in str(argument.type) for argument in arguments) or operator_of(found).declared.creates
    strange = [a.name for a in arguments if "str" in str(a.type) and a.name not in _WORDS]
    if strange or not takes_tensors:
        raise UnsafeFileError(f"the program calls {target}, which does more than compute with tensors")
    # Where a forward calls a Python function, that is what is followed as a whole.
    declared = FUNCTIONS.get(match[1])
    return found if declared is None or declared.callable is None else declared.callable


class Bytes:
    """Tensors out of one file's raw bytes; together they take no more than a few times its size.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, most_unpacked(path)

    def tensor(
        self, data: bytes, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], offset: int
    ) -> torch.Tensor:
        """A tensor of its own.

        Raises:
            FileError: its shape does not lie within the data, or the file's tensors take far more than it holds.
        """
        if not math.prod(sizes):
            return torch.zeros(tuple(sizes), dtype=dtype)
        count = len(data) // dtype.itemsize
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if min([*sizes, *strides, offset]) < 0 or last >= count or math.prod(sizes) > count:
            raise FileError(f"{self.path} is damaged: a tensor of shape {tuple(sizes)} has only {count} numbers")
        self.left -= math.prod(sizes) * dtype.itemsize
        if self.left < 0:
            raise FileError(f"{self.path} is damaged: its tensors take far more than its own bytes, over and over")
        flat = torch.frombuffer(bytearray(data), dtype=dtype, count=count)
        return flat.as_strided(sizes, strides, offset).contiguous()
