"""Ultralytics' `YOLO` whose training keeps the widths of an allocated network.

The library's own trainers build the network anew from the YAML file that it was once made from, at full width, and take
over what still fits. These take the network as it is; where a data set has other classes, its last layers alone change.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from allocator.adapters.library import library
from allocator.errors import UnsupportedModelError

if TYPE_CHECKING:
    YOLO: Any

_ALLOCATED = "none: this network was allocated, train it as allocator.adapters.yolo.YOLO"


def note_allocated(network: nn.Module) -> None:
    """No size of the YAML's describes a network any more; whoever builds one from it is told so."""
    yaml: Any = getattr(network, "yaml", None)
    if isinstance(yaml, dict):
        yaml["scale"] = _ALLOCATED
        yaml.setdefault("scales", {"": []})


def is_allocated(network: Any) -> bool:
    """Whether this network, or a description of one, is of one that was allocated."""
    yaml = network if isinstance(network, dict) else getattr(network, "yaml", None)
    return isinstance(yaml, dict) and yaml.get("scale") == _ALLOCATED


# Trainers and the wrapper -----------------------------------------------------------------------------


class _KeepsWidths:
    """Of a trainer: an allocated network is trained as it is."""

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """A copy of `weights` where that was allocated, with the classes of the data; else what the trainer makes."""
        if weights is None and is_allocated(cfg):
            raise UnsupportedModelError(
                "pretrained=False builds the network from its YAML file, at full width: leave it out, or allocate the "
                'network with weights="reset" to train it from scratch'
            )
        if not is_allocated(weights):
            network: nn.Module = super().get_model(cfg, weights, verbose)  # type: ignore[misc]
            return network
        assert weights is not None
        return _fitted(weights, self.data, self.args)  # type: ignore[attr-defined]


@functools.cache
def keeping_widths(trainer: Any) -> Any:
    """A trainer class of Ultralytics', made to keep the widths of an allocated network: for ``train(trainer=...)``."""
    return trainer if issubclass(trainer, _KeepsWidths) else type(trainer.__name__, (_KeepsWidths, trainer), {})


class _TrainsAsItIs:
    """Of a wrapper: it trains with a trainer that keeps the widths of an allocated network."""

    def train(self, trainer: type | None = None, **kwargs: Any) -> Any:
        """Train, as `ultralytics.YOLO.train` does.

        Raises:
            UnsupportedModelError: the network was allocated, and would be built from its YAML file, or the data ask
                for other inputs or keypoints than it has.
        """
        trainer = trainer or self._smart_load("trainer")  # type: ignore[attr-defined]
        return super().train(keeping_widths(trainer), **kwargs)  # type: ignore[misc]

    def tune(self, *args: Any, **kwargs: Any) -> Any:
        """Search for settings, as `ultralytics.YOLO.tune` does.

        Raises:
            UnsupportedModelError: the network was allocated: the search trains in processes of its own, which build the
                network from its YAML file.
        """
        if is_allocated(self.model):  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                "tune trains in processes of its own, which build the network from its YAML file, at full width: tune "
                "the settings on the original, and train the allocated network with them"
            )
        return super().tune(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _training(wrapper: Any) -> Any:
    """A class of wrappers with that training; of `ultralytics.YOLO` it is this module's `YOLO`."""
    if issubclass(wrapper, _TrainsAsItIs):
        return wrapper
    return type(wrapper.__name__, (_TrainsAsItIs, wrapper), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    # Made when it is asked for, so that nothing of this package imports the library before somebody uses it.
    if name == "YOLO":
        return _training(library("ultralytics").YOLO)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def wrap(wrapper: nn.Module, network: nn.Module) -> nn.Module:
    """A wrapper like this one around another network, which trains it as it is; neither is changed."""
    given: Any = type(wrapper)
    kind = _training(given)
    small: nn.Module = kind.__new__(kind)
    fields = {name: copy.copy(value) for name, value in vars(wrapper).items()}
    # What was set up around the other network is set up anew when it is needed.
    fields.update(predictor=None, trainer=None, metrics=None)
    fields["callbacks"] = {event: list(functions) for event, functions in fields["callbacks"].items()}
    # With a checkpoint, the trainer is given the network in hand; what else stood in the original's is of the original.
    fields["ckpt"] = {"train_args": dict(fields["overrides"])}
    fields["_modules"] = {**fields["_modules"], "model": network}
    vars(small).update(fields)
    return small


# A network for other data -----------------------------------------------------------------------------


def _fitted(weights: nn.Module, data: Any, settings: Any) -> nn.Module:
    """A copy of an allocated network for these data.

    Args:
        weights: the network.
        data: the data set's description: classes, channels of its images, keypoints.
        settings: the training's.
    """
    network: Any = copy.deepcopy(weights).float()
    for name, asked in (("channels", data["channels"]), ("kpt_shape", data.get("kpt_shape"))):
        own = network.yaml.get(name, asked)
        if asked is not None and list(_listed(own)) != list(_listed(asked)):
            raise UnsupportedModelError(
                f"the data have {name} {asked}, the allocated network {own}: train the original on them, and "
                "allocate that"
            )
    if network.yaml["nc"] != data["nc"]:
        _change_classes(network, data["nc"])
        network.names = data["names"]
        network.load(weights)  # takes over the rows of classes that have the same name
    for module in network.modules():
        if isinstance(module, nn.Dropout) and getattr(settings, "dropout", None):
            module.p = settings.dropout
    return network.requires_grad_()


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _change_classes(network: Any, classes: int) -> None:
    """Give a network last layers for so many classes."""
    head = network.model[-1]
    network.yaml["nc"] = network.nc = classes
    if hasattr(head, "linear"):
        head.linear = nn.Linear(head.linear.in_features, classes)
        return
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.no += classes - head.nc
    head.nc = classes
    branches = [branch for name in ("cv3", "one2one_cv3") for branch in getattr(head, name, None) or ()]
    # YOLO26 learns its masks beside a map of classes.
    whole_image = getattr(getattr(head, "proto", None), "semseg", None)
    for branch in [*branches, *([] if whole_image is None else [whole_image])]:
        branch[-1] = nn.Conv2d(branch[-1].in_channels, classes, 1)
    head.bias_init()  # of the new layers; the boxes' are put back
    fitting = {name: tensor for name, tensor in head.state_dict().items() if tensor.shape == before[name].shape}
    with torch.no_grad():
        for name, tensor in fitting.items():
            tensor.copy_(before[name])
