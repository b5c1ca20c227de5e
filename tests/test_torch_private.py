"""What is used of torch that is private: a torch that has it otherwise is named at import, and not found out later."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import allocator.torch_private as private
from allocator.errors import UnexpectedTorchError
from allocator.torch_private import default_device

# Imports of the file that look a name up anew find what is put in its place here.
OTHERWISE: dict[str, tuple[Any, str, Any, str]] = {
    "a hook's name": (nn.Module, "__call__", nn.Module._call_impl, "calls modules in another way"),
    "an overload": (torch._C, "_jit_resolve_packet", lambda *_, **__: "out", "chooses overloads in another way"),
    "containers": (torch.utils._pytree, "tree_map", lambda _, tree: tree, "walks containers in another way"),
    "a base class": (nn.modules.conv, "_ConvNd", nn.Linear, "derives its classes in another way"),
    "a mode": (torch._subclasses.fake_tensor, "FakeTensorMode", dict, "makes fake tensors in another way"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_torch_does_otherwise_is_said_at_import(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, value, said = OTHERWISE[what]
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(UnexpectedTorchError, match=rf"{said}: .* tried on torch 2\.\d+ to 2\.\d+; install one"):
        runpy.run_path(private.__file__)


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (torch.utils._python_dispatch, "_disable_current_modes", r"lacks a name \(cannot import name"),
        (torch._C, "_jit_resolve_packet", r"does not do what is expected of it \(AttributeError"),
    ],
)
def test_a_name_that_is_gone_is_said_at_import(
    owner: Any, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(UnexpectedTorchError, match=f"this torch .* {said}.*: neuron-allocator was tried on torch"):
        runpy.run_path(private.__file__)


def _another(*_: Any) -> Any:
    return 7


@contextmanager
def _hooked() -> Iterator[None]:
    hook = nn.modules.module.register_module_forward_hook(_another)
    yield
    assert any(hook.id in hooks for hooks in private.GLOBAL_HOOKS)
    hook.remove()


@contextmanager
def _wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("within", [torch.inference_mode, lambda: torch.device("meta"), FakeTensorMode, _hooked, _wide])
def test_it_may_be_loaded_in_a_mode_of_the_callers(within: Any) -> None:
    with within():
        runpy.run_path(private.__file__)


def test_dtypes_have_the_numbers_that_torch_gives_them() -> None:
    schema = pytest.importorskip("torch._export.serde.schema")
    names = {torch.uint8: "BYTE", torch.int8: "CHAR", torch.int16: "SHORT", torch.int32: "INT", torch.int64: "LONG"}
    names |= {torch.float16: "HALF", torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.bool: "BOOL"}
    names |= {torch.bfloat16: "BFLOAT16"}
    assert {number: names[dtype] for number, dtype in private.PT2_DTYPES.items()} == {
        kind.value: kind.name for kind in schema.ScalarType if kind.name in names.values()
    }


def test_a_default_device_that_torch_does_not_say_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> None:
        raise AttributeError("'NoneType' object has no attribute 'device'")

    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("meta"))
    assert default_device().type == "meta"
    monkeypatch.setattr(torch, "get_default_device", raises)
    assert default_device().type == "cpu"


def test_hooks_of_all_modules_run_where_modules_are_called_straight() -> None:
    model, called = nn.Sequential(nn.ReLU()), []
    hook = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    try:
        with private.called_straight(model):
            model(torch.zeros(1))
    finally:
        hook.remove()
    assert called == [1, 1]
