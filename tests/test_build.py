"""Models by name."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from allocator.errors import FileError, UnknownNameError, UnsupportedModelError
from allocator.io.models import BUILD_ATTRIBUTE, build


def test_torchvision_by_name_with_an_argument() -> None:
    model = build("torchvision:resnet18", num_classes=7)
    assert model.get_submodule("fc").out_features == 7
    assert getattr(model, BUILD_ATTRIBUTE) == {"name": "torchvision:resnet18", "kwargs": {"num_classes": 7}}


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_networks_with_auxiliary_heads_build_without_a_warning(name: str) -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        model = build(f"torchvision:{name}")
    assert any("aux" in path.lower() for path, _ in model.named_modules())


def test_detectors_do_not_fetch_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with torch.device("meta"):
        model = build("torchvision:fasterrcnn_mobilenet_v3_large_fpn")
    assert type(model).__name__ == "FasterRCNN"


def test_timm_by_name() -> None:
    with torch.device("meta"):
        model = build("timm:res2net50_26w_4s", num_classes=3)
    assert model.get_submodule("fc").out_features == 3
    assert getattr(model, BUILD_ATTRIBUTE)["name"] == "timm:res2net50_26w_4s"


def test_factory_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynets.py").write_text("from torch import nn\ndef small(n=2): return nn.Linear(3, n)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build("mynets:small", n=5).out_features == 5
    assert build("torch.nn:Conv2d", in_channels=3, out_channels=4, kernel_size=1).out_channels == 4


def test_recipe_prefix_asks_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("allocator.recipes")
    fake.build = lambda name, **kwargs: nn.Linear(1, kwargs["width"]) if name == "tiny" else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "allocator.recipes", fake)
    assert build("recipe:tiny", width=6).out_features == 6


def test_weights_are_not_part_of_the_recorded_build() -> None:
    model = build("torchvision:squeezenet1_1", weights=None, progress=False)
    assert getattr(model, BUILD_ATTRIBUTE)["kwargs"] == {"progress": False}


def test_a_build_with_live_objects_is_not_recorded() -> None:
    model = build("torchvision:resnet18", norm_layer=nn.BatchNorm2d)
    assert not hasattr(model, BUILD_ATTRIBUTE)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50", "needs a prefix"),
        ("torchvision:", "needs a prefix"),
        ("torchvision:resnet5", "did you mean .*resnet50"),
        ("timm:res2net50_26w_4z", "did you mean .*res2net50_26w_4s"),
        ("torchvison:resnet50", "did you mean torchvision"),
        ("no_such_package_here:factory", "known: hf, recipe, timm, torchvision"),
        ("torch.nn:Convv2d", "did you mean .*Conv2d"),
    ],
)
def test_unknown_names_suggest_near_ones(name: str, said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        build(name)


@pytest.mark.parametrize(("name", "kind"), [("builtins:dict", "dict"), ("math:pi", "float")])
def test_what_is_not_a_module_is_refused(name: str, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=kind):
        build(name)


@pytest.mark.parametrize(
    ("name", "library", "said"),
    [
        ("torchvision:resnet18", "torchvision.models", r"neuron-allocator\[zoo\]"),
        ("timm:resnet18", "timm", r"neuron-allocator\[zoo\]"),
        ("hf:ResNetConfig", "transformers", "pip install transformers"),
    ],
)
def test_missing_library_says_what_to_install(
    name: str, library: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(wanted: str, package: str | None = None) -> types.ModuleType:
        if wanted == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library.partition(".")[0])
        return real(wanted, package)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UnsupportedModelError, match=said):
        build(name)


def test_factory_whose_import_lacks_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedModelError, match="a_package_nobody_has"):
        build("needy:f")


class TestTransformers:
    """Only where transformers is installed."""

    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("transformers")

    def test_from_a_config_class(self) -> None:
        model = build("hf:ResNetConfig", depths=[1, 1], hidden_sizes=[8, 16], embedding_size=4, num_labels=3)
        assert type(model).__name__ == "ResNetForImageClassification"

    def test_from_a_folder(self, tmp_path: Path) -> None:
        small = build("hf:ResNetConfig", depths=[1], hidden_sizes=[8], embedding_size=4)
        small.config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
        assert type(build(f"hf:{tmp_path}")) is type(small)

    def test_unknown_config_and_folder(self) -> None:
        with pytest.raises(UnknownNameError, match="ResNetConfig"):
            build("hf:ResNettConfig")
        with pytest.raises(FileError, match="nothing is downloaded"):
            build("hf:someone/some-model")
