"""What is particular to torch's own attention: its forward takes heads that are as wide together as what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.adapters import Adapter, Kept, register
from allocator.adapters.stand_ins import in_parts


class AnyWidthAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by another forward, which takes any number of heads of any width.

    Fields, parameters and their names are the same. A layer that loses heads becomes one of these; it is not made
    anew. Torch's fused kernels take equal widths alone, so that these are left out.

    Shapes are those of `torch.nn.MultiheadAttention`; `attn_mask` is (L, S), or (N * num_heads, L, S) with as many
    heads as are left.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        dropout = self.dropout if self.training else 0.0
        own = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight, self.in_proj_bias)
        asked = (need_weights, average_attn_weights, is_causal)
        masks = (attn_mask, key_padding_mask)
        out, weights = attend((query, key, value), masks, own, self.num_heads, self.batch_first, dropout, asked)
        return self.out_proj(out), weights


def attend(
    given: tuple[Tensor, Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    num_heads: int,
    batch_first: bool,
    dropout: float,
    asked: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None]:
    """What the heads of `AnyWidthAttention` read, side by side, as `given` is laid out; and the attention's weights.

    A function, so that torch.fx has it as one call, as it has `torch.nn.MultiheadAttention`.

    Args:
        given: query, key and value.
        masks: `attn_mask` and `key_padding_mask`.
        weights: of the projections, together or one by one, and their biases together.
        num_heads, batch_first: the module's.
        dropout: its share; none in eval mode.
        asked: `need_weights`, `average_attn_weights` and `is_causal`.
    """
    need_weights, average, is_causal = asked
    if is_causal and masks[0] is None:
        raise RuntimeError("is_causal says what attn_mask is: pass that too")
    batched = given[0].dim() == 3
    q, k, v = _heads(given, batched, batch_first, weights, num_heads)
    mask = _mask(masks, q, num_heads)
    looked: Tensor | None = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        looked = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        out = looked @ v
        looked = looked.mean(1) if average else looked
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        return out.squeeze(0), None if looked is None else looked.squeeze(0)
    return out if batch_first else out.transpose(0, 1), looked


torch.fx.wrap("attend")


def _heads(
    given: tuple[Tensor, Tensor, Tensor],
    batched: bool,
    batch_first: bool,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by heads, (N, heads, L, width)."""
    query, key, value = given
    same = query is key and key is value
    if not batched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    elif not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    packed, query_weight, key_weight, value_weight, bias = weights
    if packed is not None:
        if same:
            q, k, v = F.linear(query, packed, bias).unflatten(-1, (3, num_heads, -1)).unbind(2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        query_weight, key_weight, value_weight = packed.chunk(3)
    assert query_weight is not None
    assert key_weight is not None
    assert value_weight is not None
    q_bias, k_bias, v_bias = _thirds(bias)
    return (
        F.linear(query, query_weight, q_bias).unflatten(-1, (num_heads, -1)).transpose(1, 2),
        F.linear(key, key_weight, k_bias).unflatten(-1, (num_heads, -1)).transpose(1, 2),
        F.linear(value, value_weight, v_bias).unflatten(-1, (num_heads, -1)).transpose(1, 2),
    )


def _thirds(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if bias is None:
        return None, None, None
    q, k, v = bias.chunk(3)
    return q, k, v


def _mask(masks: tuple[Tensor | None, Tensor | None], q: Tensor, num_heads: int) -> Tensor | None:
    """What is added to the scores, (N or 1, heads or 1, L or 1, S)."""
    attn_mask, padding = masks
    mask: Tensor | None = None
    if attn_mask is not None:
        mask = _added(attn_mask, q)
        mask = mask.unflatten(0, (-1, num_heads)) if mask.dim() == 3 else mask[None, None]
    if padding is not None:
        added = _added(padding, q).view(-1, 1, 1, padding.shape[-1])
        mask = added if mask is None else mask + added
    return mask


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """Minus infinity where a mask of truth values says so; other masks as they are."""
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))


def _is_plain(module: nn.Module) -> bool:
    """Whether this is attention as torch has it, without keys of its own beside those of what it reads.

    Its weights are its own parameters: none that a norm, a mask or an adapter computes.
    """
    if not isinstance(module, nn.MultiheadAttention) or "forward" in vars(module):
        return False
    if not {"out_proj.weight", *_projections(module)} <= dict(module.named_parameters(remove_duplicate=False)).keys():
        return False
    own_keys = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return type(module) in (nn.MultiheadAttention, AnyWidthAttention) and not own_keys


def _projections(module: nn.Module) -> tuple[str, str, str]:
    """The parameters that give queries, keys and values."""
    packed = getattr(module, "in_proj_weight", None) is not None
    return ("in_proj_weight",) * 3 if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _take_any_width(module: nn.Module) -> None:
    if _is_plain(module):
        module.__class__ = AnyWidthAttention
        # Transformer layers ask this before they hand everything to a kernel of torch's.
        module._qkv_same_embed_dim = False  # type: ignore[assignment]


def _keep_dense(encoder: nn.Module) -> None:
    """Padded batches go through as they are: tensors of sequences of many lengths are for torch's kernels alone."""
    encoder.use_nested_tensor = False  # type: ignore[assignment]


def _sizes(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """Heads go whole; the width of one stays."""
    if not _is_plain(module):
        return {}
    heads = kept("out_proj.weight", 1).reshape(int(module.num_heads), -1)  # type: ignore[arg-type]
    widths = (int(kept(name, 1).sum()) for name in _projections(module))
    return {"num_heads": int(heads.any(1).sum()), **dict(zip(("embed_dim", "kdim", "vdim"), widths, strict=True))}


register("torch.nn.modules.transformer.TransformerEncoder", Adapter(any_width=_keep_dense))
register("torch.nn.modules.activation.MultiheadAttention", Adapter(sizes=_sizes, any_width=_take_any_width))


def _as_it_is(model: Any = None, **options: Any) -> Any:
    """In place of `torch.compile`, called or as a decorator: what is compiled can be neither followed nor widened.

    `flex_attention` compiles a part of itself wherever it is called.
    """
    return (lambda function: function) if model is None else model


in_parts.add("torch", "compile", _as_it_is)
