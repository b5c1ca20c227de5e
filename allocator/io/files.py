"""Read and write models, results and allocations.

Reading never runs code from a file, and writing is all or nothing. Four kinds of file:

- ``.pt2`` holds an exported program and ``.ts`` or ``.pt`` a TorchScript archive, which are read as a line of ATen
  calls;
- ``.pt`` and ``.pth`` hold a pickled module, as ``torch.save(model)`` writes it, or a state_dict;
- ``.safetensors`` holds an allocated model as data alone: its tensors, its allocation and the name it was
  built from, so that it opens without pickle;
- ``.json`` holds an allocation.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator import adapters
from allocator.arguments import checked
from allocator.disk import PathLike, check_writable, existing, shorten, write_atomically, write_text
from allocator.errors import FileError, NotSelfContainedWarning, a_kind, warn
from allocator.io.models import build_as_asked, in_python_file, said_of
from allocator.io.pickles import code_asked_for, open_pickle
from allocator.io.programs.exported_program import is_program, load_program
from allocator.io.programs.torchscript import is_script, load_script
from allocator.io.results import (
    RESULT_SUFFIX,
    is_result,
    load_result,
    load_result_allocation,
    save_result,
)
from allocator.io.safetensors_files import read_safetensors
from allocator.model_checks import check_model
from allocator.rewriting.allocation import Allocation

__all__ = [
    "PICKLE_SUFFIXES",
    "RESULT_SUFFIX",
    "write_atomically",
    "check_writable",
    "load_allocation",
    "load_model",
    "load_result",
    "save_model",
    "save_result",
    "write_text",
]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
PROGRAM_SUFFIXES = (".pt2", ".onnx", ".torchscript", ".ts")


@checked
def save_model(model: nn.Module, path: PathLike) -> None:
    """Write a model as a pickled module, the way ``torch.save(model, path)`` does, or as its library does.

    Raises:
        FileError: the suffix is not ``.pt`` or ``.pth``, the place cannot be written to, or the model holds
            something that cannot be pickled (a lambda, a hook); the message names it.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise FileError(
            f"cannot save a model as {shorten(str(path), 200)}: use .pt or .pth, or .safetensors for a result"
        )
    network = adapters.network_of(model)
    if not isinstance(network, nn.Module):
        check_model(model)
    with write_atomically(path) as temporary:
        try:
            torch.save(adapters.checkpoint(network), temporary)
        except OSError:
            raise
        except pickle.PicklingError as error:
            raise FileError(f"cannot write {path}: the model does not pickle ({error})") from error
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            # torch's writer tells of a full disk in words of its own, "unexpected pos 9600 vs 9552".
            full = "torch could not write all of it, is the disk full? " if "inline_container" in str(error) else ""
            raise FileError(f"cannot write {path}: {full}{error}") from error
        asked = code_asked_for(temporary)
    if asked:
        warn(_needed(path, asked), NotSelfContainedWarning)


def _needed(path: PathLike, asked: Sequence[str]) -> str:
    """What opening a pickled model takes beside the file."""
    more = f" and {len(asked) - 3} more" if len(asked) > 3 else ""
    script = any(name.startswith("__main__.") for name in asked)
    return (
        f"{path} does not hold the code of its network: who opens it needs {', '.join(asked[:3])}{more}, and says "
        f"--trust (trust=True){'; what lies in __main__, the script that was run, has to move into a module' * script}"
    )


