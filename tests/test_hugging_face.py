"""Models of Hugging Face transformers: cut as built, generating as before, saved and built again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import GENERATORS, TRANSFORMERS, masked, tiny
from torch import nn

import allocator

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

QUICK = ("Llama", "GPT2", "Phi3")
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
        ("Qwen2", {"intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}),
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
