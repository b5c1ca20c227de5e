"""What a recovery did, as data that goes with the model and into its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from allocator.errors import FileError
from allocator.rewriting.lineage import RECOVERY_ATTRIBUTE


@dataclass(frozen=True)
class Layer:
    """One layer that reads.

    Attributes:
        name: of its weight.
        before, after: squared error of what it gives on held-back inputs, as a share of the spread of what the
            original's gives; None where it could not be measured.
        rows: positions that it was fitted to.
        strength: of the ridge, as a share of the mean variance of what it reads; None where only its offset moved, or
            nothing.
        step: how far it went from the old weights to the new.
        note: what is to be said of it.
    """

    name: str
    before: float | None
    after: float | None
    rows: int = 0
    strength: float | None = None
    step: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        method: that made the network: "least_squares", "batch_norm", "fold", "distil", two of them joined by " + ", or
            "none" where none was better than the network as it was cut.
        inputs: how many it was fitted to.
        held: how many more were held back to judge by.
        before, after: how far the outputs are from the original's on the inputs held back; see `allocator.recover`.
        tried: the same for everything that was tried, by method.
        layers: the layers that least squares met, first to last.
        left: by name the weights that read dropped neurons and could not be refitted, with the reason.
        tensors: names of what was changed, by recoveries before this one too.
    """

    method: str
    inputs: int
    held: int
    before: float
    after: float
    tried: dict[str, float] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "tensors": list(self.tensors)}

    @classmethod
    def from_dict(cls, data: Any) -> Recovery:
        """Read what `to_dict` gave.

        Raises:
            FileError: it is something else.
        """
        try:
            layers = tuple(Layer(**layer) for layer in data["layers"])
            recovery = cls(**{**data, "layers": layers, "tensors": tuple(data["tensors"])})
        except (TypeError, KeyError) as error:
            raise FileError(f"this is no record of a recovery: {error!s:.200}") from error
        plain = isinstance(recovery.inputs, int) and all(isinstance(name, str) for name in recovery.tensors)
        if not plain:
            raise FileError("this is no record of a recovery: its inputs are no number, or its tensors no names")
        return recovery

    def __str__(self) -> str:
        if self.method == "none":
            return f"nothing was better on {self.held} inputs held back than the network as it was cut"
        return (
            f"{self.method.replace('_', ' ')} on {self.inputs} inputs changed {len(self.tensors)} tensors; on "
            f"{self.held} held back the outputs are {self.after:.3g} from the original's, {self.before:.3g} before"
        )


def remember_recovery(model: nn.Module, recovery: Recovery) -> None:
    """Note on a model what was done to it."""
    setattr(model, RECOVERY_ATTRIBUTE, json.dumps(recovery.to_dict()))


def recovery_of(model: nn.Module) -> Recovery | None:
    """What was done to this model; None for one that was not refitted."""
    text = getattr(model, RECOVERY_ATTRIBUTE, None)
    return Recovery.from_dict(json.loads(text)) if isinstance(text, str) else None


def forget_recovery(model: nn.Module) -> None:
    """Take the note off a model whose weights have changed again since."""
    vars(model).pop(RECOVERY_ATTRIBUTE, None)
