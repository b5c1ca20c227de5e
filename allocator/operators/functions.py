"""Python functions of torch that fvcore counts whole, or whose meaning is lost in their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from allocator.cost.terms import Product, elements, times
from allocator.flow.flow import Flow
from allocator.operators.einsum import einsum_flops
from allocator.tracing.calls import Call, Op
from allocator.tracing.operators import function


def tensor_of(call: Call, position: int, name: str) -> int:
    """The value that a call was given at this position or by this name."""
    ref = call.args[position] if position < len(call.args) else call.kwargs[name]
    return int(ref.index)


def _nothing(flow: Flow, call: Call) -> list[Product]:
    return []


def _adaptive_pool_flops(flow: Flow, call: Call) -> list[Product]:
    return [elements(flow, tensor_of(call, 0, "input"))]


def _instance_norm_flops(flow: Flow, call: Call) -> list[Product]:
    weight = call.kwargs.get("weight", call.args[3] if len(call.args) > 3 else None)
    return [elements(flow, tensor_of(call, 0, "input"), 4 + (weight is not None))]


def _matmul_flops(flow: Flow, call: Call) -> list[Product]:
    a, b = tensor_of(call, 0, "input"), tensor_of(call, 1, "other")
    if call.name == "rmatmul":
        a, b = b, a
    product = elements(flow, a)
    if len(flow.shape(b)) == 1:
        return [product]
    return [times(product, elements(flow, b, dims=slice(-1, None)))]


def _mm_flops(flow: Flow, call: Call) -> list[Product]:
    a, b = tensor_of(call, 0, "input"), tensor_of(call, 1, "mat2")
    return [times(elements(flow, a), elements(flow, b, dims=slice(-1, None)))]


def area_flops(flow: Flow, op: Op) -> list[Product]:
    """Adaptive pooling of images; to one pixel `interpolate` by area calls `mean`, and for signals it makes images."""
    if op.call is not None and op.call.name == "interpolate":
        counts = len(flow.shape(tensor_of(op.call, 0, "input"))) == 4
    else:
        counts = op.name != "mean"
    return [elements(flow, op.inputs()[0])] if counts else []


def _attention_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` as products and a softmax, as it always is on meta tensors.

    Raises:
        RuntimeError: queries are to share keys and values of which there are no heads; torch divides by their number,
            which ends the process.
    """
    if enable_gqa and 0 in (*key.shape[-3:-2], *value.shape[-3:-2]):
        raise RuntimeError(f"queries share keys of shape {list(key.shape)} and values of shape {list(value.shape)}")
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if query.is_meta:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    parts = torch.ops.aten._scaled_dot_product_attention_math.default
    result: torch.Tensor = parts(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]
    return result


function("adaptive_avg_pool1d", flops=_nothing, callable=functional.adaptive_avg_pool1d)
function("adaptive_avg_pool2d", flops=_adaptive_pool_flops, callable=functional.adaptive_avg_pool2d)
function("adaptive_avg_pool3d", flops=_nothing, callable=functional.adaptive_avg_pool3d)
function("adaptive_max_pool2d", flops=_nothing)
function("chain_matmul", flops=_nothing)
function("chunk", callable=torch.chunk)
function("einsum", flops=einsum_flops, multiplies=True)
function("inner", flops=_nothing)
function("instance_norm", flops=_instance_norm_flops)
function("interpolate")
function("linalg_matrix_power", flops=_nothing)
function("linalg_multi_dot", flops=_nothing)
function("matmul", flops=_matmul_flops, multiplies=True, callable=torch.matmul)
function("matrix_power", flops=_nothing)
# Called by itself fvcore counts its FLOPs and not what it writes; as the part of a linear layer it counts both.
function("mm", flops=_mm_flops)
function("multi_head_attention_forward", draws=True)
function("rmatmul", flops=_matmul_flops, multiplies=True)
function(
    "scaled_dot_product_attention",
    flops=_nothing,
    callable=functional.scaled_dot_product_attention,
    in_parts=_attention_in_parts,
    draws=True,
)
function("tensor_split", takes_apart=True)
function("tensordot", flops=_nothing)

# Recorded as the calls they make; only a program has to call the function itself.
function("linear", whole=False, callable=functional.linear)
function("split", whole=False, callable=torch.split)  # takes one size or a list of them, which one may have to become

# Where numbers are equal but for rounding, what comes first hangs on the last bits.
for _name in ("topk", "sort", "argsort", "argmax", "argmin", "nms"):
    function(_name, whole=False, orders=True)

for _name in ("round", "floor", "ceil", "trunc", "sign"):
    function(_name, whole=False, rounds=True)

# On a processor, torchvision's kernel reads memory that is not its own where an offset is NaN.
function("deform_conv2d", whole=False, trusts=True)