@checked
def load_model(
    path: PathLike, *, arch: str | None = None, trust: bool = False, arch_kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Read a model from a file, on the CPU.

    Args:
        path: a pickled module or a state_dict (``.pt``, ``.pth``, ...), an exported program (``.pt2``), a TorchScript
            archive (``.pt``, ``.ts``, ...), or a saved result or weights alone (``.safetensors``).
        arch: the name (see `build`) of the network that a state_dict belongs to.
        trust: let the file run the code it asks for.
        arch_kwargs: arguments to build ``arch`` with, such as ``{"num_classes": 10}``.

    Raises:
        UnsafeFileError: the file would run code that is not on the allow-list.
        UnsupportedModelError: an ONNX graph, a program that branches on its input, or an ``arch`` that can't be built.
        FileError: missing, empty, truncated, not a model, or a state_dict that does not fit ``arch``.
    """
    file, kwargs = existing(path), dict(arch_kwargs or {})
    if file.suffix == RESULT_SUFFIX:
        return _load_safetensors(file, arch, kwargs, trust)
    if file.suffix == ".py":
        raise FileError(f"{path} holds code, not a model: {in_python_file(str(path))}")
    if file.suffix not in PICKLE_SUFFIXES + PROGRAM_SUFFIXES:
        raise FileError(f"{path}: unknown kind of file {file.suffix!r}; a model is read from .pt, .pth or .safetensors")
    if is_program(file):
        return load_program(file)
    if is_script(file):
        return load_script(file)
    found = _unwrap(open_pickle(file, trust=trust))
    if isinstance(found, nn.Module):
        return found
    state = _state_dict(found)
    if state is None:
        raise FileError(f"{path} holds {a_kind(found)}, not a model")
    return _fill(arch, kwargs, state, path)


def _load_safetensors(file: Path, arch: str | None, kwargs: dict[str, Any], trust: bool) -> nn.Module:
    """A saved result, or weights alone with the name of their network."""
    if is_result(read_safetensors(file, tensors=False)[0]):
        return load_result(file, model=build_as_asked(arch, kwargs) if arch else None, trust=trust)
    state = _state_dict(read_safetensors(file)[1])
    if state is None:
        raise FileError(f"{file} holds no tensors")
    return _fill(arch, kwargs, state, file)


def _unwrap(found: Any) -> Any:
    """A module out of a checkpoint dictionary or a DataParallel wrapper, where there is one."""
    if isinstance(found, dict):
        for key in ("ema", "model"):  # the averaged weights are those that are used
            if isinstance(found.get(key), nn.Module):
                found = found[key]
                break
    found = found.module if isinstance(found, nn.DataParallel) else found
    return adapters.opened(found) if isinstance(found, nn.Module) else found


def _state_dict(found: Any) -> dict[str, torch.Tensor] | None:
    """The tensors by name, out of a state_dict or of a checkpoint that holds one; None if there are none."""
    if not isinstance(found, dict):
        return None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    is_state = bool(found) and all(isinstance(k, str) for k in found)
    if not is_state or not any(isinstance(v, torch.Tensor) for v in found.values()):
        return None
    if all(key.startswith("module.") for key in found):
        return {key.removeprefix("module."): value for key, value in found.items()}
    return dict(found)


def _fill(arch: str | None, kwargs: dict[str, Any], state: dict[str, Any], path: PathLike) -> nn.Module:
    """A fresh build of the named network with these weights."""
    if arch is None:
        raise FileError(
            f"{path} holds weights alone (a state_dict of {len(state)} tensors): say which network they "
            "belong to with --arch NAME (arch=...), for example --arch torchvision:resnet50"
        )
    model = build_as_asked(arch, kwargs)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        sizes = "; --set KEY=VALUE (arch_kwargs=...) builds it with other arguments, as in --set num_classes=10"
        said = shorten(str(error)) + (sizes if "size mismatch" in str(error) else "")
        raise FileError(f"the weights in {path} do not fit {said_of(arch, kwargs)}: {said}") from error
    return model


def load_allocation(path: PathLike) -> Allocation:
    """Read an allocation from a ``.json`` file or out of a saved result.

    Raises:
        FileError: missing, damaged, or neither of the two.
    """
    file = existing(path)
    if file.suffix == RESULT_SUFFIX:
        return load_result_allocation(file)
    if file.suffix != ".json":
        raise FileError(f"{path} is not an allocation: it is read from a .json or {RESULT_SUFFIX} file")
    return Allocation.load(file)
