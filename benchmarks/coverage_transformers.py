"""Every architecture of Hugging Face transformers that can be built small: language, vision and speech models.

python -m benchmarks.coverage_transformers             # needs pip install 'neuron-allocator[language]'
python -m benchmarks.coverage_transformers --names causal/llama --print

Each in a process of its own with a limit of CPU time: allocated to 70 % of its FLOPs, certified, trained a step; what
generates text does so afterwards. Writes results/coverage_transformers.json and .md; a run that was cut off goes on
with the models that have no row.
"""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import allocator
from allocator.tracing.outputs import tensors_in

from .common import read, table, where
from .coverage import apart
from .coverage_one import floor
from .peer import reason
from .rows import arguments_of, measure_rows

SHARE, LIMIT, MEMORY, MOST = 70, 240, 10 << 30, 60_000_000
Row = dict[str, Any]
Inputs = dict[str, torch.Tensor]

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "depth": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
"""The library's own tables, by what the models are for."""

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
_HIDDEN = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner")
_HIDDEN += ("hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PLAIN = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_PLAIN |= {"max_position_embeddings": 64, "n_positions": 64, "image_size": 64, "num_labels": 5, "num_mel_bins": 40}
_PLAIN |= {"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "rotary_dim": 8}
_PLAIN |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_PLAIN |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "state_size": 8}
SMALL = {
    **dict.fromkeys(_DEPTHS, 2),
    **dict.fromkeys(_WIDTHS, 64),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_HIDDEN, 96),
    **dict.fromkeys(_EXPERTS, 4),
    **_PLAIN,
}
"""Sizes by the names that configurations give them."""
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 12, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 12},
    "dpt": {"backbone_out_indices": [0, 1, 0, 1], "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16},
}
"""Sizes that go by other names, or hang together."""
_LESS: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("head_dim", "num_key_value_heads"),
    ("head_dim", "num_key_value_heads", *_HEADS),
    ("head_dim", "num_key_value_heads", *_HEADS, *_WIDTHS, *_HIDDEN),
    ("head_dim", "num_key_value_heads", *_HEADS, *_WIDTHS, *_HIDDEN, *_DEPTHS),
)
"""What is left at its own size, more of it from try to try, until a model is built and runs."""


