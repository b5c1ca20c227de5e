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
    "pytorchcv:dicenet_wd5": "its dimension-wise convolutions run along the channels as along pixels",
    "pytorchcv:superpointnet": "how many points it finds, and so how often its loops run, hangs on values; a plan is "
    "taken only where both networks take the same path",
    "pytorchcv:wrn20_10_1bit_cifar10": "every weight is its sign times a number made of the layer's own width, which "
    "would be another were it narrower",
    "pytorchcv:enet_cityscapes": "its stream is padded with channels of zeros, as many as a number says, and what is "
    "added to these stays",
    "pytorchcv:channelnet": "its channel-wise convolutions run along the channels as along pixels",
    "pytorchcv:cbam_resnet18": "its spatial gate takes the mean and the largest of all channels of a stream",
    **dict.fromkeys(
        (
            "pytorchcv:pfpcnet",
            "pytorchcv:voca8flame",
            "pytorchcv:shufflenet_g1_wd4",
            "pytorchcv:darknet_tiny",
            "pytorchcv:fdmobilenet_wd4",
        ),
        "most of the channels that stay are what the model returns",
    ),
}
WHY_HEADS_STAY = (
    "Where a forward computes the width of a head from the stream (`C // num_heads`), or gives its result the width of "
    "the stream (`reshape(B, N, C)`), no attribute can follow and the heads stay; hidden widths are allocated there."
)
