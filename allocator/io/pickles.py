"""Open a pickled model without letting the pickle run code.

A pickle names the globals it wants. They are read without executing it, and admitted only where they turn
out to be module classes of PyTorch, torchvision, timm or this package's recipes (or one of a few listed
helpers). Loading itself is ``torch.load(weights_only=True)`` with exactly those on its allow-list, so
whatever this scan may have misread is refused there.
"""

from __future__ import annotations

import importlib
import pickle
import pickletools
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from allocator import adapters
from allocator.errors import FileError, UnsafeFileError, UnsupportedModelError, first_line
from allocator.io.archives import check_archive, damaged, inner_names, is_zip
from allocator.io.pickle_rehearsal import LEGACY_PICKLES, LEGACY_START, refused_calls
from allocator.modules import modules_of, tensors_within
from allocator.written_out import written_out

_TRUSTED_MODULES = (
    "torch.nn.modules.",
    "torch.nn.parallel.data_parallel",
    "torch.ao.nn.quantized.modules.functional_modules",
    "torch.ao.quantization.stubs",
    "torchvision.models.",
    "torchvision.ops.",
    "timm.models.",
    "timm.layers.",
    "allocator.adapters.torch_attention.",
    "allocator.recipes.",
    "allocator.io.programs.",
)
# These build modules out of traced graphs, which compiles text.
_DISTRUSTED_MODULES = ("torchvision.models.feature_extraction", "timm.models._features_fx", "timm.layers._fx")

# Plain data types and pure functions of tensors that ordinary pickled models hold.
_TRUSTED_HELPERS = frozenset(
    {
        "argparse.Namespace",
        "functools.partial",
        "torch._C._nn.gelu",
        "torch._C._nn.hardtanh",
        "torch.nn.functional.gelu",
        "torch.nn.functional.hardtanh",
        "torch.nn.functional.leaky_relu",
        "torch.nn.functional.relu",
        "torch.nn.functional.silu",
        "torch.relu",
        "torch.sigmoid",
        "torch.tanh",
        "timm.layers.format.Format",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
)
_MOST_MODULES = 1_000_000
"""Of a network, one that is used at several places counted at each: torch lists them so, and would not end."""
_ALWAYS_ALLOWED = ("collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set")


def open_pickle(path: Path, *, trust: bool = False) -> Any:
    """Read a file written by ``torch.save``, on the CPU.

    Args:
        path: an existing file.
        trust: unpickle without restrictions, which runs whatever code the file asks for.

    Returns:
        The object in the file: a module, or plain data such as a state_dict.

    Raises:
        UnsafeFileError: the pickle asks for something that is not on the allow-list.
        UnsupportedModelError: a TorchScript or exported program.
        FileError: empty, truncated, or not a file that ``torch.save`` wrote.
    """
    _refuse_programs(path)
    if trust:
        return _load(path, weights_only=False)
    if is_zip(path):
        check_archive(path)
    admitted, refused = _admit(globals_in(path))
    if refused:
        raise UnsafeFileError(_unsafe(path, refused))
    classes = {name: found for found, name in admitted if isinstance(found, type)}
    if any(issubclass(found, nn.Module) for found in classes.values()):
        _refuse_legacy_modules(path)
    calls = _refused_calls(path, [name for name, found in classes.items() if issubclass(found, nn.RNNBase)])
    if calls:
        raise UnsafeFileError(_unsafe(path, calls))
    with torch.serialization.safe_globals(admitted):
        found = _load(path, weights_only=True)
    _check_content(found, path)
    return found


def code_asked_for(path: Path) -> list[str]:
    """What a file would have to be trusted with, by name: classes and functions that are not on the allow-list."""
    return _admit(globals_in(path))[1]


def _refused_calls(path: Path, recurrent: list[str]) -> list[str]:
    try:
        with path.open("rb") as file:
            return refused_calls(file, recurrent)
    except Exception as error:  # whatever a damaged pickle makes an unpickler trip over
        raise FileError(f"{damaged(path)} ({first_line(error)})") from error


def _check_content(found: Any, path: Path) -> None:
    """Tensors have the memory that their shapes claim, and modules are whole enough to be walked."""
    try:
        if isinstance(found, nn.Module):
            written_out(found, _children, _MOST_MODULES)
            for name, module in modules_of(found).items():
                _check_fields(name, module, path)
        values = found.state_dict().values() if isinstance(found, nn.Module) else tensors_within(found)
        for value in values:
            if isinstance(value, torch.Tensor):
                _check_memory(value, path)
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"{damaged(path)} ({first_line(error)})") from error


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module._modules.values() if child is not None]


def _check_fields(name: str, module: nn.Module, path: Path) -> None:
    """A module that was unpickled brings no hooks, and none of its fields takes the place of a method.

    Either is called by whoever looks at the module, and a ``functools.partial`` is as good as a call in the pickle.
    """
    for key, value in vars(module).items():
        hooks = value if key.endswith("_hooks") else None
        if hooks or callable(getattr(nn.Module, key, None)):
            raise UnsafeFileError(_unsafe(path, [f"{name or 'its module'}.{key}"]))