def architectures() -> dict[str, tuple[str, str]]:
    """By kind and type of the configuration, that type and the class of the model; every class once."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for kind, mapping in KINDS.items():
        classes = {c: m if isinstance(m, str) else m[0] for c, m in getattr(modeling_auto, mapping).items()}
        own_first = sorted(classes.items(), key=lambda each: not each[1].lower().startswith(_letters(each[0])))
        for config, name in own_first:
            if name not in {each for _, each in found.values()}:
                found[f"{kind}/{config}"] = config, name
    return found


def _letters(config: str) -> str:
    return config.replace("_", "").replace("-", "")


def small_config(config: Any, left: Sequence[str]) -> dict[str, Any]:
    """The sizes of a configuration, and of those within it, that are to be other ones."""
    own = {**config.to_dict(), **dict.fromkeys(getattr(config, "attribute_map", {}), 0)}
    sizes: dict[str, Any] = {name: size for name, size in SMALL.items() if own.get(name) is not None}
    sizes = {name: size for name, size in sizes.items() if name not in left and isinstance(own[name], int)}
    for name in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict"):
            sizes[name] = small_config(inner, left)
    return sizes


def built(kind: str, config: str, name: str) -> tuple[nn.Module, Inputs]:
    """A model with random weights that runs, and what it takes; raises what the last try raised."""
    import transformers

    make, model_class = transformers.CONFIG_MAPPING[config], getattr(transformers, name)
    raised: Exception | None = None
    for left in _LESS:
        torch.manual_seed(0)
        try:
            sizes = {**small_config(make(), left), **OWN.get(config, {})}
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in model_class(make(**sizes)).parameters())
            if count > MOST:
                raise ValueError(f"{count:,} parameters")
            model = model_class(make(**sizes)).eval()
            for inputs in _inputs(kind, model):
                with torch.no_grad():
                    model(**inputs)
                return model, inputs
        except Exception as error:  # whatever a configuration that nobody meant raises
            raised = raised or error
    raise raised or ValueError("no configuration")


def _inputs(kind: str, model: Any) -> Iterator[Inputs]:
    config = model.config
    ids = torch.randint(3, 100, (1, 12))
    if model.main_input_name == "pixel_values":
        side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 64
        yield {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3) or 3, side, side)}
    elif model.main_input_name == "input_values":
        yield {"input_values": torch.randn(1, 4000)}
    elif model.main_input_name == "input_features":
        yield {"input_features": torch.randn(1, 64, 40)}
    elif config.is_encoder_decoder:
        yield {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
    else:
        yield {"input_ids": ids}


def row(name: str, config: str, model_class: str) -> Row:
    """What is measured of one model, as far as it gets."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    found: Row = {}
    try:
        model, inputs = built(name.partition("/")[0], config, model_class)
    except Exception as error:
        return {"not_built": reason(error)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        result = _allocated(model, inputs, found)
        found |= {"share": result.graph.share(), "achieved": result.flops_after / result.flops_before}
        found |= {"error": result.certificate.relative_error, "notes": [n for n in result.notes if " stay" in n]}
        found["untouched"] = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        found["reasons"] = result.graph.reasons()[:4]
        found["train_step"] = _as_before(_trains, model, result.model, inputs)
        found["generates"] = _as_before(_generates, model, result.model, inputs)
        found.setdefault("floor", floor(result.graph))
    except Exception as error:
        found["failed"] = reason(error)
    return found


def _allocated(model: nn.Module, inputs: Inputs, found: Row) -> allocator.Result:
    """To 70 % of the FLOPs; where that is out of reach, to the smallest that is not."""
    try:
        return allocator.allocate(model, f"{SHARE}%", example_inputs=inputs)
    except allocator.BudgetError as error:
        found["floor"] = found["smallest"] = (error.reachable or 0) / allocator.trace(model, inputs).flops
        if not error.reachable or found["floor"] >= 1:
            raise
        return allocator.allocate(model, float(error.reachable), example_inputs=inputs)


def _as_before(run: Callable[[Any, Inputs], None], model: Any, small: Any, inputs: Inputs) -> bool | None:
    """Whether something that the original does is done by the result; None where the original does not."""
    try:
        run(model, inputs)
    except Exception:  # nor does it have to
        return None
    try:
        run(small, inputs)
    except Exception:
        return False
    return True


def _trains(model: Any, inputs: Inputs) -> None:
    model.train()
    try:
        loss = sum(t.float().square().mean() for t in tensors_in(dict(model(**inputs))) if t.requires_grad)
        loss.backward()  # type: ignore[union-attr]
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    finally:
        model.zero_grad()
        model.eval()


def _generates(model: Any, inputs: Inputs) -> None:
    model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    rows = {name: each for name, each in sorted(data["rows"].items()) if "not_built" not in each}
    left = {name: each["not_built"] for name, each in sorted(data["rows"].items()) if "not_built" in each}
    done = [each for each in rows.values() if "achieved" in each]
    header = ["model", "class", "can go", "floor", "FLOPs", "error", "trains", "generates"]
    text = [
        "# Architectures of Hugging Face transformers",
        "",
        f"Made by `python -m benchmarks.coverage_transformers`, with transformers {data['transformers']} and its own "
        "tables of models; every class once, small by the names of sizes in its configuration, random weights. Asked: "
        f"{SHARE} % of the FLOPs; where that is out of reach, the smallest that is not (marked ≥). *Trains* and "
        "*generates*: as the original does, where it does.",
        "",
        f"{len(rows)} were built and run: {len(done)} allocated and certified, "
        f"{sum('smallest' not in each for each in done)} of them at {SHARE} %; "
        f"{sum(each['train_step'] is True for each in done)} of the "
        f"{sum(each['train_step'] is not None for each in done)} that can be trained so were, "
        f"{sum(each['generates'] is True for each in done)} of the "
        f"{sum(each['generates'] is not None for each in done)} that generate did, and "
        f"{sum(each['untouched'] for each in done)} originals were as before.",
        "",
        table(header, [_line(name, each) for name, each in rows.items()]),
        "",
        "## Not built so small",
        "",
        *(f"- {name}: {why[:110]}" for name, why in left.items()),
        "",
        where(data["environment"]),
    ]
    return "\n".join(text)


def _line(name: str, found: Row) -> list[str]:
    if "achieved" not in found:
        return [name, found["class"], "", "", "", f"no: {found['failed'][:120]}".replace("|", "/"), "", ""]
    flops = f"{'≥ ' if 'smallest' in found else ''}{100 * found['achieved']:.1f} %"
    error = "" if found["error"] is None else f"{found['error']:.0e}"
    said = {True: "yes", False: "no", None: "–"}
    figures = [f"{100 * found['share']:.0f} %", f"{100 * found['floor']:.1f} %", flops, error]
    return [name, found["class"], *figures, said[found["train_step"]], said[found["generates"]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models that have no row yet."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    chosen = arguments_of("coverage_transformers").parse_args(arguments)
    warnings.simplefilter("ignore")
    known = architectures()
    data = {"rows": {}, **read("coverage_transformers"), "transformers": version("transformers")}

    def measure(name: str) -> Row:
        return {"class": known[name][1], **apart(row, (name, *known[name]), LIMIT)}

    measure_rows("coverage_transformers", data, known, measure, markdown, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
