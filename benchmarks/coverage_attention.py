"""Transformers and hybrids of libraries that write them with einops, small: how to build each, and what it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Network = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]

_SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 128,
}
_VIT: dict[str, Any] = {**_SMALL, "dim_head": 16}
_CLIP: dict[str, Any] = {**_VIT, "frames": 4, "image_patch_size": 8, "frame_patch_size": 2}
_STAGES: dict[str, Any] = {"num_classes": 10, "dim": (32, 64, 64, 96), "depth": (1, 1, 2, 1)}
_WORDS: dict[str, Any] = {"num_tokens": 64, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "max_seq_len": 32}
_PERCEIVER: dict[str, Any] = {
    "num_freq_bands": 4,
    "depth": 2,
    "max_freq": 10.0,
    "num_latents": 8,
    "latent_dim": 64,
    "num_classes": 10,
}
_UNET: dict[str, Any] = {"dim": 16, "dim_mults": (1, 2, 4), "attn_dim_head": 16, "attn_heads": 2}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _images(side: int = 32) -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, side, side),)


def _clips() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 4, 32, 32),)


def _signals() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 64),)


def _words() -> tuple[Tensor, ...]:
    return (torch.randint(0, 64, (1, 32)),)


def _steps() -> tuple[Tensor, ...]:
    return (torch.randn(1, 32, 64),)


def _noise(side: int = 16) -> tuple[Tensor, ...]:
    return torch.randn(1, 3, side, side), torch.randint(0, 100, (1,))


def _table() -> tuple[Tensor, ...]:
    return torch.tensor([[1, 2, 3]]), torch.randn(1, 4)


def _built(module: str, name: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module(module), name)(**options)
    return model


def _of(module: str, name: str, takes: Callable[[], tuple[Tensor, ...]] = _images, **options: Any) -> Network:
    return partial(_built, module, name, options), takes


def _decoder(**options: Any) -> Network:
    def build() -> nn.Module:
        sizes = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16, "verbose": False}
        layers = _built("x_transformers", "Decoder", {**sizes, **options})
        words = {"num_tokens": 64, "max_seq_len": 32, "attn_layers": layers}
        return _built("x_transformers", "TransformerWrapper", words)

    return build, _words


class _Joint(nn.Module):
    """Two encoders whose answers come as a tuple, without the words beside them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        answers = self.model(image, text)
        return answers if isinstance(answers, tuple) else tuple(answers.values())


def _joint(vision: dict[str, Any]) -> Network:
    def build() -> nn.Module:
        text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2}
        parts = {"vision_cfg": {"image_size": 32, **vision}, "text_cfg": text}
        return _Joint(_built("open_clip.model", "CLIP", {"embed_dim": 32, **parts}))

    return build, lambda: (*_images(), torch.randint(0, 64, (1, 16)))


def _plain_vits() -> dict[str, Network]:
    """Those of vit_pytorch that take the same sizes."""
    classes = {
        "vit": "ViT",
        "simple_vit": "SimpleViT",
        "deepvit": "DeepViT",
        "parallel_vit": "ViT",
        "vit_for_small_dataset": "ViT",
        "vit_with_keel_post_ln": "ViT",
        "normalized_vit": "nViT",
        "simple_uvit": "SimpleUViT",
        "simple_vit_with_qk_norm": "SimpleViT",
        "simple_vit_with_relative_proj_pos_bias": "SimpleViT",
        "simple_vit_with_value_residual": "SimpleViT",
        "attn_residual_with_dca_simple_vit": "SimpleViT",
    }
    return {f"vit_pytorch.{file}": _of(f"vit_pytorch.{file}", name, **_VIT) for file, name in classes.items()}


