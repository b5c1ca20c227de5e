"""What is particular to torch's own attention: its forward takes heads that are as wide together as what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.adapters import Adapter, Kept, register


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
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask is: pass that too")
        batched = query.dim() == 3
        q, k, v = self._heads(query, key, value, batched)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by heads, (N, heads, L, width)."""
        same = query is key and key is value
        if not batched:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        bias = self.in_proj_bias
        if same and self.in_proj_weight is not None:
            q, k, v = F.linear(query, self.in_proj_weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        packed: Any = self.in_proj_weight
        weights = (
            packed.chunk(3) if packed is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        heads = [
            F.linear(x, weight, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, b in zip((query, key, value), weights, biases, strict=True)
        ]
        return heads[0], heads[1], heads[2]

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, (N or 1, heads or 1, L or 1, S)."""
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None]
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
    """Whether this is attention as torch has it, without keys of its own beside those of what it reads."""
    if not isinstance(module, nn.MultiheadAttention) or "forward" in vars(module):
        return False
    own_keys = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    return type(module) in (nn.MultiheadAttention, AnyWidthAttention) and not own_keys


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
    packed = module.in_proj_weight is not None
    read = ("in_proj_weight",) * 3 if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    widths = (int(kept(name, 1).sum()) for name in read)
    return {"num_heads": int(heads.any(1).sum()), **dict(zip(("embed_dim", "kdim", "vdim"), widths, strict=True))}


register("torch.nn.modules.transformer.TransformerEncoder", Adapter(any_width=_keep_dense))
register("torch.nn.modules.activation.MultiheadAttention", Adapter(sizes=_sizes, any_width=_take_any_width))
