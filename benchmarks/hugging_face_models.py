"""Small models of Hugging Face's libraries, by name, each with what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, torch.Tensor]]

_TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 8, "max_position_embeddings": 64}
_GROUPED = _TEXT | {"num_key_value_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
_IMAGE |= {"image_size": 32, "patch_size": 8}
_PAIR = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_layers": 2, "decoder_layers": 2}
_PAIR |= {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 96, "decoder_start_token_id": 2}
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}

# Class of the model, class of its configuration, and what differs from the usual sizes of its kind.
_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}),
    "Mistral": ("MistralForCausalLM", _GROUPED),
    "Gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 8}),
    "Gemma2": ("Gemma2ForCausalLM", _GROUPED | {"head_dim": 8}),
    "Gemma3Text": ("Gemma3ForCausalLM", _GROUPED | {"head_dim": 8}),
    "Phi": ("PhiForCausalLM", _TEXT | _TOKENS),
    "Phi3": ("Phi3ForCausalLM", _GROUPED | _TOKENS),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64} | _TOKENS,
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", _TEXT | _TOKENS),
    "OPT": ("OPTForCausalLM", _TEXT | {"ffn_dim": 96, "word_embed_proj_dim": 64} | _TOKENS),
    "Mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4} | _TOKENS),
    "Qwen2Moe": ("Qwen2MoeForCausalLM", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 64}),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", _GROUPED | _EXPERTS | {"head_dim": 8}),
    "Mamba": ("MambaForCausalLM", {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
}
_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForSequenceClassification", _TEXT),
    "Roberta": ("RobertaForSequenceClassification", _TEXT),
    "DistilBert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 8, "max_position_embeddings": 64},
    ),
    "Albert": ("AlbertForSequenceClassification", _TEXT | {"embedding_size": 16}),
    "Electra": ("ElectraForSequenceClassification", _TEXT | {"embedding_size": 16}),
    "DebertaV2": ("DebertaV2ForSequenceClassification", _TEXT),
}
_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", _IMAGE),
    "Dinov2": ("Dinov2ForImageClassification", _IMAGE | {"mlp_ratio": 2}),
    "Swin": (
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 2, "window_size": 4},
    ),
    "Segformer": (
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
        | {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 32},
    ),
    "ConvNext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
}


def _model(config: str, model: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return built


def tokens(count: int = 12) -> torch.Tensor:
    """(1, count) ids of a vocabulary of 96."""
    return torch.arange(3, 3 + 5 * count, 5)[None] % 96


def _of_tokens(name: str, model: str, options: dict[str, Any]) -> Built:
    return _model(f"{name}Config", model, options), {"input_ids": tokens()}


def _of_images(name: str, model: str, options: dict[str, Any]) -> Built:
    return _model(f"{name}Config", model, options), {"pixel_values": torch.randn(1, 3, 32, 32)}


def _t5() -> Built:
    options = {"vocab_size": 96, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 8}
    options["decoder_start_token_id"] = 0
    model = _model("T5Config", "T5ForConditionalGeneration", options)
    return model, {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


def _bart() -> Built:
    options = _PAIR | _TOKENS | {"max_position_embeddings": 64, "forced_eos_token_id": 2}
    model = _model("BartConfig", "BartForConditionalGeneration", options)
    return model, {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


def _whisper() -> Built:
    options = _PAIR | _TOKENS | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30}
    model = _model("WhisperConfig", "WhisperForConditionalGeneration", options)
    return model, {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": tokens(7)}


def _detr() -> Built:
    import transformers

    options: dict[str, Any] = _PAIR | {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 6}
    options |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    options |= {"backbone_config": transformers.ResNetConfig(**_STAGES)}
    return _model("DetrConfig", "DetrForObjectDetection", options), {"pixel_values": torch.randn(1, 3, 64, 64)}


def _clip() -> Built:
    options = {"text_config": _TEXT | _TOKENS, "vision_config": _IMAGE, "projection_dim": 32}
    return _model("CLIPConfig", "CLIPModel", options), {
        "input_ids": tokens(),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


def _diffusers(name: str, options: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Built:
    import diffusers

    return getattr(diffusers, name)(**options), {"timestep": torch.tensor([3]), **inputs}


def _unet() -> Built:
    options = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    options |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8}
    options |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return _diffusers("UNet2DModel", options, {"sample": torch.randn(1, 3, 16, 16)})


def _conditional_unet() -> Built:
    options = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    options |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4}
    options |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 24}
    inputs = {"sample": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 5, 24)}
    return _diffusers("UNet2DConditionModel", options, inputs)


def _dit() -> Built:
    options = {"num_attention_heads": 8, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    options |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "class_labels": torch.tensor([2])}
    return _diffusers("DiTTransformer2DModel", options, inputs)


def _pixart() -> Built:
    options = {"num_attention_heads": 8, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    options |= {"sample_size": 8, "patch_size": 2, "cross_attention_dim": 64, "caption_channels": 24}
    inputs: dict[str, Any] = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 24)}
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return _diffusers("PixArtTransformer2DModel", options, inputs)


_TEXT_OF_IMAGE = {"num_layers": 1, "joint_attention_dim": 24, "pooled_projection_dim": 16, "in_channels": 4}


def _sd3() -> Built:
    options = _TEXT_OF_IMAGE | {"sample_size": 8, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 8}
    options |= {"caption_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 8, "num_layers": 2}
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 24)}
    return _diffusers("SD3Transformer2DModel", options, inputs | {"pooled_projections": torch.randn(1, 16)})


def _flux() -> Built:
    options: dict[str, Any] = _TEXT_OF_IMAGE | {"patch_size": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    options |= {"num_single_layers": 1, "axes_dims_rope": (4, 6, 6)}
    inputs = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 5, 24)}
    inputs |= {"pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.5])}
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return _diffusers("FluxTransformer2DModel", options, inputs | places)


DIFFUSERS: dict[str, Callable[[], Built]] = {
    "UNet2D": _unet,
    "UNet2DCondition": _conditional_unet,
    "DiT": _dit,
    "PixArt": _pixart,
    "SD3": _sd3,
    "Flux": _flux,
}
TRANSFORMERS: dict[str, Callable[[], Built]] = {
    **{n: lambda n=n, m=m, o=o: _of_tokens(n, m, o) for n, (m, o) in {**_LANGUAGE, **_ENCODERS}.items()},  # type: ignore[misc]
    **{n: lambda n=n, m=m, o=o: _of_images(n, m, o) for n, (m, o) in _IMAGES.items()},  # type: ignore[misc]
    "T5": _t5,
    "Bart": _bart,
    "Whisper": _whisper,
    "Detr": _detr,
    "CLIP": _clip,
}
GENERATORS = (*(name for name in _LANGUAGE), "T5", "Bart", "Whisper")
"""Those that `generate`."""


def tiny(name: str) -> Built:
    """A model in eval mode, of random weights that are always the same, and its inputs by name."""
    torch.manual_seed(0)
    model, inputs = {**TRANSFORMERS, **DIFFUSERS}[name]()
    return model.eval(), inputs


def masked(model: nn.Module, kept: dict[str, list[Any]]) -> nn.Module:
    """The model itself, with zeros in all columns of its layers that read what an allocation drops.

    Args:
        model: of transformers; changed.
        kept: of the allocation.
    """
    for name, dims in kept.items():
        path, _, key = name.rpartition(".")
        layer: Any = model.get_submodule(path)
        reads = {"Linear": 1, "Conv1d": 1, "Conv1D": 0}.get(type(layer).__name__)
        if key == "down_proj":  # one parameter of all experts
            reads = 2
        if key in ("weight", "down_proj") and reads is not None and dims[reads] is not None:
            weight = getattr(layer, key)
            gone = torch.ones(weight.shape[reads], dtype=torch.bool)
            gone[dims[reads]] = False
            with torch.no_grad():
                weight.transpose(0, reads)[gone] = 0.0
    return model
