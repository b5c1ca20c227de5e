"""Models by name."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allocator import adapters
from allocator.errors import FileError, UnknownNameError, UnsupportedModelError
from allocator.io.models import BUILD_ATTRIBUTE, build, register_builder


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


def test_recipe_prefix_asks_the_recipes() -> None:
    model = build("recipe:resnet-small", num_classes=6)
    assert model.get_submodule("fc").out_features == 6
    assert getattr(model, BUILD_ATTRIBUTE) == {"name": "recipe:resnet-small", "kwargs": {"num_classes": 6}}


@pytest.mark.parametrize("prefix", ["recipe", "mynets"])
def test_a_prefix_has_one_builder_and_is_one_that_messages_list(prefix: str) -> None:
    with pytest.raises(ValueError, match=f"{prefix}: has a builder already, or is not one of torchvision, timm, rec"):
        register_builder(prefix, nn.Linear)


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
        ("hf:ResNetConfig", "transformers", r"pip install 'neuron-allocator\[language\]'"),
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


class Config:
    """Stands for transformers' config classes."""

    def __init__(self, num_channels: int = 3, image_size: object = None) -> None:
        self.num_channels, self.image_size = num_channels, image_size


class BareConfig(Config):
    """One whose models classify nothing."""


class LoneConfig(Config):
    """One without any model."""


class Classifier(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.conv = config, nn.Conv2d(config.num_channels, 4, 1)

    @classmethod
    def from_pretrained(cls, folder: str, config: Config, **options: object) -> Classifier:
        model: Any = cls(config)
        model.read = {"folder": folder, **options}
        return model


Classifier.__module__ = "transformers.models.one"


class Bare(nn.Linear):
    def __init__(self, config: Config) -> None:
        super().__init__(config.num_channels, 2)


class TestStandInForTransformers:
    """What is asked of transformers, of a module in its place that needs no installation."""

    @pytest.fixture(autouse=True)
    def _library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library: Any = types.ModuleType("transformers")
        library.NetConfig, library.BareConfig, library.LoneConfig = Config, BareConfig, LoneConfig
        library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING = {Config: Classifier}
        library.MODEL_MAPPING = {Config: Bare, BareConfig: (Bare, Classifier)}

        def from_pretrained(folder: str, **options: object) -> Config:
            assert options.pop("local_files_only") is True
            assert options.pop("trust_remote_code") is False
            return Config(**options)  # type: ignore[arg-type]

        library.AutoConfig = types.SimpleNamespace(from_pretrained=from_pretrained)
        monkeypatch.setitem(sys.modules, "transformers", library)

    def test_the_classifier_of_a_config_class_or_its_first_bare_model(self) -> None:
        model = build("hf:NetConfig", num_channels=5)
        assert isinstance(model, Classifier)
        assert model.conv.in_channels == 5
        assert type(build("hf:BareConfig")) is Bare

    def test_names_that_are_not_there(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown transformers config 'NettConfig': did you mean NetConfig"):
            build("hf:NettConfig")
        with pytest.raises(UnsupportedModelError, match="transformers has no model for LoneConfig"):
            build("hf:LoneConfig")
        with pytest.raises(FileError, match=r"hf:someone/net is neither a config class .* nothing is downloaded"):
            build("hf:someone/net")

    def test_weights_of_a_folder_are_read_on_request_and_from_no_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert not hasattr(build(f"hf:{tmp_path}", num_channels=2), "read")
        model: Any = build(f"hf:{tmp_path}", num_channels=2, pretrained=True)
        assert model.config.num_channels == 2
        assert model.read == {"folder": str(tmp_path), "local_files_only": True, "use_safetensors": True}

    @pytest.mark.parametrize(
        ("config", "shape"),
        [
            (Config(2, 32), (1, 2, 32, 32)),
            (Config(3, [16, 24]), (1, 3, 16, 24)),
            (Config(3), (1, 3, 224, 224)),
        ],
    )
    def test_a_config_says_what_its_model_takes(self, config: Config, shape: tuple[int, ...]) -> None:
        inputs = adapters.example_inputs(Classifier(config))
        assert inputs is not None
        arguments, source = inputs
        assert isinstance(arguments, tuple)
        (image,) = arguments
        assert (tuple(image.shape), source) == (shape, "the model's config")

    def test_a_config_without_channels_says_nothing(self) -> None:
        model: Any = Classifier(Config())
        model.config = object()
        assert adapters.example_inputs(model) is None


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
