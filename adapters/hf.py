"""What is particular to Hugging Face transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from allocator.adapters import Adapter, Kept, register, register_state
from allocator.adapters.hf_config import configuration, cut_buffers, recorded_class, write_configuration
from allocator.adapters.hf_experts import aligned
from allocator.adapters.hf_inputs import inputs
from allocator.adapters.library import library
from allocator.errors import FileError, UnknownNameError, UnsupportedModelError, unknown


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """From a config class (``ResNetConfig``) or a folder with a ``config.json``; nothing is downloaded.

    The weights that lie in a folder are read, unless `pretrained` is false; where `save_pretrained` wrote a model that
    was allocated, the widths of its layers are as they were.
    """
    transformers = library("transformers")
    kwargs = dict(kwargs)
    pretrained = kwargs.pop("pretrained", None)
    if name.endswith("Config"):
        config_class = _config_class(transformers, name)
        config = config_class(**kwargs)
        return _model_class(transformers, config)(config)
    # transformers would take any other name for one on its hub, and fetch it.
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise FileError(
            f"hf:{name} is neither a config class such as hf:ResNetConfig nor a folder with a config.json; "
            "nothing is downloaded by this prefix"
        )
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **kwargs)
    model_class = _model_class(transformers, config)
    on_meta = torch.empty(0).is_meta
    if on_meta or not _has_weights(name, pretrained):
        built: Any = recorded_class(model_class, config)(config)
        if on_meta and hasattr(built, "tie_weights"):
            built.tie_weights()  # not all releases do so there by themselves
        cut_buffers(built, config)
        return cast(nn.Module, built)
    # A pickle would run code as it is read.
    model: nn.Module = recorded_class(model_class, config).from_pretrained(
        name, config=config, local_files_only=True, use_safetensors=True
    )
    cut_buffers(model, config)
    return model


def _has_weights(folder: str, pretrained: bool | None) -> bool:
    """Whether the weights of a folder are to be read: those in safetensors are, unless the caller wants none."""
    if pretrained is None:
        if any(Path(folder).glob("*.safetensors")):
            return True
        pickles = sorted(path.name for path in Path(folder).glob("*.bin"))
        if pickles:
            raise FileError(
                f"hf:{folder} holds its weights as a pickle ({pickles[0]}), which could run code: save them with "
                "save_pretrained as .safetensors, or pass pretrained=False for random ones"
            )
    return bool(pretrained)


def _config_class(transformers: ModuleType, name: str) -> Any:
    config_class = getattr(transformers, name, None)
    if config_class is None:
        config_names = [other for other in dir(transformers) if other.endswith("Config")]
        raise UnknownNameError(unknown("transformers config", name, config_names))
    return config_class


# What is built of a config that names no class. Encoders of text have a causal variant too, which few mean.
_TABLES = (
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)


def _model_class(transformers: ModuleType, config: Any) -> Any:
    """The class that a config's `architectures` names; else its image classifier, language model, or bare model."""
    for name in getattr(config, "architectures", None) or ():
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, nn.Module):
            return model_class
    fills_gaps = type(config) in getattr(transformers, "MODEL_FOR_MASKED_LM_MAPPING", {})
    for table in _TABLES:
        if table == "MODEL_FOR_CAUSAL_LM_MAPPING" and fills_gaps:
            continue
        models = getattr(transformers, table, {})
        if type(config) in models:
            model_class = models[type(config)]
            # A config that several models share lists them all, the usual one first.
            if isinstance(model_class, tuple):
                model_class = model_class[0]
            return model_class
    raise UnsupportedModelError(f"transformers has no model for {type(config).__name__}")


def _transposed_linear(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """GPT-2's layer, whose weight is (in, out): its forward reads `nf` as the size of what it gives."""
    sizes = {"nx": int(kept("weight", 0).sum()), "nf": int(kept("weight", 1).sum())}
    return {name: size for name, size in sizes.items() if hasattr(module, name)}  # releases name one of them or both


def _joint_attention(module: Any, kept: Kept) -> Mapping[str, Any]:
    """Phi-3's queries, keys and values are slices of one layer's output, by the configuration's numbers of heads."""
    heads, width = _whole_heads(kept("o_proj.weight", 1), module.head_dim)
    queries = module.o_proj.weight.shape[1]
    keys = kept("qkv_proj.weight", 0)[queries : queries + module.num_key_value_heads * width]
    groups, _ = _whole_heads(keys, width)
    return {"config.num_attention_heads": heads, "num_key_value_heads": groups}


def _t5_attention(module: Any, kept: Kept) -> Mapping[str, Any]:
    """Where there is no bias of positions, zeros stand in for one, by the number of heads."""
    heads, width = _whole_heads(kept("o.weight", 1), module.key_value_proj_dim)
    return {"n_heads": heads, "inner_dim": heads * width}


def _whole_heads(channels: np.ndarray, width: int) -> tuple[int, int]:
    """How many heads of this width are left, and the width."""
    return int(channels.reshape(-1, width).all(1).sum()), width


for _name in ("phi3.modeling_phi3.Phi3Attention", "phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAttention"):
    register(f"transformers.models.{_name}", Adapter(sizes=_joint_attention))
for _name in ("t5.modeling_t5.T5Attention", "mt5.modeling_mt5.MT5Attention", "umt5.modeling_umt5.UMT5Attention"):
    register(f"transformers.models.{_name}", Adapter(sizes=_t5_attention))
register(
    "transformers.*",
    Adapter(inputs=inputs, configuration=configuration, write_configuration=write_configuration, multiples=aligned),
)
register("transformers.pytorch_utils.Conv1D", Adapter(sizes=_transposed_linear))
# Keys and values of the tokens so far.
register_state(("transformers.cache_utils.Cache", "transformers.cache_utils.EncoderDecoderCache"))
