"""The configuration of a transformers model whose layers were made narrower.

Which field says the width of which layer is not looked up by name: the class is built from the configuration with one
field changed, without storage for its parameters, and the tensors whose sizes change are the field's. A configuration
is taken for the model's only where the class builds all of the model from it: every size, every number that a module
holds, and every buffer that is not saved. Where no configuration does, it carries the sizes themselves, as data that
`save_pretrained` writes into config.json and `build("hf:folder")` reads.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from allocator.adapters import Configured
from allocator.errors import FileError

RECORD = "neuron_allocator"
"""The field of a configuration that holds the sizes of layers which no other field tells."""

Field = tuple[str | int, ...]
"""Where a number lies in a configuration: names of fields, and the place in a list."""
Shapes = dict[str, tuple[int, ...]]
Effect = dict[tuple[str, int], float]
"""By tensor and dim, by how much it grows with a field."""


def configuration(model: nn.Module) -> Configured | None:
    """What the configuration of a rewritten model becomes; None for a class that is not built from one.

    Args:
        model: rewritten, with the configuration of its original. It is not changed.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "save_pretrained"):
        return None
    make = _maker(type(model), config)
    own = make({})
    if own is None:
        return None
    forgotten = {f"config.{RECORD}": None} if getattr(config, RECORD, None) else {}
    if _same(own, model, own):
        return Configured({"": forgotten})
    search = _Search(make, config, own, model)
    found = search.solve()
    if found is not None:
        fields, built = found
        values = {"": {**_as_attributes(config, fields), **forgotten}}
        return Configured({**values, **_differing(built, model)})
    named = ", ".join(sorted({".".join(map(str, field)) for field in search.uneven_fields()}))
    what = f"{named}, which no longer hold for all layers" if named else "the widths that are left"
    return Configured(
        {"": {f"config.{RECORD}": _record(own, model)}},
        f"no configuration says {what}: from_pretrained of transformers does not rebuild what save_pretrained writes, "
        "allocator.load('hf:FOLDER') does; where one number serves all layers, as with policy='uniform' and fill=False "
        "or with same=, both do",
    )


def write_configuration(model: nn.Module, folder: Path) -> None:
    """As `save_pretrained` writes it; nothing for a class that is not built from one."""
    config: Any = copy.copy(getattr(model, "config", None))
    if config is None or not hasattr(config, "save_pretrained"):
        return
    if not getattr(config, "architectures", None):
        config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


# Building a class from a configuration --------------------------------------------------------------


Make = Callable[[Mapping[Field, int]], nn.Module | None]
"""Builds a class with these fields of its configuration changed; None where that cannot be."""


