"""One pass over the caller's data that gathers all that the criteria asked for need to know of them."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.clock import Progress, bar
from allocator.errors import CriterionError, DataError, first_line
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.lent import left_alone
from allocator.modules import set_training, skeleton, tensor_names
from allocator.scoring import ranks
from allocator.scoring.answers import Answer, Loss, loss_of
from allocator.scoring.batches import Batch, batches, outputs_of
from allocator.scoring.curvature import Curvature, Dim
from allocator.torch_private import TorchDispatchMode
from allocator.tracing.isolation import undisturbed
from allocator.tracing.operators import operator_of

GRADIENTS, MOMENTS, COVARIANCES, CURVATURE = "gradients", "moments", "covariances", "curvature"
CHUNK = 8
"""Samples per gradient: few enough that they don't average out, many enough to be quick."""
MOST_CHUNKS = 64
"""Gradients that are kept, of all ranks; more data than these take are not looked at."""


@dataclass
class Moments:
    """Sums over everything that was read along one dim of a weight.

    Attributes:
        count: how many vectors.
        total: (n,) their sum.
        squares: (n,) or (n, n) the sum of their squares, or of their outer products.
    """

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, vectors: torch.Tensor, *, products: bool) -> None:
        """Add (m, n) vectors."""
        wide = vectors.detach().to(torch.float64)
        squares = wide.T @ wide if products else wide.square().sum(0)
        if self.count == 0:
            self.total, self.squares = np.zeros(wide.shape[1]), np.zeros(tuple(squares.shape))
        self.count += wide.shape[0]
        self.total = self.total + wide.sum(0).cpu().numpy()
        self.squares = self.squares + squares.cpu().numpy()

    @classmethod
    def together(cls, parts: Sequence[Moments]) -> Moments:
        """The sums of several."""
        found = cls(sum(each.count for each in parts), parts[0].total, parts[0].squares)
        for each in parts[1:]:
            found.total, found.squares = found.total + each.total, found.squares + each.squares
        return found

    @property
    def variance(self) -> np.ndarray:
        """(n,) of each index."""
        squares = self.squares if self.squares.ndim == 1 else np.diag(self.squares)
        return np.maximum(squares / self.count - (self.total / self.count) ** 2, 0.0)


@dataclass
class Statistics:
    """What one pass over the data found.

    Attributes:
        samples: how many were looked at.
        read: (gradients, neurons) per small batch, what the loss would change by, to first order, if the weights that
            read a neuron were zero; of one that no weight reads, those that write it.
        written: (gradients, neurons) the same for the weights that write and scale it.
        moments: per dim of a weight along which activations are read, their moments.
        curvatures: for the same, (outputs, outputs) mean over the samples of the outer products of the gradients of
            what the weight gives, summed over positions; of answers that are drawn.
    """

    samples: int = 0
    read: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    written: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    moments: dict[Dim, Moments] = field(default_factory=dict)
    curvatures: dict[Dim, np.ndarray] = field(default_factory=dict)


