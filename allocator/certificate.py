"""The certificate: proof that the rewritten model is the original minus the neurons that were dropped."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .errors import CertificateError
from .flow import FROZEN
from .graph import ChannelGraph, components, kept_of
from .inputs import Inputs, device_of
from .skeleton import skeleton, tensor_names
from .tracing import tensors_in

TOLERANCE = 1e-9
# Below this effect of the dropped neurons, agreement of the outputs to `TOLERANCE` shows little.
MEASURABLE = 1e-6
Rows = dict[str, list[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class Certificate:
    """What was checked, so that anyone can check it again.

    Attributes:
        structural: every call of the rewritten forward is the image of the original's, index by index.
        relative_error: largest difference of the two float64 outputs over the largest output, where the
            original has every weight that reads a dropped neuron set to zero; None if not measured.
        exact: whether the mathematics says that the two are equal; False where a norm over channels runs
            over dropped ones.
        seed: of the standard normal input.
        input_shapes: of the inputs.
        outputs: number of output tensors compared.
        weights: every parameter and buffer is, bit for bit, the slice of the original's that the allocation
            names; None if not compared. False for a model that was trained since.
        effect: how much the original's outputs change when the dropped neurons are cut, in the same measure
            as `relative_error`: what a mistake would have changed; None if not measured.
        drawn: the outputs were compared on weights drawn from the seed too, and `effect` is theirs: with the
            model's own, neurons do not reach the outputs (an untrained network whose signal dies away, or
            residual branches whose last scale is zero), so that their agreement would show little.
    """

    structural: bool
    relative_error: float | None
    exact: bool
    seed: int
    input_shapes: tuple[tuple[int, ...], ...]
    outputs: int
    weights: bool | None = None
    effect: float | None = None
    drawn: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check that was made passed."""
        if not self.structural or self.weights is False:
            return False
        return self.relative_error is None or not self.exact or self.relative_error <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "ok": self.ok, "tolerance": TOLERANCE}

    def __str__(self) -> str:
        if not self.structural:
            return "FAILED: an index, a call or a number of the forward is not the image of the original's"
        said = ["every index accounted for"]
        if self.weights is not None:
            said.append("weights the original's bit for bit" if self.weights else "weights NOT the original's")
        if self.relative_error is None:
            said.append("outputs not compared")
        else:
            nature = "" if self.exact else " (inexact by nature: a norm runs over dropped channels)"
            drawn = " on drawn weights too" if self.drawn else ""
            said.append(f"float64 outputs within {self.relative_error:.1e}{drawn}{nature}")
        return f"{'passed' if self.ok else 'FAILED'}: {', '.join(said)}"


@dataclass(frozen=True)
class Comparison:
    """Outputs of two models side by side, in float64.

    Attributes:
        error: largest difference over all outputs, relative to the largest original output; infinite where an
            output is missing, or finite in one model alone.
        effect: how much cutting the dropped neurons changes the original's outputs, in the same measure.
        outputs: number of output tensors compared.
        drawn: whether weights drawn from the seed were compared too; then `effect` is theirs.
    """

    error: float
    effect: float
    outputs: int
    drawn: bool = False


def names_and_shapes_match(graph: ChannelGraph, kept: np.ndarray, small: nn.Module) -> bool:
    """Whether a rewritten model has the tensors that the kept neurons call for, and no others."""
    indices = kept_of(graph, kept)
    found = tensor_names(small)
    empty = {name for name, dims in indices.items() if any(d is not None and not len(d) for d in dims)}
    gone = {name.rpartition(".")[0] for name in empty}
    for name, shape in graph.slots.shapes.items():
        dims = indices.get(name, [None] * len(shape))
        expected = tuple(n if d is None else len(d) for n, d in zip(shape, dims, strict=True))
        tensor = found.pop(name, None)
        if tensor is None and name.rpartition(".")[0] in gone:
            continue
        if tensor is None or tuple(tensor.shape) != expected:
            return False
    return not found


def weights_match(model: nn.Module, small: nn.Module, graph: ChannelGraph, kept: np.ndarray) -> bool:
    """Whether every tensor of the rewritten model is, bit for bit, the part of the original's that stays.

    The indices come from the graph's neurons, not from the allocation that the rewrite followed. One tensor
    is copied at a time.

    Args:
        model: the original network.
        small: the rewritten one; its names and shapes are taken as checked.
        graph: the original's neurons.
        kept: (neurons,) bool.
    """
    indices = kept_of(graph, kept)
    found = tensor_names(small)
    return all(
        _same_bits(_part(tensor.detach(), indices.get(name, ())), found[name].detach())
        for name, tensor in tensor_names(model).items()
        if name in found
    )


