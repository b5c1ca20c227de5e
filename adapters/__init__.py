"""What is particular to a library's blocks, by class name, so that no library is imported until it is used.

What is known of a library's classes lies in a file of this package that is loaded when the first module of the
library turns up. A user registers what is particular to a block of their own in a few lines:

>>> from allocator import adapters
>>> @adapters.register("mynet.blocks.SplitBlock")
... def sizes(block, kept):
...     return {"width": int(kept("conv1.weight", 0).sum())}
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from allocator.adapters.stand_ins import in_parts, stand_ins
from allocator.errors import AdapterError, in_words

Kept = Callable[[str, int], np.ndarray]
"""`kept("conv1.weight", 0)`: (n,) bool, which indices of that dim of the module's tensor stay."""
Sizes = Callable[[nn.Module, Kept], Mapping[str, Any]]
Arguments = tuple[Any, ...] | dict[str, Any]
"""Of one forward: by their places, or by their names."""
Paths = Callable[[nn.Module], Iterable[str]]
Places = tuple[str, int, Any]
"""Of a module's tensor, by its name: a dim, and which of its indices, as numpy takes them."""
OptionalBranches = Callable[[nn.Module], dict[str, tuple[str, ...]]]

S = TypeVar("S", bound=Sizes)


@dataclass(frozen=True)
class Configured:
    """What the configuration becomes that a library keeps beside a model's weights, to build the model from it again.

    Attributes:
        values: by path of a module, new values by attribute: of the whole model, whose path is "",
            "config.intermediate_size"; of others the numbers that they would hold if they were built from it.
        note: what the caller has to know before the model is saved; None where it is built again as it is.
    """

    values: Mapping[str, Mapping[str, Any]]
    note: str | None = None


@dataclass(frozen=True)
class Adapter:
    """Knowledge about one class of modules.

    Attributes:
        sizes: gives, for a module and what is kept of its tensors, the attributes that its forward reads as
            constants, each with its new value (an int, or a list or tuple of ints); also those of an object that it
            holds (`config.heads`), which becomes the module's own. With everything kept, it
            must give values that mean what the module has.
        outputs: gives the paths (relative to the module) of layers that make the model's answer (classes, boxes);
            their output channels stay.
        spared: gives the paths of layers whose output channels stay unless the caller includes them by name.
        optional_branches: gives, for a module, the paths (relative to it) of layers that the forward can
            do without, each with all the paths that must be set to None together with it.
        together: gives places in the tensors of a module that keep the same indices, one by one, for what its forward
            reads of their number; or with None in place of the second those that stay.
        narrow_heads: whether the heads of an attention get narrower, all alike, instead of going whole: where what it
            multiplies its scores with does not follow their width.
        norm_scale: for a norm that torch does not know as one, the name of the vector that scales its channels.
        inputs: gives example arguments of a whole model (on the CPU) and where their size comes from, or
            None where the model does not tell.
        any_width: changes a module of a copy so that it computes the same by a forward that takes any widths, where
            that of its class takes only some.
        widths: gives, for a module, its attributes that count the channels of what a module within it returns, each
            with the path of that one (relative to the module).
        multiples: gives, for a module, the dims of its tensors along which a multiple of a number has to stay, each
            with that number: {("down_proj", 2): 8}.
        network: for a wrapper that is not to be run itself (one whose `train` starts a training), the module in it.
        wrap: gives the like of a wrapper (first argument) around another network (second).
        opened: what the library makes of a model that was read from a file, before it is used.
        checkpoint: what to pickle of a model so that the library reads the file.
        rewritten: told of every smaller copy of a whole model, and of a module within one whose attributes changed, to
            take back what it says of itself and is no longer so.
        configuration: gives, for a whole model that was rewritten and has its original's configuration yet, what that
            becomes; None where it has none.
        write_configuration: writes what a whole model is built from again, into the folder where its weights lie.
    """

    sizes: Sizes | None = None
    outputs: Paths | None = None
    spared: Paths | None = None
    optional_branches: OptionalBranches | None = None
    together: Callable[[nn.Module], Iterable[tuple[Places, Places | None]]] | None = None
    narrow_heads: bool = False
    norm_scale: str | None = None
    inputs: Callable[[nn.Module], tuple[Arguments, str] | None] | None = None
    any_width: Callable[[nn.Module], None] | None = None
    widths: Callable[[nn.Module], Mapping[str, str]] | None = None
    multiples: Callable[[nn.Module], Mapping[tuple[str, int], int]] | None = None
    network: Callable[[nn.Module], Any] | None = None
    wrap: Callable[[nn.Module, nn.Module], nn.Module] | None = None
    opened: Callable[[nn.Module], nn.Module] | None = None
    checkpoint: Callable[[nn.Module], Any] | None = None
    rewritten: Callable[[nn.Module], None] | None = None
    configuration: Callable[[nn.Module], Configured | None] | None = None
    write_configuration: Callable[[nn.Module, Path], None] | None = None