def _check_memory(tensor: torch.Tensor, path: Path) -> None:
    """A tensor may show the same numbers over and over; copied, it would take what its shape says."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FileError(f"{path} is damaged: a tensor of shape {tuple(tensor.shape)} has too little data")


def globals_in(path: Path) -> list[str]:
    """The globals a pickled file asks for beyond what weights-only loading always allows; nothing is run."""
    if is_zip(path):
        try:
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        except pickle.UnpicklingError as error:
            raise UnsafeFileError(_unsafe(path, [f"(pickle instruction: {error})"])) from error
        except Exception as error:  # whatever a damaged pickle makes the scanner trip over
            raise FileError(damaged(path)) from error
    if _is_tar(path):
        raise UnsafeFileError(
            f"{path} is in PyTorch's oldest (tar) format, which cannot be read without running its pickles: "
            "open it with --trust (trust=True) if you trust where it came from, and save it again"
        )
    return _globals_in_legacy(path)


def _is_tar(path: Path) -> bool:
    """Whether this is an archive as PyTorch's oldest releases wrote it: never packed, which would take long to tell."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _globals_in_legacy(path: Path) -> list[str]:
    """The same for files that are not zip archives: PyTorch's format before 1.6, or a bare pickle."""
    names: set[str] = set()
    with path.open("rb") as file:
        is_torch = file.read(len(LEGACY_START)) == LEGACY_START
        file.seek(0)
        for _ in range(LEGACY_PICKLES if is_torch else 1):
            if _read_globals(file, names):
                continue
            if names and not is_torch:
                raise UnsafeFileError(_unsafe(path, sorted(names)))
            raise FileError(damaged(path))
    default = ("torch._utils._rebuild_", "torch.storage.", "torch.serialization._get_layout")
    wanted = sorted(n for n in names if n not in _ALWAYS_ALLOWED and not _is_default_torch(n, default))
    if not is_torch and not wanted:
        raise FileError(damaged(path))
    return wanted


def _is_default_torch(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether torch itself knows what to do with this name: storages, dtypes and rebuild functions."""
    is_storage = name.startswith("torch.") and name.count(".") == 1 and name.endswith("Storage")
    listed = ("torch.nn.parameter.Parameter", "torch.Size", "torch.device", "torch.Tensor")
    return is_storage or name in listed or name.startswith(prefixes)


def _read_globals(file: BinaryIO, names: set[str]) -> bool:
    """Add the globals that a stream's next pickle names, by disassembling it; False where it breaks off."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # pickletools on bytes that are no pickle
        return False
    return True


def _admit(names: list[str]) -> tuple[list[Any], list[str]]:
    """Split wanted globals into (object, name) pairs that may be loaded, and names that may not."""
    admitted: list[Any] = []
    refused: list[str] = []
    for name in names:
        found = _resolve(name)
        if found is None:
            refused.append(name)
        else:
            admitted.append((found, name))
    return admitted, refused


def _resolve(name: str) -> Any | None:
    """The object of a trusted name, or None. Imports only modules of trusted packages."""
    is_helper = name in _TRUSTED_HELPERS
    if not is_helper and not name.startswith(_TRUSTED_MODULES):
        return None
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        top = module_name.partition(".")[0]
        if error.name == top:
            raise UnsupportedModelError(
                f"the model in this file is made of {top}'s modules, and {top} is not installed: "
                "pip install 'neuron-allocator[zoo]'"
            ) from error
        return None
    if is_helper:
        return found
    return found if _is_trusted_module_class(found) else None


def _is_trusted_module_class(found: Any) -> bool:
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return False
    if issubclass(found, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return False
    home = found.__module__ + "."
    return home.startswith(_TRUSTED_MODULES) and not home.startswith(_DISTRUSTED_MODULES)


_OF_A_SCRIPT = "a class of the script that was run, which lies in __main__ and not in a module"


def _load(path: Path, *, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if weights_only:
            raise UnsafeFileError(_unsafe(path, [_refusal(error)])) from error
        raise FileError(damaged(path)) from error
    except (ModuleNotFoundError, AttributeError) as error:
        why = first_line(error)
        raise FileError(
            f"{path} was pickled with code that is not here ({_OF_A_SCRIPT if '__main__' in why else why}): make that "
            "code importable, or save the model's state_dict where it is and load that with an architecture name"
        ) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise FileError(f"{damaged(path)} ({first_line(error)})") from error


def _refuse_programs(path: Path) -> None:
    """Programs that no reader takes; exported ones of old are zip files too, told by their entries."""
    if path.suffix == ".onnx":
        raise UnsupportedModelError(f"{path} is an ONNX graph: give the PyTorch model it was exported from")
    inner = inner_names(path) if is_zip(path) else set()
    exported = ("serialized_exported_program.json", "archive_format", "models/model.json")
    if any(entry in inner for entry in exported):
        raise UnsupportedModelError(
            f"{path} is an exported program from before torch 2.8, which is not read: export the model again, or give "
            "the Python model it was made from (a pickled module, or a state_dict with an architecture name)"
        )


def _refuse_legacy_modules(path: Path) -> None:
    """Outside the zip format, weights-only loading takes weights and no modules."""
    if not is_zip(path):
        raise UnsafeFileError(
            f"{path} holds a module in PyTorch's format from before version 1.6, which cannot be read "
            "without running its pickle: open it with --trust (trust=True) if you trust where it came from, "
            "and save it again"
        )


def _unsafe(path: Path, names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    words = adapters.pickles_explained(names)
    return (
        f"{path} asks for code that is not on the allow-list: {shown}. It was not opened"
        f"{words and '; ' + words}. If you trust where "
        "it came from, pass --trust (trust=True), which runs what it asks for; otherwise ask for a "
        "state_dict or a .safetensors file"
    )


def _refusal(error: Exception) -> str:
    """What the weights-only unpickler objected to, out of torch's long explanation."""
    text = " ".join(str(error).partition("WeightsUnpickler error:")[2].split())
    return text.partition(" Please use ")[0].partition(" Check the documentation")[0] or first_line(error)