def _maker(model_class: type, config: Any) -> Make:
    """A function that builds the class, without storage for parameters."""

    def make(fields: Mapping[Field, int]) -> nn.Module | None:
        try:
            with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
                built: nn.Module = model_class(_with(config, fields))
        except Exception:  # whatever a library's check of a configuration raises
            return None
        return built.eval()

    return make


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their storage as a module gets them, before anything is written there; buffers keep theirs."""

    def emptied(_module: nn.Module, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        handle.remove()


def _same(built: nn.Module, model: nn.Module, own: nn.Module) -> bool:
    """Whether a class built from a configuration differs from the model in the values of its weights alone.

    And in the whole numbers that modules hold, which are sizes, and can follow; others, such as scales, cannot.
    """
    if _shapes(built) != _shapes(model) or not _same_buffers(built, model, own):
        return False
    differing = [value for values in _differing(built, model).values() for value in values.values()]
    return all(type(item) is int for value in differing for item in (value if isinstance(value, list) else [value]))


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _numbers_held(model: nn.Module) -> dict[tuple[str, str], Any]:
    """(path, attribute): value, of what modules hold that is a number, or a list of numbers."""
    held = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and _is_plain(value):
                held[path, name] = list(value) if isinstance(value, tuple) else value
    return held


def _differing(built: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """By module and attribute the numbers of one model that another does not hold."""
    held = _numbers_held(model)
    differing: dict[str, dict[str, Any]] = {}
    for (path, name), value in _numbers_held(built).items():
        if held.get((path, name)) != value:
            differing.setdefault(path, {})[name] = value
    return differing


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return all(type(item) in (int, float) for item in items)


def _same_buffers(built: nn.Module, model: nn.Module, own: nn.Module) -> bool:
    """Whether the buffers that are not saved, and so are computed by the constructor, hold the same.

    Of a model without values, those that its own class computes stand for its own.
    """
    saved = model.state_dict().keys()
    buffers, computed = dict(model.named_buffers()), dict(own.named_buffers())
    for name, expected in built.named_buffers():
        given = buffers.get(name)
        if given is not None and given.is_meta and name in computed and computed[name].shape == given.shape:
            given = computed[name]
        if name in saved or given is None or given.is_meta:
            continue
        if given.shape != expected.shape or not torch.equal(expected.to(given), given):
            return False
    return True


# Finding the configuration --------------------------------------------------------------------------


class _Search:
    """For the configuration that a model is built from."""

    def __init__(self, make: Make, config: Any, own: nn.Module, model: nn.Module) -> None:
        self.make, self.config, self.model, self.own = make, config, model, own
        self.before, self.after = _shapes(own), _shapes(model)
        self._uneven: dict[Field, set[tuple[str, int]]] = {}
        self.pinned = _head_width(config)

    def solve(self) -> tuple[dict[Field, int], nn.Module] | None:
        """The fields that change, with their values, and what is built of them; None where none give the model."""
        if self.before.keys() != self.after.keys():
            return None
        effects = {}
        for field, value in self._candidates():
            effect = self._effect(field, value)
            if effect:
                effects[field, value] = effect
        for count in range(1, len(effects) + 1):
            for some in itertools.combinations(effects.items(), count):
                fields = self._values(dict(some))
                for extra in ({}, self.pinned) if fields and self.pinned else ({},) if fields else ():
                    built = self.make({**fields, **extra})
                    if built is not None and _same(built, self.model, self.own):
                        return {**fields, **extra}, built
        return None

    def _candidates(self) -> Iterator[tuple[Field, int]]:
        """Fields that may be the width of something that changed: its size is a multiple of their value."""
        olds = {
            size for name, shape in self.before.items() for size, new in zip(shape, self.after[name], strict=True)
            if size != new
        }  # fmt: skip
        for field, value in _numbers_in(self.config):
            if value is None:
                # Left open, it is computed from others: it may be said instead.
                meant = (size for size in sorted(olds) if self._means(field, size))
                yield from ((field, size) for size in itertools.islice(meant, 1))
            elif value > 1 and any(size % value == 0 for size in olds):
                yield field, value

    def _means(self, field: Field, size: int) -> bool:
        """Whether saying this size leaves all as it is, so that another one may change it."""
        built = self.make({field: size})
        return built is not None and _shapes(built) == self.before

    def _effect(self, field: Field, value: int) -> Effect:
        """By how much sizes change where a field changes by one."""
        for other in (value + 1, 2 * value):
            built = self.make({**self.pinned, field: other})
            if built is not None:
                break
        else:
            return {}
        shapes = _shapes(built)
        if shapes.keys() != self.before.keys():
            return {}
        effect: Effect = {}
        for name, shape in self.before.items():
            for dim, (size, moved) in enumerate(zip(shape, shapes[name], strict=True)):
                if moved != size:
                    effect[name, dim] = (moved - size) / (other - value)
        if len({self._change(at) / slope for at, slope in effect.items()}) > 1:
            self._uneven[field] = set(effect)
        return effect

    def _change(self, at: tuple[str, int]) -> int:
        name, dim = at
        return self.after[name][dim] - self.before[name][dim]

    def _values(self, effects: Mapping[tuple[Field, int], Effect]) -> dict[Field, int]:
        """What these fields would have to be, together and all of them changed; empty where no numbers do it."""
        places = [(name, dim) for name, shape in self.before.items() for dim in range(len(shape))]
        matrix = np.array([[effect.get(at, 0.0) for effect in effects.values()] for at in places])
        changes = np.array([self._change(at) for at in places], dtype=float)
        steps = np.linalg.lstsq(matrix, changes, rcond=None)[0]
        if not np.allclose(matrix @ steps, changes) or not np.allclose(steps, steps.round()):
            return {}
        values = {field: value + round(step) for (field, value), step in zip(effects, steps.tolist(), strict=True)}
        changed = all(round(step) for step in steps.tolist())
        return values if changed and min(values.values()) > 0 else {}

    def uneven_fields(self) -> list[Field]:
        """Fields that would have to have several values.

        Not those of which little changed (a layer's input is as wide as the heads are together), and not those that
        hang on others of them (a head's width).
        """
        changed = {
            (name, dim) for name, shape in self.before.items() for dim, size in enumerate(shape)
            if self.after[name][dim] != size
        }  # fmt: skip
        likely = {field: own for field, own in self._uneven.items() if 2 * len(own & changed) >= len(own)}
        return [field for field, own in likely.items() if not any(other < own for other in likely.values())]


def _head_width(config: Any) -> dict[Field, int]:
    """The width of a head, said as a number: where none is, it would be computed from how many heads there are."""
    try:
        hidden, heads, said = (
            getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "head_dim")
        )
    except Exception:  # the library's own, where a field differs from layer to layer
        return {}
    if said is not None or type(hidden) is not int or type(heads) is not int:
        return {}
    return {("head_dim",): hidden // heads}


def _numbers_in(config: Any, at: Field = ()) -> Iterator[tuple[Field, int | None]]:
    """(field, value) of all whole numbers in a configuration, those within it, and lists; None for what is open."""
    for name, value in vars(config).items():
        if name.startswith("_") or name == RECORD:
            continue
        if value is None or type(value) is int:
            yield (*at, name), value
        elif isinstance(value, list) and all(type(item) is int for item in value):
            yield from (((*at, name, i), item) for i, item in enumerate(value))
        elif hasattr(value, "to_dict"):
            yield from _numbers_in(value, (*at, name))


def _with(config: Any, fields: Mapping[Field, int]) -> Any:
    """A copy of a configuration with other values."""
    changed = copy.deepcopy(config)
    if getattr(changed, "use_pretrained_backbone", False):
        changed.use_pretrained_backbone = False  # or the constructor would fetch weights
    for field, value in fields.items():
        holder = changed
        for name in field[:-1]:
            holder = holder[name] if isinstance(name, int) else getattr(holder, name)
        if isinstance(field[-1], int):
            holder[field[-1]] = value
        else:
            setattr(holder, field[-1], value)
    return changed


def _as_attributes(config: Any, fields: Mapping[Field, int]) -> dict[str, Any]:
    """Fields as attributes of the model that holds the configuration; of a list, all of it."""
    changed = _with(config, fields)
    attributes: dict[str, Any] = {}
    for field in fields:
        names = [name for name in field if isinstance(name, str)]
        value: Any = changed
        for name in names:
            value = getattr(value, name)
        attributes[".".join(("config", *names))] = value
    return attributes


# Sizes that no field tells --------------------------------------------------------------------------


def _record(own: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Sizes of tensors, and numbers that modules hold, where they are not what the class builds."""
    before, after = _shapes(own), _shapes(model)
    shapes = {name: list(shape) for name, shape in after.items() if before.get(name) != shape}
    return {"shapes": shapes, "attributes": _differing(model, own), "buffers": _left_of_buffers(own, model)}


def _left_of_buffers(own: nn.Module, model: nn.Module) -> dict[str, list[int]]:
    """Of vectors that are not saved and so are computed by the constructor (frequencies), which entries are left."""
    saved, left = model.state_dict().keys(), {}
    computed = dict(own.named_buffers())
    for name, buffer in model.named_buffers():
        whole = computed.get(name)
        if name in saved or whole is None or whole.dim() != 1 or whole.shape == buffer.shape:
            continue
        entries = iter(enumerate(whole.tolist()))
        left[name] = [next((i for i, entry in entries if entry == value), -1) for value in buffer.tolist()]
    return {name: indices for name, indices in left.items() if -1 not in indices}


def cut_buffers(model: nn.Module, config: Any) -> None:
    """Of what the constructor computed, leave the recorded entries; for a model that is built and has its weights.

    Raises:
        FileError: the record does not fit.
    """
    record = getattr(config, RECORD, None) or {}
    try:
        for name, indices in record.get("buffers", {}).items():
            path, _, key = name.rpartition(".")
            buffer = model.get_buffer(name)
            places = torch.tensor([int(i) for i in indices], device=buffer.device)
            model.get_submodule(path)._buffers[key] = buffer.index_select(0, places)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise _damaged(model, error) from error


def recorded_class(model_class: Any, config: Any) -> Any:
    """The class to build a model by: the one given, or one that gives its layers the sizes in the configuration.

    What it builds is of the class given.
    """
    record = getattr(config, RECORD, None)
    if record is None:
        return model_class

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        _resize(self, record)
        self.__class__ = model_class

    # Named like it, as the library looks up by the name what is particular to a class.
    fields = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), fields)


def _resize(model: nn.Module, record: Any) -> None:
    """Give tensors the recorded sizes, and modules the recorded numbers."""
    try:
        for name, shape in record["shapes"].items():
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            tensor = module.get_parameter(key) if key in module._parameters else module.get_buffer(key)
            part = tensor.detach()[tuple(slice(int(size)) for size in shape)].clone()
            if list(part.shape) != shape:
                raise ValueError(f"{name} has {tuple(tensor.shape)}, which holds no {shape}")
            if key in module._buffers:
                module._buffers[key] = part
            else:
                module._parameters[key] = nn.Parameter(part, requires_grad=tensor.requires_grad)
        for path, values in record["attributes"].items():
            module = model.get_submodule(path)
            for name, value in values.items():
                if not (_is_plain(value) and _is_plain(getattr(module, name, None))):
                    raise TypeError(f"{path}.{name} is to become {value!r:.80}")
                setattr(module, name, tuple(value) if isinstance(getattr(module, name), tuple) else value)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(model, error) from error


def _damaged(model: nn.Module, error: Exception) -> FileError:
    return FileError(f"the config.json of this {type(model).__name__} is damaged: its {RECORD} does not fit ({error})")