_ADAPTERS: dict[str, Adapter] = {}
_STATES: set[str] = set()
_PICKLES: dict[str, str] = {}
# The package of a class, and the file here that knows it.
_LIBRARIES = {
    "torch": "torch_attention",
    "einops": "einops",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "hf",
    "ultralytics": "ultralytics",
    "peft": "peft",
    "diffusers": "diffusers",
}


def register(classes: str | type | Iterable[str | type], adapter: Adapter | None = None) -> Callable[[S], S]:
    """Register an adapter, as a call or as a decorator of the function that gives the sizes.

    Args:
        classes: a class, its qualified name such as `allocator.recipes.scalenet.ScaleBlock`, all classes of a
            package such as `timm.models.*` that have no adapter of their own, or several of these.
        adapter: what is known; left out, what is returned decorates a function of (module, kept), as
            `Adapter.sizes` is.

    Raises:
        ValueError: the class has an adapter already.
    """
    if isinstance(classes, (str, type)):
        classes = [classes]
    names = [_name(cls) for cls in classes]

    def decorate(sizes: S) -> S:
        _add(names, Adapter(sizes=sizes))
        return sizes

    if adapter is not None:
        _add(names, adapter)
    return decorate


def _add(names: Iterable[str], adapter: Adapter) -> None:
    # All are looked at first, so that a refusal leaves nothing half registered.
    for name in names:
        if name in _ADAPTERS:
            raise ValueError(f"{name} has an adapter already")
    _ADAPTERS.update(dict.fromkeys(names, adapter))


def register_state(classes: str | type | Iterable[str | type]) -> None:
    """Say that objects of these classes, among what a model returns, are no answers but kept for its next call.

    Their tensors may so lose channels, as the keys and values that a language model keeps do.
    """
    _STATES.update(map(_name, [classes] if isinstance(classes, (str, type)) else classes))


def is_state(item: object) -> bool:
    """Whether this is an object that a model keeps for its next call."""
    return any(_name(cls) in _STATES for cls in type(item).__mro__)


def explain_pickles(start: str, words: str) -> None:
    """Say what files are that ask for names with this start, for the error of one that was not opened."""
    _PICKLES[start] = words


def pickles_explained(names: Iterable[str]) -> str:
    """What is known of a file that asks for these names; "" where nothing is."""
    for name in names:
        _load(name)
        for start, words in _PICKLES.items():
            if name.startswith(start):
                return words
    return ""


def unregister(classes: str | type) -> None:
    """Forget the adapter of a class, so that another can be registered; nothing where there is none."""
    _ADAPTERS.pop(_name(classes), None)


def find(module: nn.Module) -> Adapter | None:
    """The adapter of a module's class or of its nearest base that has one."""
    for cls in type(module).__mro__:
        _load(cls.__module__)
        name = _name(cls)
        for pattern in (name, *_packages(name)):
            if pattern in _ADAPTERS:
                return _ADAPTERS[pattern]
    return None