def _part(tensor: torch.Tensor, dims: Sequence[np.ndarray | None]) -> torch.Tensor:
    """The elements at the crossings of the indices of every dim; all of a dim where it has none."""
    for dim, indices in enumerate(dims):
        if indices is not None:
            tensor = tensor[(slice(None),) * dim + (torch.as_tensor(indices, device=tensor.device),)]
    return tensor


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells +0 from -0 and holds for NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size(), torch.uint8)
    flat_a, flat_b = (t.reshape(-1).contiguous().view(bits) for t in (a, b.to(a.device)))
    return torch.equal(flat_a, flat_b)


def compare_outputs(model: nn.Module, small: nn.Module, graph: ChannelGraph, kept: np.ndarray, seed: int) -> Comparison:
    """Compare the two models in float64 on one input drawn from the seed.

    Where neurons do not reach the outputs with the model's own weights, weights drawn from the seed are
    compared as well. A model that needs values is compared on its example inputs alone, since
    others may take another path.

    Args:
        model: the original; every weight that reads a dropped neuron counts as zero.
        small: the rewritten model.
        graph: the original's neurons.
        kept: (neurons,) bool.
        seed: of the input, and of the weights where they are drawn.
    """
    own = _compare(model, small, graph, kept, seed, drawn=False)
    heard = own.effect >= MEASURABLE and not _silenced(model, graph)
    if heard or kept.all() or graph.flow.trace.mode == "real":
        return own
    drawn = _compare(model, small, graph, kept, seed, drawn=True)
    if not np.isfinite(drawn.effect):
        return own
    return Comparison(max(own.error, drawn.error), drawn.effect, own.outputs, drawn=True)


def _silenced(model: nn.Module, graph: ChannelGraph) -> bool:
    """Whether a norm's scale or a layer's weight is zero throughout: what it multiplies reaches no output."""
    scales = {name for _, name in graph.facts.gammas}
    named = model.named_parameters()
    return any(not bool(p.any()) for name, p in named if p.numel() and (p.dim() > 1 or name in scales))


def _compare(
    model: nn.Module, small: nn.Module, graph: ChannelGraph, kept: np.ndarray, seed: int, *, drawn: bool
) -> Comparison:
    draw = _Draw(graph, seed) if drawn else None
    inputs = graph.inputs.noise(seed, device_of(model), torch.float64)
    if graph.flow.trace.mode == "real":
        inputs = graph.inputs
    cut = run_float64(model, inputs, zeroed=_zeroed_rows(graph, kept), draw=draw)
    told = not kept.all() and any(t.numel() for t in cut)  # a detector may find nothing: then nothing is compared
    effect = _difference(run_float64(model, inputs, draw=draw), cut) if told else 0.0
    if draw is not None:
        draw = _Draw(graph, seed, kept_of(graph, kept))
    result = run_float64(small, inputs, draw=draw)
    return Comparison(_difference(cut, result), effect, len(cut))


def _difference(reference: list[torch.Tensor], result: list[torch.Tensor]) -> float:
    """Largest difference over all outputs, each relative to its largest finite reference value.

    Infinite where shapes differ, or where one output is finite and the other is not.
    """
    if [t.shape for t in reference] != [t.shape for t in result]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, result, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        if finite.any():
            a, b = a[finite], b[finite]
            scale = max(float(a.abs().max()), torch.finfo(torch.float64).tiny)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def _zeroed_rows(graph: ChannelGraph, kept: np.ndarray) -> Rows:
    """Per parameter, the (dim, indices) to read as zero: those that multiply a dropped neuron.

    Of a weight that the forward adds up from several (W + B @ A), all of them. Where two activations are
    multiplied and summed no weight reads the neuron; then its writers are zeroed.
    """
    dropped = np.append(~kept, False)[graph.unit_of_slot]
    slots = np.zeros(graph.slots.total, dtype=bool)
    for label in graph.facts.read:
        slots[label] = True
    if graph.facts.computed:
        together = components(graph.slots.total, graph.facts.computed)
        slots = np.isin(together, np.unique(together[slots]))
    for label in graph.facts.mixed:
        units = np.unique(graph.units(label))
        slots |= np.isin(graph.unit_of_slot, units)
    slots &= dropped
    slots[FROZEN] = False
    rows: Rows = {}
    for name, shape in graph.slots.shapes.items():
        for dim, (start, size) in enumerate(zip(graph.slots.base[name], shape, strict=True)):
            indices = np.flatnonzero(slots[start : start + size])
            if len(indices):
                rows.setdefault(name, []).append((dim, indices))
    return rows


