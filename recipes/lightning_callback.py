"""Allocation in a Lightning training: the network is made smaller before Lightning wraps and trains it."""

from __future__ import annotations

import functools
import weakref
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
        InputError: the module has no such network; `choose` gives no result; a checkpoint holds no choice, or another
            one where a strategy restores too late for it; the optimisers are of other parameters.
    """

    def __init__(self, choose: Callable[[nn.Module], allocator.Result], network: str = "model") -> None:
        self.choose, self.network = choose, network
        self.allocation: allocator.Allocation | None = None
        self._small: nn.Module | None = None
        self._replaced: list[weakref.ref[nn.Parameter]] = []

    @property
    def state_key(self) -> str:
        """Where a checkpoint holds the choice: one place per network."""
        return "Allocate" if self.network == "model" else f"Allocate {self.network}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the smaller network in its place; which one a checkpoint holds is known when it is read, right after."""
        found: Any = getattr(pl_module, self.network, None)
        if not isinstance(found, nn.Module):
            kind = type(pl_module).__name__
            raise allocator.InputError(f"{kind} has no network {self.network!r}: say network=, its attribute")
        if found is self._small:
            return
        self.allocation = None
        own = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._restored(trainer, pl_module, found, checkpoint)
            own(checkpoint)

        vars(pl_module)["on_load_checkpoint"] = on_load_checkpoint  # the one hook before weights are filled in
        if stage == "fit":
            result: Any = self.choose(found)
            if not isinstance(result, allocator.Result):
                kind = type(result).__name__
                raise allocator.InputError(f"choose gave {kind}: it has to give what allocator.allocate returns")
            self._put(pl_module, found, result.allocation, result.model)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what is trained against what was put in its place, and log what was kept."""
        if self.allocation is None or self._small is None:
            return
        trained = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        replaced = {id(p) for p in (reference() for reference in self._replaced) if p is not None}
        if getattr(pl_module, self.network) is not self._small or not trained.isdisjoint(replaced):
            raise allocator.InputError(
                f"{self.network!r} is not trained as it was made: make the network in __init__, not in "
                "configure_model, and its optimisers in configure_optimizers"
            )
        shares = {f"share/{name}": share for name, share in self.allocation.shares().items()}
        for logger in trainer.loggers:
            logger.log_metrics(shares, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's own hook."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the choice, as JSON."""
        return {} if self.allocation is None else {"allocation": self.allocation.to_json()}

    def _restored(
        self, trainer: Trainer, pl_module: LightningModule, network: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Take the choice of a checkpoint."""
        text = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("allocation")
        if text is None:
            if self.allocation is None:
                return
            raise allocator.InputError(
                "the checkpoint holds no choice of this callback: load its weights into the network first, and start "
                "without ckpt_path"
            )
        if self.allocation is not None and self.allocation.to_json() == text:
            return
        if trainer.strategy.restore_checkpoint_after_setup and self.allocation is not None:
            raise allocator.InputError(
                "the checkpoint holds another choice, and this strategy reads it after optimisers were made: let "
                "choose give the same"
            )
        saved = allocator.Allocation.from_json(text)
        self._put(pl_module, network, saved, allocator.apply(network, saved))

    def _put(
        self, pl_module: LightningModule, found: nn.Module, allocation: allocator.Allocation, small: nn.Module
    ) -> None:
        self.allocation, self._small = allocation, small.train(found.training)
        self._replaced = [weakref.ref(parameter) for parameter in found.parameters()]
        setattr(pl_module, self.network, self._small)


@functools.cache
def _callback() -> type:
    fields = {"__module__": __name__, "__doc__": _AllocatesFirst.__doc__}
    return type("Allocate", (_AllocatesFirst, library("lightning").Callback), fields)


def __getattr__(name: str) -> Any:
    # Made when it is asked for, so that nothing of this package imports the library before somebody uses it.
    if name == "Allocate":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