def adapted(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """(path, module, adapter) of the modules that have one; each class is looked up once."""
    by_class: dict[type, Adapter | None] = {}
    for path, module in modules.items():
        cls = type(module)
        if cls not in by_class:
            by_class[cls] = find(module)
        adapter = by_class[cls]
        if adapter is not None:
            yield path, module, adapter


def take_any_width(modules: Mapping[str, nn.Module], changed: Iterable[str] | None = None) -> None:
    """Let modules of a copy compute by forwards that take any widths.

    Args:
        modules: all of the copy, by path.
        changed: names of tensors; where no such module itself holds any of them, all stay as they are. None for in any
            case.
    """
    concerned = [(path, module, each.any_width) for path, module, each in adapted(modules) if each.any_width]
    owners = None if changed is None else {name.rpartition(".")[0] for name in changed}
    if owners is not None and owners.isdisjoint(path for path, _, _ in concerned):
        return
    for _, module, take in concerned:
        take(module)


def widths(modules: Mapping[str, nn.Module]) -> list[tuple[str, str, str]]:
    """(path of a module, its attribute, path of the module whose output's channels it counts)."""
    found = []
    for path, module, adapter in adapted(modules):
        if adapter.widths is not None:
            found += [(path, name, _join(path, inner)) for name, inner in adapter.widths(module).items()]
    return found


def optional_branches(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Full paths of all layers of a model that may be absent, each with what goes with it."""
    optional: dict[str, tuple[str, ...]] = {}
    for path, module, adapter in adapted(modules):
        if adapter.optional_branches is not None:
            for layer, together in adapter.optional_branches(module).items():
                optional[_join(path, layer)] = tuple(_join(path, name) for name in together)
    return optional


def multiples(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, int, int]]:
    """(path of a module, full name of a tensor, dim, multiple) of all that adapters say of multiples."""
    for path, module, adapter in adapted(modules):
        if adapter.multiples is not None:
            for (name, dim), of in adapter.multiples(module).items():
                yield path, _join(path, name), dim, of


def places_together(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Places, Places | None]]:
    """(path of a module, places, places) that keep the same indices, with full names; None for ones that stay.

    Raises:
        AdapterError: an adapter names a tensor that the module does not have.
    """
    for path, module, adapter in adapted(modules):
        if adapter.together is None:
            continue
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for one, other in adapter.together(module):
            missing = [each[0] for each in (one, other) if each is not None and each[0] not in tensors]
            if missing:
                where = f"the adapter of {_name(type(module))}, asked about {path or 'the model'},"
                raise AdapterError(f"{where} names the tensor {missing[0]}, which the module does not have")
            first = (_join(path, one[0]), *one[1:])
            yield path, first, None if other is None else (_join(path, other[0]), *other[1:])


def narrows_heads(module: nn.Module | None) -> bool:
    """Whether the heads of this attention get narrower instead of going whole."""
    adapter = None if module is None else find(module)
    return adapter is not None and adapter.narrow_heads


def norm_scales(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the vectors by which norms that torch does not know as such scale their channels."""
    names = []
    for path, _, adapter in adapted(modules):
        if adapter.norm_scale is not None:
            names.append(_join(path, adapter.norm_scale))
    return names


def output_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the layers that make a model's answer, as far as adapters know them."""
    return _layers(modules, lambda adapter: adapter.outputs)


def spared_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the layers whose output channels stay unless the caller includes them by name."""
    return _layers(modules, lambda adapter: adapter.spared)


def _layers(modules: Mapping[str, nn.Module], which: Callable[[Adapter], Paths | None]) -> list[str]:
    paths: list[str] = []
    for path, module, adapter in adapted(modules):
        names = which(adapter)
        if names is not None:
            paths.extend(_join(path, name) for name in names(module))
    return paths


def sizes_of(
    path: str, module: nn.Module, adapter: Adapter, keep: Callable[[torch.Tensor, int], np.ndarray] | None = None
) -> dict[str, Any]:
    """New values of the attributes that an adapter declares.

    Args:
        path: of the module, for messages.
        module: one that has the adapter.
        adapter: what is known of it.
        keep: (n,) bool for a tensor and a dim, which of its indices stay; None for all.

    Raises:
        AdapterError: the adapter raised, or names a tensor or an attribute that the module does not have.
    """
    if adapter.sizes is None:
        return {}
    where = f"the adapter of {_name(type(module))}, asked about {path or 'the model'},"

    def kept(name: str, dim: int) -> np.ndarray:
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        # Not getattr: a parametrised weight would be computed anew, and no longer be the tensor that was traced.
        tensor = {**holder._parameters, **holder._buffers}.get(key)
        if tensor is None:
            raise AttributeError(f"there is no parameter or buffer {name}")
        if keep is None:
            return np.ones(tensor.shape[dim], dtype=bool)
        return keep(tensor, dim)

    try:
        values = dict(adapter.sizes(module, kept))
    except Exception as error:  # an adapter is anybody's code
        raise AdapterError(f"{where} raised {in_words(error)}") from error
    missing = [name for name in values if not _has(module, name)]
    if missing:
        raise AdapterError(f"{where} gives {', '.join(missing)}, which the module does not have")
    return values


def _has(module: nn.Module, name: str) -> bool:
    """Whether there is such an attribute, or such a one of an object that the module holds."""
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def sizes_of_many(
    path: str, module: nn.Module, adapter: Adapter, times: Callable[[torch.Tensor, int], np.ndarray], most: int
) -> dict[str, Any]:
    """New values of the attributes that an adapter declares, where indices may be there several times.

    An adapter is asked of what stays, and gives numbers of channels. Of what is there several times it is so asked
    several times: of what is there once or more, twice or more, and so on; the numbers add up.

    Args:
        path, module, adapter: as for `sizes_of`.
        times: (n,) for a tensor and a dim, how often each of its indices is there.
        most: the most that any is.
    """
    first = sizes_of(path, module, adapter, lambda tensor, dim: times(tensor, dim) > 0)
    if most < 2:
        return first
    none = sizes_of(path, module, adapter, lambda tensor, dim: np.zeros(tensor.shape[dim], dtype=bool))
    total = first
    for level in range(1, most):
        further = sizes_of(path, module, adapter, lambda tensor, dim, level=level: times(tensor, dim) > level)  # type: ignore[misc]
        total = {name: _plus(value, further[name], none[name]) for name, value in total.items()}
    return total


def _plus(total: Any, further: Any, none: Any) -> Any:
    """`total + further - none`, entry by entry; a number beside several stands for as many alike."""
    several = next((value for value in (total, further, none) if isinstance(value, (list, tuple))), None)
    if several is None:
        return total + further - none
    each = [value if isinstance(value, (list, tuple)) else [value] * len(several) for value in (total, further, none)]
    sums = [a + b - c for a, b, c in zip(*each, strict=True)]
    alike = not all(isinstance(value, (list, tuple)) for value in (total, further)) and len(set(sums)) == 1
    return sums[0] if alike else type(several)(sums)


def how_to(module: nn.Module) -> str:
    """What to do where the forward of a module reads a size from where nothing tells what it follows."""
    return f"to let them go, say what follows: allocator.adapters.register({_name(type(module))!r}), docs/extending.md"


def network_of(model: nn.Module) -> Any:
    """The network in a wrapper, which need not be a module; any other model is its own."""
    adapter = find(model)
    return model if adapter is None or adapter.network is None else adapter.network(model)


def wrapped_like(model: nn.Module, network: nn.Module) -> nn.Module:
    """A network as the caller gave one: in a wrapper like `model` where that is one."""
    adapter = find(model)
    return network if adapter is None or adapter.wrap is None else adapter.wrap(model, network)


def opened(model: nn.Module) -> nn.Module:
    """A model that was read from a file, as its library would use it."""
    adapter = find(model)
    return model if adapter is None or adapter.opened is None else adapter.opened(model)


def checkpoint(model: nn.Module) -> Any:
    """What to pickle of a model so that its library reads the file; the model itself where there is no more to it."""
    adapter = find(model)
    return model if adapter is None or adapter.checkpoint is None else adapter.checkpoint(model)


def write_configuration(model: nn.Module, folder: Path) -> None:
    """Write what a model's library builds it from, beside its weights; nothing where it has no such thing."""
    adapter = find(model)
    if adapter is not None and adapter.write_configuration is not None:
        adapter.write_configuration(model, folder)


def note_rewritten(modules: Iterable[nn.Module]) -> None:
    """Let what was made smaller say so of itself, where its library would take it for what it was."""
    for module in modules:
        adapter = find(module)
        if adapter is not None and adapter.rewritten is not None:
            adapter.rewritten(module)


def example_inputs(model: nn.Module) -> tuple[Arguments, str] | None:
    """Arguments that a model takes, and where their size comes from, where an adapter of its class knows."""
    adapter = find(model)
    if adapter is None or adapter.inputs is None:
        return None
    return adapter.inputs(model)


@contextmanager
def while_tracing() -> Iterator[None]:
    """What the libraries in use need while one of their forwards runs on tensors without values."""
    _load_all()
    with stand_ins.in_place():
        yield


@contextmanager
def in_calls_that_are_followed() -> Iterator[None]:
    """What the libraries in use compute by calls of their own is computed by those that can be followed and counted."""
    _load_all()
    with in_parts.in_place():
        yield


def _load_all() -> None:
    # The model itself need not be of a library whose functions it calls, so `find` may not have loaded its file.
    for library in _LIBRARIES:
        if library in sys.modules:
            _load(library)


# Cached, as it is asked for every class of every model, and a file is loaded only once anyway.
@functools.cache
def _load(module: str) -> None:
    """Load what is known of the library that a module is of."""
    for library, file in _LIBRARIES.items():
        if module == library or module.startswith(f"{library}."):
            importlib.import_module(f"{__name__}.{file}")


def _packages(name: str) -> Iterator[str]:
    """`a.b.*`, then `a.*`, for a class a.b.C."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield f"{name}.*"


def _name(cls: str | type) -> str:
    if isinstance(cls, str):
        return cls
    return f"{cls.__module__}.{cls.__qualname__}"


def _join(path: str, name: str) -> str:
    # The model itself has the empty path.
    return f"{path}.{name}" if path else name
