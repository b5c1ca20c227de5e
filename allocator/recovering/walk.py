"""A forward that waits at every layer that reads, so that many inputs and two networks can be led through together.

Every forward runs in a thread of its own, and only one of them at a time: whoever leads says when it goes on, and sees
what the layer is about to read, or what it gave. So each layer is run once however many there are, and all that is held
of an input is what its forward holds at that layer.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from allocator.errors import DataError
from allocator.modules import tensor_names
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
        result: what it gave; None before it ran.
    """

    weight: str
    x: torch.Tensor
    matrix: torch.Tensor
    turned: bool
    operator: Operator
    args: tuple[Any, ...]
    result: torch.Tensor | None = None

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema, or its default."""
        position, default = self.operator.arguments.get(name, (len(self.args), None))
        return self.args[position] if position < len(self.args) else default


class Walk:
    """One forward, from layer to layer.

    Args:
        model: in eval mode.
        inputs: of this forward.
        watched: names of the weights to wait at.
        after: wait after the layer ran, else before.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, watched: Collection[str], *, after: bool) -> None:
        self.output: Any = None
        self._stop: Stop | None = None
        self._error: Exception | None = None
        self._abandoned = False
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, inputs, set(watched), after), daemon=True)
        self._thread.start()

    def advance(self) -> Stop | None:
        """Go on to the next layer; None at the end, when `output` is there.

        Raises:
            DataError: the model raised.
        """
        self._stop = None
        if self._thread.is_alive():
            self._go.release()
            self._came.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._abandoned = True
        self._go.release()
        self._thread.join()

    def _run(self, model: nn.Module, inputs: Inputs, watched: set[str], after: bool) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad(), _Contiguous(), _Stopping(model, watched, after, self._wait):
                    self.output = model(*inputs.args, **inputs.kwargs)
        except _Abandoned:
            pass
        except Exception as error:
            said = f"the model raised {type(error).__name__} on {inputs.describe()} from the data: {error!s:.300}"
            self._error = DataError(said)
            self._error.__cause__ = error
        finally:
            self._came.release()

    def _wait(self, stop: Stop) -> None:
        self._stop = stop
        self._came.release()
        self._go.acquire()
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
    """Waits at the calls that multiply by a watched parameter."""

    def __init__(self, model: nn.Module, watched: set[str], after: bool, wait: Any) -> None:
        super().__init__()
        self.after, self.wait = after, wait
        self.names = {id(tensor): name for name, tensor in tensor_names(model).items() if name in watched}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = operator_of(func)
        stop = None if operator.declared.read_dim is None else self._stop(operator, args)
        if stop is not None and not self.after:
            self.wait(stop)
        result = func(*args, **(kwargs or {}))
        if stop is not None and self.after:
            stop.result = result
            self.wait(stop)
        return result

    def _stop(self, operator: Operator, args: tuple[Any, ...]) -> Stop | None:
        tensors = [item for item in args if isinstance(item, torch.Tensor)]
        if max(operator.declared.multiplies) >= len(tensors):
            return None
        x, matrix = (tensors[place] for place in operator.declared.multiplies)
        name, base = self.names.get(id(matrix)), matrix._base
        turned = name is None and base is not None and base.dim() == 2 and matrix.stride() == base.stride()[::-1]
        if turned and base is not None:
            name = self.names.get(id(base))
        return None if name is None else Stop(name, x, matrix, turned, operator, args)
