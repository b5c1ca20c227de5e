"""Why some networks do not come down to the budget: looked into case by case, shown on the coverage page."""

from __future__ import annotations

REASONS = {
    "timm:gmlp_ti16_224": "the halves of every hidden layer meet under the spatial gate's LayerNorm over channels, and "
    "the stream under others: nothing can go exactly; `norms='loose'` lets them go",
    "timm:mobilenetv5_base": "almost every hidden channel passes a root-mean-square norm over channels, written out "
    "as a mean of squares, and cannot go exactly; 1 % can, the values of its attentions",
    "timm:test_nfnet": "weight standardisation: every weight depends on all inputs of its layer, so that no layer's "
    "inputs can go exactly",
    "timm:csatv2": "the hidden widths of its blocks pass a global response norm, whose mean runs over all of their "
    "channels, and the stream lies under norms over channels: neither can go exactly",
}
FLOORS = {
    "timm:resnest14d": "its split attention takes both groups of each 3x3 convolution as one, so that neither goes "
    "whole, and none of its inputs does; `groups='width'` narrows both alike, down to 0.8 % of the FLOPs",
}
WHY_HEADS_STAY = (
    "Where a forward computes the width of a head from the stream (`C // num_heads`), or gives its result the width of "
    "the stream (`reshape(B, N, C)`), no attribute can follow and the heads stay; hidden widths are allocated there."
)
