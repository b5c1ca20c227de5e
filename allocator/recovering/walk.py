"""A forward that waits at every layer that reads, so that many inputs and two networks can be led through together.

Every forward runs in a thread of its own, and only one of them at a time: whoever leads says when it goes on, and sees
what the layer is about to read, or what it gave. So each layer is run once however many there are, and all that is held
of an input is what its forward holds at that layer; while others go on, that may lie elsewhere.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import allocator.operators  # noqa: F401  (declares the operators)
from allocator.modules import tensor_names
from allocator.recovering.holdings import Holdings
from allocator.recovering.shelf import Shelf
from allocator.scoring.batches import outputs_of
from allocator.torch_private import TorchDispatchMode
from allocator.tracing.inputs import Inputs
from allocator.tracing.operators import Operator, operator_of


@dataclass
class Stop:
    """A call that a forward waits at.

    Attributes:
        weight: name of the parameter that it multiplies by.
        x: what it multiplies: (N, C, ...) for what slides over pixels, else (rows, C).
        matrix: the weight as the call sees it.
        turned: whether that is the parameter's transpose, as a linear layer's is.
        operator: what is known of the call.
        args: as called.
        run: does it again.
        result: what it gave, while the forward waits after it.
        sizes: of that, once it is there.
        version: of `x`, which tells whether it was written to since.
        meeting: where its result is added to another, once the forward waits there; None before.
    """

    weight: str
    x: torch.Tensor
    matrix: torch.Tensor
    turned: bool
    operator: Operator
    args: tuple[Any, ...]
    run: Callable[[], torch.Tensor]
    result: torch.Tensor | None = None
    sizes: tuple[int, ...] = ()
    version: int = 0
    meeting: Meeting | None = None

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema, or its default."""
        position, default = self.operator.arguments.get(name, (len(self.args), None))
        return self.args[position] if position < len(self.args) else default


@dataclass
class Meeting:
    """A sum that a forward waits at: what came of a layer, what it is added to, and the sum once it is there."""

    own: torch.Tensor
    other: torch.Tensor
    result: torch.Tensor | None = None


class Walk:
    """One forward, from layer to layer.

    Args:
        model: in eval mode.
        inputs: of this forward.
        watched: names of the weights to wait at, before the layer runs; and whether at the sum that follows too.
        after: wait once more after the layer ran.
        shelf: where what it holds may lie; None for one of its own, in memory.

    Attributes:
        output: what the forward gave, once it is at its end.
        stop: where it waits; None before the first layer and at the end.
        holdings: what it made and holds.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, watched: Mapping[str, bool], *, after: bool, shelf: Shelf | None = None
    ) -> None:
        self.output: Any = None
        self.stop: Stop | None = None
        self.holdings = Holdings(Shelf(sys.maxsize) if shelf is None else shelf)
        self._error: Exception | None = None
        self._abandoned = self._ended = False
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()  # a new thread has none of the caller's variables
        run = (self._run, model, inputs, watched, after)
        self._thread = threading.Thread(target=context.run, args=run, daemon=True)
        self._thread.start()

    def advance(self) -> Stop | None:
        """Go on to where it waits next; None at the end, when `output` is there.

        Raises:
            DataError: the model raised.
        """
        self.stop = None
        if not self._ended:  # its thread may be alive for a while after its last word
            self._go.release()
            self._came.acquire()
        if self._error is not None:
            raise self._error
        return self.stop

    def close(self) -> None:
        """End the thread, wherever it is, and let go what the forward holds."""
        self._abandoned = True
        self._go.release()
        self._thread.join()
        self.stop = self.output = None

    def _run(self, model: nn.Module, inputs: Inputs, watched: Mapping[str, bool], after: bool) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad(), _Contiguous(), _Stopping(model, watched, after, self):
                    self.output = outputs_of(model, inputs)
        except _Abandoned:
            pass
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._came.release()

    def wait(self, stop: Stop) -> None:
        """Wait there, in the forward's own thread."""
        self.stop = stop
        self._came.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """End the forward where nobody leads it any more: what it holds may be elsewhere."""
        if self._abandoned:
            raise _Abandoned


class _Abandoned(BaseException):
    """Ends a forward that nobody leads any more; no `except Exception` of a model catches it."""


class _Contiguous(TorchFunctionMode):
    """Linear layers get contiguous inputs, of which torch always makes one matrix product with their bias."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class _Stopping(TorchDispatchMode):
    """Waits at the calls that multiply by a watched parameter, and at the sums that what they gave goes into."""

    def __init__(self, model: nn.Module, watched: Mapping[str, bool], after: bool, walk: Walk) -> None:
        super().__init__()
        self.watched, self.after, self.walk = watched, after, walk
        self.names = {id(tensor): name for name, tensor in tensor_names(model).items() if name in watched}
        self.awaited: dict[int, tuple[Stop, torch.Tensor]] = {}  # by what is on its way to a sum, which is kept alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.walk.check()
        operator = operator_of(func)

        def run() -> Any:
            given = self.walk.holdings.before((args, kwargs))
            result = func(*args, **(kwargs or {}))
            self.walk.holdings.after(given, result, writes=operator.writes)
            return result

        if operator.declared.read_dim is not None:
            stop = self._stop(operator, args, run)
            if stop is not None:
                return self._pass(stop)
        tensors = [item for item in args if isinstance(item, torch.Tensor)] if self.awaited else []
        found = next((self.awaited.pop(id(tensor)) for tensor in tensors if id(tensor) in self.awaited), None)
        if found is None:
            return run()
        stop, own = found
        if len(tensors) == 2 and operator.pointwise:
            return self._meet(stop, own, tensors, run)
        result = run()  # a batch norm, or a view
        onward = result[0] if isinstance(result, (tuple, list)) else result
        self.awaited[id(onward)] = stop, onward
        return result

    def _pass(self, stop: Stop) -> torch.Tensor:
        """Wait at a layer, and run it."""
        self.walk.wait(stop)
        result = stop.result = stop.run()
        stop.sizes = tuple(result.shape)
        if self.after:
            self.walk.wait(stop)
        if self.watched[stop.weight]:
            self.awaited[id(result)] = stop, result
        stop.result = None
        return result

    def _meet(self, stop: Stop, own: torch.Tensor, tensors: list[torch.Tensor], run: Callable[[], Any]) -> Any:
        """Wait at a sum, and make it."""
        (other,) = [tensor for tensor in tensors if tensor is not own] or [own]
        stop.meeting = Meeting(own, other)
        self.walk.wait(stop)
        result = stop.meeting.result = run()
        if self.after:
            self.walk.wait(stop)
        stop.meeting = None
        return result

    def _stop(self, operator: Operator, args: tuple[Any, ...], run: Callable[[], torch.Tensor]) -> Stop | None:
        tensors = [item for item in args if isinstance(item, torch.Tensor)]
        if max(operator.declared.multiplies) >= len(tensors):
            return None
        x, matrix = (tensors[place] for place in operator.declared.multiplies)
        name, base = self.names.get(id(matrix)), matrix._base
        turned = name is None and base is not None and base.dim() == 2 and matrix.stride() == base.stride()[::-1]
        if turned and base is not None:
            name = self.names.get(id(base))
        return None if name is None else Stop(name, x, matrix, turned, operator, args, run, version=x._version)