def run_float64(
    model: nn.Module, inputs: Inputs, *, zeroed: Rows | None = None, draw: _Draw | None = None
) -> list[torch.Tensor]:
    """Output tensors of an eval-mode forward in float64; weights are converted one call at a time.

    Args:
        model: any module; not changed, and only its buffers are copied, since a forward may write into them.
        inputs: converted to float64 like the weights.
        zeroed: per parameter, (dim, indices) that are read as zero.
        draw: gives values to use in place of the model's parameters and running statistics.
    """
    checked = _of_recurrent_layers(model)

    def own(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in checked:
            return tensor.detach().double()
        return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()

    copied = skeleton(model, own).eval()
    direct = {name: rows for name, rows in (zeroed or {}).items() if not _zero_computed(copied, name, rows)}
    with torch.no_grad(), _precise(), _Float64(copied, direct, draw) as mode:
        arguments = inputs.map(lambda t: mode.convert(t).clone())  # a forward may write into its inputs
        output = copied(*arguments.args, **arguments.kwargs)
    return [t.to("cpu", torch.float64) for t in tensors_in(output)]


def _of_recurrent_layers(model: nn.Module) -> set[str]:
    """Weights of LSTMs, GRUs and RNNs, which refuse inputs of another dtype than theirs before they compute."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.RNNBase)]
    return {f"{path}.{name}".lstrip(".") for path, layer in layers for name, _ in layer.named_parameters(recurse=False)}


def _zero_computed(copied: nn.Module, name: str, rows: list[tuple[int, np.ndarray]]) -> bool:
    """Zero a weight that a parametrisation computes after it was computed; whether there was one to zero."""
    owner = copied.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, ParametrizationList):
        return False

    def zero(module: nn.Module, args: Any, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.clone()
        for dim, indices in rows:
            weight.index_fill_(dim, torch.as_tensor(indices, device=weight.device), 0)
        return weight

    owner.register_forward_hook(zero)
    return True


class _Draw:
    """Weights drawn from a seed, the same for a name whatever is kept of it.

    Matrices and kernels are uniform with the variance 2 / fan-in (He et al., ICCV 2015), vectors uniform in
    0.5..1.5, so that signals neither vanish nor grow on their way; of buffers only running statistics are drawn.
    """

    def __init__(self, graph: ChannelGraph, seed: int, kept: dict[str, list[np.ndarray | None]] | None = None) -> None:
        self.shapes, self.seed, self.kept = graph.slots.shapes, seed, kept or {}

    def __call__(self, name: str, own: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[name]
        statistic = name.endswith(("running_mean", "running_var"))
        if not shape or not (isinstance(own, nn.Parameter) or statistic):
            return own
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            values += 0.5
        else:
            values = values.mul_(2).sub_(1).mul_((6 / max(math.prod(shape[1:]), 1)) ** 0.5)
        return _part(values, self.kept.get(name, ())).to(own.device)


@contextlib.contextmanager
def _precise() -> Iterator[None]:
    """New tensors are float64, and cuDNN does not pick reduced precision for speed."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_default_dtype(default)


class _Float64(TorchFunctionMode):
    """Runs every function in float64, with rows of some parameters read as zero; copies one weight at a time."""

    def __init__(self, model: nn.Module, zeroed: Rows, draw: _Draw | None) -> None:
        super().__init__()
        names = tensor_names(model)
        self.rows = {id(names[name]): rows for name, rows in zeroed.items()}
        self.draw = draw
        self.names = {id(tensor): name for name, tensor in names.items()} if draw is not None else {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VIEWS:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.convert, (args, kwargs or {}))
        return func(*args, **kwargs)

    def convert(self, leaf: Any) -> Any:
        """A floating-point tensor in float64, a parameter with its rows zeroed; a dtype as float64."""
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf in (torch.float32, torch.float16, torch.bfloat16) else leaf
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        name = self.names.get(id(leaf))
        value = leaf if name is None or self.draw is None else self.draw(name, leaf)
        wide = value.to(torch.float64)
        rows = self.rows.get(id(leaf))
        if rows is not None:
            wide = wide.clone() if wide is leaf else wide
            for dim, indices in rows:
                wide.index_fill_(dim, torch.as_tensor(indices, device=wide.device), 0)
        return wide


_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real"})


def require(certificate: Certificate, what: str) -> Certificate:
    """Return the certificate, or raise CertificateError where a check failed."""
    if not certificate.ok:
        raise CertificateError(f"{what} is not the original minus the dropped neurons: {certificate}")
    return certificate
