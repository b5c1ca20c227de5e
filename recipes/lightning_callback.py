"""Allocation in a Lightning training: the network is made smaller before Lightning wraps and trains it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

import allocator
from allocator.adapters.library import library

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class _AllocatesFirst:
    """Make a network smaller once, before its first training step, and keep it so in every checkpoint.

    The network is put in its place before optimisers are made and before processes are joined, so that every strategy
    sees the smaller one alone. Every process chooses; with `data=` they put together what they found, and without, all
    have to hold the same weights (`lightning.seed_everything`, or weights from a file). A run that goes on from a
    checkpoint, and `validate`, `test` or `predict` with one, take the choice that it holds. The shares of channels
    kept go to every logger of the trainer, as `share/BLOCK/BRANCH`.

    Args:
        choose: called with the network, gives a result, as in
            `lambda network: allocator.allocate(network, "60%", data=loader)`.
        network: the attribute of the LightningModule that holds it.

    Raises:
        InputError: the module has no such network.
    """

    def __init__(self, choose: Callable[[nn.Module], allocator.Result], network: str = "model") -> None:
        self.choose, self.network = choose, network
        self.allocation: allocator.Allocation | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the smaller network in its place."""
        if self.allocation is not None:
            return
        found: Any = getattr(pl_module, self.network, None)
        if not isinstance(found, nn.Module):
            kind = type(pl_module).__name__
            raise allocator.InputError(f"{kind} has no network {self.network!r}: say network=, its attribute")
        saved = self._of_checkpoint(trainer)
        if saved is not None:
            self.allocation, small = saved, allocator.apply(found, saved)
        elif stage == "fit":
            result = self.choose(found)
            self.allocation, small = result.allocation, result.model
        else:
            return
        setattr(pl_module, self.network, small.train(found.training))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was kept."""
        if self.allocation is not None:
            shares = {f"share/{name}": share for name, share in self.allocation.shares().items()}
            for logger in trainer.loggers:
                logger.log_metrics(shares, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the choice, as JSON."""
        return {} if self.allocation is None else {"allocation": self.allocation.to_json()}

    def _of_checkpoint(self, trainer: Trainer) -> allocator.Allocation | None:
        if trainer.ckpt_path is None:
            return None
        checkpoint = trainer.strategy.load_checkpoint(trainer.ckpt_path)
        own = checkpoint.get("callbacks", {}).get(self.state_key, {})  # type: ignore[attr-defined]
        text = own.get("allocation")
        return None if text is None else allocator.Allocation.from_json(text)


@functools.cache
def _callback() -> type:
    fields = {"__module__": __name__, "__doc__": _AllocatesFirst.__doc__}
    return type("Allocate", (_AllocatesFirst, library("lightning").Callback), fields)


def __getattr__(name: str) -> Any:
    # Made when it is asked for, so that nothing of this package imports the library before somebody uses it.
    if name == "Allocate":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