def collect(
    graph: ChannelGraph,
    data: Any,
    needs: Collection[str],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    """Run the model over the data in eval mode.

    Under `torch.distributed` every rank looks at its own share of the data, and all get the statistics of the whole:
    those that one process would get that looks at all of it, in batches of the same samples.

    Args:
        graph: the model's neurons; the model itself is not changed.
        data: as for `batches`.
        needs: any of "gradients", "moments", "covariances" and "curvature".
        loss: as for `loss_of`.
        seed: of the noise that stands in for answers that are no classes.
        progress: called with how far it is.

    Raises:
        DataError: the data are empty, do not fit the model, or the loss is not a finite scalar; or so on another rank.
        CriterionError: the gradient cannot be taken.
    """
    if not graph.size:
        return Statistics()
    named = f"the loss {getattr(loss, '__name__', type(loss).__name__)!r}"
    guard = contextlib.nullcontext() if loss is None else left_alone(graph, named, DataError)
    with undisturbed(graph.model), guard:
        return _together(ranks.gathered(lambda: _own_share(graph, data, needs, loss, seed, progress)))


def _own_share(
    graph: ChannelGraph, data: Any, needs: Collection[str], loss: Loss | None, seed: int, progress: Progress | None
) -> Statistics:
    """What this process's data say."""
    shadow = set_training(skeleton(graph.model, _shared(graph)), False)
    found = Statistics()
    gradients = _Gradients(graph, shadow) if GRADIENTS in needs else None
    watched = {MOMENTS, COVARIANCES, CURVATURE} & set(needs)
    reader = _Readers(graph, shadow, found.moments, products=COVARIANCES in needs) if watched else None
    curvature = Curvature(tensor_names(shadow)) if CURVATURE in needs else None
    look = _Look(shadow, loss, seed, gradients, reader, curvature)
    looked = 0
    most = -(-MOST_CHUNKS // ranks.count())
    with bar("looking at the data", progress) as advance, gradients or contextlib.nullcontext():
        for batch in batches(data, graph.model, graph.inputs):
            for chunk in _few_at_a_time(batch, loss):
                look(chunk)
                found.samples, looked = found.samples + chunk.size, looked + 1
                advance(f"{found.samples} samples")
            if (gradients is not None or curvature is not None) and looked >= most:
                break
    if curvature is not None:
        found.curvatures = {dim: total / max(found.samples, 1) for dim, total in curvature.sums.items()}
    if gradients is not None:
        found.read, found.written = np.array(gradients.read), np.array(gradients.written)
    for (name, _), moments in found.moments.items():
        if not np.isfinite(moments.squares).all():
            raise DataError(f"what {name} reads is not finite: check the data, and the model's weights")
    return found


def _together(found: Sequence[Statistics]) -> Statistics:
    """The ranks' statistics as one, gradients in an order that does not depend on who took them."""
    read, written = (np.concatenate([getattr(each, rows) for each in found]) for rows in ("read", "written"))
    order = sorted(range(len(read)), key=lambda row: read[row].tobytes())
    dims = dict.fromkeys(dim for each in found for dim in each.moments)
    moments = {dim: Moments.together([each.moments[dim] for each in found if dim in each.moments]) for dim in dims}
    samples = sum(each.samples for each in found)
    bent = dict.fromkeys(dim for each in found for dim in each.curvatures)
    curvatures = {
        dim: np.sum([each.curvatures[dim] * each.samples for each in found if dim in each.curvatures], 0) / samples
        for dim in bent
    }
    return Statistics(samples, read[order], written[order], moments, curvatures)


def _noise(batch: Batch, seed: int) -> torch.Generator:
    """Noise that is the same for the same samples, whichever process looks at them and when."""
    number = seed
    for tensor in batch.inputs.tensors():
        flat = tensor.detach().cpu().contiguous().flatten()
        number = zlib.crc32(flat.view(torch.uint8).numpy().data, number)
    return torch.Generator().manual_seed(number)


def with_gradients(
    graph: ChannelGraph, data: Any, *, loss: Loss | None = None, seed: int = 0, progress: Progress | None = None
) -> nn.Module:
    """A copy of the model that shares its weights and holds the gradients of the loss, summed over the data.

    Under `torch.distributed`, over the data of all ranks.
    """
    shadow = set_training(skeleton(graph.model, _shared(graph, own=loss is not None)), False)

    def look() -> None:
        with bar("looking at the data", progress) as advance, torch.enable_grad():
            for batch in batches(data, graph.model, graph.inputs):
                for chunk in _few_at_a_time(batch, loss):
                    value = loss_of(outputs_of(shadow, chunk.inputs), chunk, loss, _noise(chunk, seed))
                    _check_gradient(value)
                    _backward(value, shadow)
                advance("gradients")

    with undisturbed(graph.model):
        ranks.gathered(look)
    if ranks.count() > 1:
        for parameter in shadow.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                ranks.add_up(parameter.grad)
    return shadow


def _check_gradient(loss: torch.Tensor) -> None:
    if not loss.requires_grad:
        raise DataError(
            "the loss has no gradient: the model's output, or the loss, was detached from the weights (.detach(), "
            ".data, torch.no_grad()), or does not depend on them"
        )


def _backward(loss: torch.Tensor, shadow: nn.Module, *, again: bool = False) -> None:
    """Gradients of the copy alone: a loss may have weights of its own, or look at the model's."""
    learning = [parameter for parameter in shadow.parameters() if parameter.requires_grad]
    try:
        loss.backward(inputs=learning, retain_graph=again)
    except RuntimeError as error:
        raise CriterionError(
            f"the gradient of the loss could not be taken: {first_line(error)}; a criterion of weights alone, such as "
            "group_norm, needs none"
        ) from error


def _few_at_a_time(batch: Batch, loss: Loss | None) -> Iterator[Batch]:
    """With what came with the samples only where it is asked for, since it may not part."""
    return (Batch(batch.inputs) if loss is None else batch).chunks(CHUNK)


def _shared(graph: ChannelGraph, *, own: bool = False) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Makes parameters that share the original's memory, so that no gradient reaches it; what is written is copied.

    With `own` all are copied, as for a loss of the caller's, which may reach them.
    """
    written = graph.written()

    def share(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter):
            learns = tensor.is_floating_point() or tensor.is_complex()
            copied = tensor.detach().clone() if own or name in written else tensor.detach()
            return nn.Parameter(copied, requires_grad=learns)
        return tensor.detach().clone()

    return share


@dataclass
class _Look:
    """One forward, and a backward where gradients are asked for.

    Attributes:
        shadow: a copy of the model.
        loss, seed: as for `collect`.
        gradients, reader, curvature: what takes note; None where it is not asked for.
    """

    shadow: nn.Module
    loss: Loss | None
    seed: int
    gradients: _Gradients | None
    reader: _Readers | None
    curvature: Curvature | None

    def __call__(self, batch: Batch) -> None:
        """At these samples."""
        with contextlib.ExitStack() as stack:
            if self.reader is not None:
                stack.enter_context(self.reader)
            learns = self.gradients is not None or self.curvature is not None
            stack.enter_context(torch.set_grad_enabled(learns))
            output = outputs_of(self.shadow, batch.inputs)
        if self.gradients is not None:
            value = self._loss(output, batch, "shaken")
            if not value.requires_grad:  # of none of the weights that hold neurons, which no call may read
                _check_that_any_weight_counts(self.shadow, batch, self.loss, self.seed)
            self.gradients.add(value, again=self.curvature is not None)
        if self.curvature is not None and self.reader is not None:
            value = self._loss(output, batch, "drawn")
            if value.requires_grad:
                self.curvature.add(value, self.reader.moments, batch.size)

    def _loss(self, output: Any, batch: Batch, answer: Answer) -> torch.Tensor:
        with torch.enable_grad():
            return loss_of(output, batch, self.loss, _noise(batch, self.seed), answer)


def _check_that_any_weight_counts(shadow: nn.Module, batch: Batch, loss: Loss | None, seed: int) -> None:
    """Raise DataError where the loss has no gradient by any weight, as of an output that was detached."""
    frozen = [p for p in shadow.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        value = loss_of(outputs_of(shadow, batch.inputs), batch, loss, _noise(batch, seed))
    for parameter in frozen:
        parameter.requires_grad_(False)
    _check_gradient(value)


class _Gradients:
    """What every neuron's weights, each times its gradient, add up to; one row per backward.

    A parameter's gradient is used and dropped as soon as it is there, so that never all of them are held. As a context,
    it lets go of the parameters at the end: torch would keep them, and with them the original's memory, for good.
    """

    def __init__(self, graph: ChannelGraph, shadow: nn.Module) -> None:
        self.graph, self.shadow = graph, shadow
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        reads = np.zeros(graph.slots.total, dtype=bool)
        for label in graph.facts.read:
            reads[label] = True
        free = graph.unit_of_slot >= 0
        self.has_reader = np.zeros(graph.size, dtype=bool)
        self.has_reader[graph.unit_of_slot[reads & free]] = True
        self._hooks = contextlib.ExitStack()
        for name, tensor in tensor_names(shadow).items():
            if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad:
                continue
            dims = []
            for dim, label in enumerate(graph.slots.labels(name)):
                chosen = free[label]
                if chosen.any():
                    dims.append((dim, graph.unit_of_slot[label[chosen]], chosen, reads[label[chosen]]))
            if dims:
                hook = tensor.register_post_accumulate_grad_hook(lambda p, dims=dims: self._take(p, dims))
                self._hooks.callback(hook.remove)
            else:
                tensor.requires_grad_(False)
        self._rows = self._empty()

    def __enter__(self) -> _Gradients:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _empty(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.graph.size), np.zeros(self.graph.size)

    def _take(self, parameter: torch.Tensor, dims: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        assert parameter.grad is not None
        products = parameter.detach().float() * parameter.grad.float()
        parameter.grad = None
        for dim, units, chosen, reads in dims:
            others = [d for d in range(products.dim()) if d != dim]
            along = (products.sum(others) if others else products).double().cpu().numpy()[chosen]
            np.add.at(self._rows[0], units[reads], along[reads])
            np.add.at(self._rows[1], units[~reads], along[~reads])

    def add(self, loss: torch.Tensor, *, again: bool = False) -> None:
        """One backward, and whether another follows; zeros where the loss depends on no weight that holds a neuron."""
        self._rows = self._empty()
        if loss.requires_grad:
            _backward(loss, self.shadow, again=again)
        read, written = self._rows
        if not (np.isfinite(read).all() and np.isfinite(written).all()):
            raise DataError("a gradient of the loss is not finite: check the data, and the model's weights")
        self.read.append(np.where(self.has_reader, read, written))
        self.written.append(written)


class _Readers(TorchDispatchMode):
    """Takes the moments of what every weight reads, at the call that multiplies them."""

    def __init__(self, graph: ChannelGraph, shadow: nn.Module, moments: dict[Dim, Moments], *, products: bool) -> None:
        super().__init__()
        self.moments, self.products = moments, products
        self.names: dict[int, str] = {}
        free = graph.unit_of_slot >= 0
        for name, tensor in tensor_names(shadow).items():
            if isinstance(tensor, nn.Parameter) and any(free[label].any() for label in graph.slots.labels(name)):
                self.names[id(tensor)] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        declared = operator_of(func).declared
        if declared.read_dim is not None:
            tensors = [item for item in args if isinstance(item, torch.Tensor)]
            x, weight = (tensors[place] for place in declared.multiplies)
            found = self._weight(weight, declared.read_dim)
            if found is not None and declared.window is None:
                self._add(found, x.detach().reshape(-1, x.shape[-1]))
            elif found is not None:
                name, dim = found[0], 1 - found[1] if _transposed(func, args) else found[1]
                if weight.shape[dim] == x.shape[1]:  # else its groups read apart
                    self._add((name, dim), x.detach().transpose(0, 1).flatten(1).T)
        return func(*args, **(kwargs or {}))

    def _weight(self, weight: torch.Tensor, dim: int) -> Dim | None:
        """The parameter that this is, and the dim of it that is read; a linear layer's comes transposed."""
        name = self.names.get(id(weight))
        if name is not None:
            return name, dim
        base = weight._base
        name = None if base is None else self.names.get(id(base))
        if name is None or base is None or base.dim() != 2 or weight.stride() != base.stride()[::-1]:
            return None
        return name, 1 - dim

    def _add(self, dim: Dim, vectors: torch.Tensor) -> None:
        self.moments.setdefault(dim, Moments()).add(vectors, products=self.products)


def _transposed(func: Any, args: Any) -> bool:
    """Whether a convolution's weight has its inputs first."""
    position, default = operator_of(func).arguments.get("transposed", (len(args), False))
    return bool(args[position] if position < len(args) else default)