def _other_vits() -> dict[str, Network]:
    """Those of vit_pytorch that take sizes of their own."""
    large = partial(_images, 64)

    def of(file: str, name: str, takes: Callable[[], tuple[Tensor, ...]] = _images, **options: Any) -> Network:
        return _of(f"vit_pytorch.{file}", name, takes, **options)

    line = {**_without(_VIT, "image_size"), "seq_len": 64}
    twins = {f"s{i}_{key}": 2 for i in range(1, 5) for key in ("local_patch_size", "global_k")}
    widths = {f"s{i}_emb_dim": width for i, width in enumerate((32, 48, 64, 64), 1)}
    networks = {
        "ats_vit": of("ats_vit", "ViT", **_VIT, max_tokens_per_depth=(12, 8)),
        "cait": of("cait", "CaiT", **_VIT, cls_depth=2),
        "xcit": of("xcit", "XCiT", **_VIT, cls_depth=2),
        "jet_vit": of("jet_vit", "JetViT", **{**_VIT, "patch_size": 4}, window_size=4, attn_layers=["LA", "WA"]),
        "pit": of("pit", "PiT", **{**_VIT, "dim": 48, "depth": (1, 1)}),
        "t2t": of("t2t", "T2TViT", large, **{**_without(_VIT, "patch_size"), "image_size": 64}),
        "levit": of(
            "levit", "LeViT", large, image_size=64, num_classes=10, dim=(48, 64, 96), depth=1, heads=(2, 3, 4),
            mlp_mult=2, dim_key=16,
        ),
        "cvt": of("cvt", "CvT", large, num_classes=10, s1_emb_dim=32, s2_emb_dim=64, s3_emb_dim=96, s3_depth=2),
        "twins_svt": of("twins_svt", "TwinsSVT", large, num_classes=10, **widths, **twins, s3_depth=2, s4_depth=1),
        "regionvit": of("regionvit", "RegionViT", large, **_STAGES, window_size=2, use_peg=True),
        "crossformer": of(
            "crossformer", "CrossFormer", large, **_STAGES, global_window_size=(4, 2, 2, 1), local_window_size=2
        ),
        "scalable_vit": of(
            "scalable_vit", "ScalableViT", large, num_classes=10, dim=32, heads=(2, 2, 4, 4), depth=(1, 1, 2, 1),
            reduction_factor=(4, 2, 2, 1), window_size=(8, 4, None, None), ssa_dim_key=16,
        ),
        "max_vit": of("max_vit", "MaxViT", large, num_classes=10, dim=32, dim_head=16, depth=(1, 1), window_size=4),
        "nest": of(
            "nest", "NesT", image_size=32, patch_size=2, dim=48, heads=3, dim_head=16, num_hierarchies=3,
            block_repeats=(1, 1, 2), num_classes=10,
        ),
        "mobile_vit": of(
            "mobile_vit", "MobileViT", large, image_size=(64, 64), dims=[48, 64, 64], num_classes=10,
            channels=[16, 24, 32, 32, 48, 48, 48, 48, 64, 64, 96],
        ),
        "vit_1d": of("vit_1d", "ViT", _signals, **line),
        "vit_3d": of("vit_3d", "ViT", _clips, **_without(_CLIP, "patch_size")),
        "vivit": of(
            "vivit", "ViViT", _clips, **_without(_CLIP, "patch_size", "depth"), spatial_depth=1, temporal_depth=1
        ),
    }  # fmt: skip
    return {f"vit_pytorch.{name}": network for name, network in networks.items()}


def _of_other_libraries() -> dict[str, Network]:
    """One or a few of each."""
    patches: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2}
    columns: dict[str, Any] = {"categories": (5, 6, 7), "num_continuous": 4, "dim": 64, "depth": 2, "heads": 4}
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    pixels = partial(torch.randn, 1, 16, 16, 3)
    local = {**_WORDS, "local_attn_window_size": 8}
    return {
        "x_transformers.Decoder": _decoder(),
        "x_transformers.Decoder, rotary": _decoder(rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True),
        "x_transformers.Decoder, ALiBi": _decoder(alibi_pos_bias=True),
        "x_transformers.Decoder, talking heads": _decoder(attn_pre_talking_heads=True, attn_post_talking_heads=True),
        "x_transformers.Decoder, one key": _decoder(attn_one_kv_head=True),
        "x_transformers.Decoder, gated values": _decoder(attn_gate_values=True),
        "conformer.Conformer": _of("conformer", "Conformer", _steps, dim=64, depth=2, dim_head=16, heads=4),
        "perceiver_pytorch.Perceiver": _of("perceiver_pytorch", "Perceiver", lambda: (pixels(),), **_PERCEIVER),
        "linear_attention_transformer": _of(
            "linear_attention_transformer", "LinearAttentionTransformerLM", _words, **_WORDS
        ),
        "performer_pytorch": _of("performer_pytorch", "PerformerLM", _words, **_WORDS, nb_features=24),
        "denoising_diffusion_pytorch.Unet": _of("denoising_diffusion_pytorch", "Unet", _noise, **_UNET),
        "denoising_diffusion_pytorch.KarrasUnet": _of(
            "denoising_diffusion_pytorch.karras_unet", "KarrasUnet", lambda: (*_images(16), torch.rand(1)),
            image_size=16, dim=16, dim_max=32, channels=3, num_downsamples=2, num_blocks_per_stage=1, attn_res=(8,),
            attn_dim_head=16,
        ),
        "g_mlp_pytorch.gMLPVision": _of("g_mlp_pytorch", "gMLPVision", **patches),
        "mlp_mixer_pytorch.MLPMixer": _of("mlp_mixer_pytorch", "MLPMixer", **patches, channels=3),
        "tab_transformer_pytorch.TabTransformer": _of(
            "tab_transformer_pytorch", "TabTransformer", _table, **columns, num_residual_streams=1, mlp_act=nn.ReLU()
        ),
        "tab_transformer_pytorch.FTTransformer": _of("tab_transformer_pytorch", "FTTransformer", _table, **columns),
        "local_attention.LocalTransformer": _of("local_attention", "LocalTransformer", _words, **local),
        "nystrom_attention.Nystromformer": _of(
            "nystrom_attention", "Nystromformer", _steps, dim=64, depth=2, dim_head=16, heads=4, num_landmarks=8
        ),
        "linformer.Linformer": _of("linformer", "Linformer", _steps, dim=64, seq_len=32, depth=2, k=8, heads=4),
        "open_clip.CLIP, ViT": _joint(vision),
        "open_clip.CLIP, ResNet": _joint({"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "patch_size": None}),
    }  # fmt: skip


def networks() -> dict[str, Network]:
    """How to build each, and example inputs."""
    return {**_plain_vits(), **_other_vits(), **_of_other_libraries()}
