"""Models of Hugging Face transformers: cut as built, generating as before, saved and built again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import allocator
from allocator.adapters.hf_config import _head_width
from allocator.cli import main
from benchmarks.hugging_face_models import DIFFUSERS, GENERATORS, TRANSFORMERS, masked, tiny, tokens

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

QUICK = ("Llama", "GPT2", "Phi3", "Mixtral", "T5")
SWEEP = pytest.mark.sweep
EVEN: dict[str, Any] = {"policy": "uniform", "fill": False}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        first: torch.Tensor = model(**inputs)[0]
    return first


def generated(model: Any, inputs: dict[str, torch.Tensor], *, use_cache: bool) -> Any:
    """Token ids and their logits, without sampling."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    return model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)


def check_generates_like_the_masked_original(name: str) -> None:
    model, inputs = tiny(name)
    result = allocator.allocate(model, "60%", example_inputs=inputs)
    original = masked(model, result.allocation.kept)
    for use_cache in (True, False):
        expected, got = (generated(each, inputs, use_cache=use_cache) for each in (original, result.model))
        assert torch.equal(expected.sequences, got.sequences)
        torch.testing.assert_close(torch.stack(expected.logits), torch.stack(got.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_a_language_model_generates_as_its_original_with_the_dropped_neurons_masked(name: str) -> None:
    check_generates_like_the_masked_original(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in GENERATORS if name not in QUICK])
def test_every_language_model_generates_as_its_original_masked(name: str) -> None:
    check_generates_like_the_masked_original(name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {"intermediate_size", "num_attention_heads", "num_key_value_heads"}),
        ("Phi3", {"intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}),
        ("Mixtral", {"intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}),
        ("T5", {"d_ff", "num_heads"}),
        ("ViT", {"intermediate_size", "num_attention_heads", "head_dim"}),
    ],
)
def test_one_width_for_all_layers_is_said_by_the_configuration(name: str, fields: set[str], tmp_path: Path) -> None:
    model, inputs = tiny(name)
    before = model.config.to_dict()  # type: ignore[operator, union-attr]
    result = allocator.allocate(model, "60%", example_inputs=inputs, **EVEN)
    small: Any = result.model
    assert {key.removeprefix("config.") for key in result.allocation.attributes[""]} == fields
    assert not any("from_pretrained" in note for note in result.notes)
    assert model.config.to_dict() == before  # type: ignore[operator, union-attr]
    small.save_pretrained(tmp_path)
    for again in (type(small).from_pretrained(tmp_path), allocator.load(f"hf:{tmp_path}")):
        assert type(again) is type(model)
        torch.testing.assert_close(outputs(again.eval(), inputs), outputs(small.eval(), inputs))
    assert result.flops_after < result.flops_before == result.graph.flops


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_layers_of_several_widths_are_loaded_from_their_folder(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name)
    result = allocator.allocate(model, "50%", example_inputs=inputs, at_least=0)
    small: Any = result.model
    assert any("allocator.load('hf:FOLDER')" in note for note in result.notes)
    small.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(small).from_pretrained(tmp_path)
    again: Any = allocator.load(f"hf:{tmp_path}")
    assert type(again) is type(model)
    torch.testing.assert_close(outputs(again.eval(), inputs), outputs(small.eval(), inputs))
    twice = allocator.allocate(again, "80%", example_inputs=inputs, at_least=0)
    (tmp_path / "twice").mkdir()
    twice.model.save_pretrained(tmp_path / "twice")  # type: ignore[operator]
    third = allocator.build(f"hf:{tmp_path / 'twice'}").eval()
    torch.testing.assert_close(outputs(third, inputs), outputs(twice.model.eval(), inputs))


def two_keys() -> tuple[Any, dict[str, torch.Tensor]]:
    """Four heads that share two keys and values, as of Qwen2's small models: they get narrower."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": tokens()}


def test_narrower_heads_keep_their_frequencies_in_a_folder(tmp_path: Path) -> None:
    """They are computed by the constructor, and not saved."""
    model, inputs = two_keys()
    for budget in ("60%", "80%"):
        result = allocator.allocate(model, budget, example_inputs=inputs, at_least=0)
        small: Any = result.model
        assert result.certificate.ok
        assert len(small.model.rotary_emb.inv_freq) < 8
        small.save_pretrained(tmp_path / budget)
        model = allocator.load(f"hf:{tmp_path / budget}").eval()
        torch.testing.assert_close(outputs(model, inputs), outputs(small.eval(), inputs))
        assert small.generate(**inputs, max_new_tokens=3).shape == (1, 15)


def test_heads_of_a_model_without_values_keep_their_width_where_frequencies_are_not_saved(tmp_path: Path) -> None:
    model, inputs = two_keys()
    model.save_pretrained(tmp_path / "whole")
    allocator.allocate_folder(tmp_path / "whole", tmp_path / "small", "70%", example_inputs=inputs)
    small: Any = allocator.load(f"hf:{tmp_path / 'small'}")
    assert len(small.model.rotary_emb.inv_freq) == 8
    assert outputs(small.eval(), inputs).isfinite().all()


@pytest.mark.parametrize("buffers", [{"model.rotary_emb.inv_freq": [9]}, {"no.where": [0]}, 3])
def test_a_damaged_record_of_buffers_is_a_file_error(buffers: Any, tmp_path: Path) -> None:
    model, inputs = two_keys()
    small: Any = allocator.allocate(model, "60%", example_inputs=inputs).model
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["neuron_allocator"]["buffers"] = buffers
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(allocator.FileError, match="is damaged"):
        allocator.load(f"hf:{tmp_path}")


@pytest.mark.parametrize(("name", "field"), [("GPT2", "n_inner"), ("Bert", "intermediate_size")])
def test_where_a_head_is_as_wide_as_their_number_allows_widths_of_mlps_follow(name: str, field: str) -> None:
    """GPT-2 leaves the field open in its configuration: four times the hidden size."""
    model, inputs = tiny(name)
    kept = ["*.attn.*", "*.attention.*", "*.pooler.*"]
    result = allocator.allocate(model, "75%", example_inputs=inputs, exclude=kept, **EVEN)
    assert result.allocation.attributes[""].keys() == {f"config.{field}"}


def test_layers_that_stay_alike_are_said_by_the_configuration() -> None:
    model, inputs = tiny("Llama")
    alike = [["*.mlp.gate_proj"], ["*.self_attn.q_proj"]]
    result = allocator.allocate(model, "60%", example_inputs=inputs, same=alike, at_least=0)
    assert result.allocation.attributes[""].keys() >= {"config.intermediate_size"}


def test_loose_norms_narrow_the_hidden_width() -> None:
    model, inputs = tiny("Llama")
    result = allocator.allocate(model, "60%", example_inputs=inputs, norms="loose", **EVEN)
    small: Any = result.model
    assert small.config.hidden_size == small.model.norm.weight.shape[0] < 64
    assert generated(small, inputs, use_cache=True).sequences.shape == (1, 18)


def test_a_number_computed_from_the_hidden_width_keeps_the_configuration_as_it_was() -> None:
    """Gemma scales embeddings by the root of the width; built anew with another one it would be another network."""
    model, inputs = tiny("Gemma")
    result = allocator.allocate(model, "60%", example_inputs=inputs, norms="loose", **EVEN)
    assert result.model.config.hidden_size == 64  # type: ignore[union-attr]
    assert any("allocator.load('hf:FOLDER')" in note for note in result.notes)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_configuration_says_what_a_model_takes(name: str) -> None:
    model, inputs = tiny(name)
    inferred = allocator.trace(model).inputs
    assert "the model's config" in (inferred.assumed or "")
    assert {key for key in inferred.kwargs if key != "pixel_values"} <= inputs.keys()


def test_a_folder_is_built_as_the_class_that_it_names_with_its_weights(tmp_path: Path) -> None:
    model: Any = tiny("Bert")[0]
    model.save_pretrained(tmp_path)
    again: Any = allocator.build(f"hf:{tmp_path}")
    assert type(again) is type(model)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    fresh: Any = allocator.build(f"hf:{tmp_path}", pretrained=False)
    assert not torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    tiny("Bert")[0].config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(allocator.errors.FileError, match=r"holds its weights as a pickle .*pretrained=False"):
        allocator.build(f"hf:{tmp_path}")


def test_a_damaged_record_of_widths_is_told(tmp_path: Path) -> None:
    model, inputs = tiny("Llama")
    small: Any = allocator.allocate(model, "50%", example_inputs=inputs, at_least=0).model
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["neuron_allocator"]["shapes"]["model.norm.weight"] = [4096]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(allocator.errors.FileError, match=r"config\.json of this LlamaForCausalLM is damaged"):
        allocator.load(f"hf:{tmp_path}")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_narrow_alike_however_they_are_run(implementation: str) -> None:
    """The fused product of all experts takes widths of whole sixteen bytes, and is not counted by fvcore."""
    model, inputs = tiny("Qwen3Moe")
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    result = allocator.allocate(model, "60%", example_inputs=inputs, at_least=0)
    experts: Any = result.allocation.kept["model.layers.0.mlp.experts.down_proj"][2]
    assert len(experts) < 48
    assert len(experts) % 8 == 0
    torch.testing.assert_close(outputs(result.model, inputs), outputs(masked(model, result.allocation.kept), inputs))


def test_rotary_embeddings_are_no_place_where_branches_meet() -> None:
    model, inputs = tiny("Llama")
    graph = allocator.trace(model, inputs)
    assert not [block for block in graph.blocks if block.name.endswith("self_attn")]


def test_criteria_look_at_data_and_what_is_left_is_refitted() -> None:
    model, _ = tiny("Llama")
    data = [{"input_ids": (torch.arange(12) * step)[None] % 96} for step in range(1, 25)]
    result = allocator.allocate(model, "70%", data=data, recover=True)
    assert result.allocation.criterion == "surgeon"
    assert result.recovery is not None
    assert result.recovery.after <= result.recovery.before


def test_the_trainer_trains_a_result(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs = tiny("Llama")
    small: Any = allocator.allocate(model, "60%", example_inputs=inputs).model
    before = small.lm_head.weight.detach().clone()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": tokens()[0], "labels": tokens()[0]} for _ in range(4)]
    transformers.Trainer(small, arguments, train_dataset=rows).train()
    assert not torch.equal(small.lm_head.weight, before)
    assert list(tmp_path.glob("checkpoint-2/*.safetensors"))
    again: Any = allocator.load(f"hf:{tmp_path / 'checkpoint-2'}")
    assert torch.equal(again.lm_head.weight, small.lm_head.weight)


def adapted(model: Any) -> Any:
    """With low-rank adapters that do something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def test_low_rank_adapters_follow_and_keep_their_rank() -> None:
    model, inputs = tiny("Llama")
    result = allocator.allocate(adapted(model), "60%", example_inputs=inputs, at_least=0)
    small: Any = result.model
    layer = small.base_model.model.model.layers[0].mlp.down_proj
    assert layer.lora_A["default"].weight.shape == (8, layer.in_features)
    assert layer.in_features == layer.base_layer.in_features < 96
    expected = outputs(small, inputs)
    torch.testing.assert_close(outputs(small.merge_and_unload(), inputs), expected)


def test_low_rank_adapters_are_cut_where_they_are_named() -> None:
    model, inputs = tiny("Llama")
    result = allocator.allocate(adapted(model), "99%", example_inputs=inputs, include="*.lora_A.*", at_least=0)
    small: Any = result.model
    layers = [module for module in small.modules() if hasattr(module, "lora_A")]
    assert any(layer.r["default"] == layer.lora_A["default"].out_features < 8 for layer in layers)
    assert outputs(small, inputs).shape == (1, 12, 96)


def test_adapters_are_put_on_a_result_and_trained() -> None:
    model, inputs = tiny("Llama")
    small = adapted(allocator.allocate(model, "60%", example_inputs=inputs).model)
    small.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", [name if name == "DiT" else pytest.param(name, marks=SWEEP) for name in DIFFUSERS])
def test_models_of_diffusers_are_cut_as_built(name: str) -> None:
    pytest.importorskip("diffusers")
    model, inputs = tiny(name)
    says = name in ("UNet2D", "UNet2DCondition", "DiT")  # the configuration of others does not tell what they take
    result = allocator.allocate(model, "60%", example_inputs=None if says else inputs)
    assert result.certificate.ok
    assert 0.59 < result.flops_after / result.flops_before <= 0.6
    assert outputs(result.model, inputs).shape == outputs(model, inputs).shape


def test_a_folder_in_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = tiny("Llama")[0]
    model.save_pretrained(tmp_path)
    choice = tmp_path / "choice.json"
    arguments = [f"hf:{tmp_path}", "--flops", "70%", "--input-size", "1x20", "--allocation", str(choice)]
    assert main(["allocate", *arguments, "-o", str(tmp_path / "small.safetensors")]) == 0
    assert allocator.Allocation.load(choice).input_shapes == [[1, 20]]
    assert main(["verify", f"hf:{tmp_path}", str(tmp_path / "small.safetensors"), str(choice)]) == 0
    assert "the original minus the removed neurons" in capsys.readouterr().out


def test_an_eight_billion_network_is_planned_without_its_weights() -> None:
    """A thirty-second of its depth; benchmarks/large.py takes all of it."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(vocab_size=128256, num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    graph = allocator.trace(model)
    scores = allocator.score(graph, np.random.default_rng(0).random(graph.size))
    plan = allocator.plan(graph, scores, "80%", policy="uniform", scope="all")
    assert plan.flops_after <= 0.8 * graph.flops


def test_a_configuration_that_refuses_what_differs_from_layer_to_layer_says_no_width_of_heads() -> None:
    class Heterogeneous:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"{name!r} may vary across layers")

    assert _head_width(Heterogeneous()) == {}
