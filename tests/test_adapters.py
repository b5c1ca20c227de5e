"""What is particular to a library's blocks: declared once, applied to any of its models."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import allocator
from allocator import adapters
from allocator.adapters import Adapter, Kept

pytestmark = pytest.mark.filterwarnings("ignore::allocator.AllocatorWarning")


class Table(nn.Module):
    """Its forward reads from a table how the channels are split: no int attribute has these sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"first": 6, "second": 10}
        self.write, self.norm, self.read = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        self.norm.weight = nn.Parameter(0.5 + torch.arange(16) * 7 % 16 / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.norm(self.write(x)).split(list(self.table.values()), dim=1)
        return self.read(torch.cat([a.sigmoid(), b.relu()], 1))


IMAGE = torch.randn(1, 3, 4, 4)


def table_sizes(module: nn.Module, kept: Kept) -> Mapping[str, object]:
    """The table follows the two runs of rows of the convolution that writes."""
    rows, first = kept("write.weight", 0), module.table["first"]  # type: ignore[index]
    return {"table": {"first": int(rows[:first].sum()), "second": int(rows[first:].sum())}}


@pytest.fixture
def _own() -> Iterator[None]:
    """The adapter of this file's block, for one test."""
    adapters.register(Table)(table_sizes)
    yield
    adapters.unregister(Table)


@pytest.mark.usefixtures("_own")
def test_a_registered_block_drops_its_lowest_neurons_wherever_they_are() -> None:
    model = Table()
    result = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="bn_scale")
    table = result.model.table
    assert isinstance(table, dict)
    rows = result.allocation.kept["write.weight"][0]
    assert rows is not None
    best = sorted(range(16), key=lambda i: 7 * i % 16)[-len(rows) :]
    assert rows == sorted(best)
    assert table == {"first": sum(i < 6 for i in rows), "second": sum(i >= 6 for i in rows)}
    assert model.table == {"first": 6, "second": 10}
    again = allocator.apply(model, allocator.Allocation.from_json(result.allocation.to_json()))
    assert torch.equal(again.eval()(IMAGE), result.model.eval()(IMAGE))


def test_without_it_the_report_names_module_operator_attribute_and_remedy() -> None:
    """All of the block stays, so there is a second one beside it that can be allocated."""
    model = nn.Sequential(Table(), nn.Conv2d(4, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1))
    nn.init.uniform_(model[2].weight, 0.5, 1.5)  # type: ignore[arg-type]
    result = allocator.allocate(model, "50%", example_inputs=IMAGE)
    assert result.certificate.ok
    note = next(note for note in result.notes if "split" in note)
    assert "split_with_sizes.default in 0 stay" in note
    assert "[6, 10]" in note
    assert f"allocator.adapters.register('{__name__}.Table')" in note
    assert "docs/extending.md" in note


class Forgetful(nn.Module):
    """Sizes in a list, in an order of its own, which nothing but the forward's failing tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 4, 3]
        self.write, self.norm, self.read = nn.Linear(5, 48), nn.BatchNorm1d(48), nn.Linear(48, 2)
        self.norm.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.norm(self.write(x)).view(-1, *(self.sizes[i] for i in (0, 2, 1))).flatten(1))


def test_neurons_frozen_by_tracing_are_named_with_the_attribute() -> None:
    beside = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))
    nn.init.uniform_(beside[1].weight, 0.5, 1.5)  # type: ignore[arg-type]
    result = allocator.allocate(nn.Sequential(Forgetful(), beside), "70%", example_inputs=torch.randn(2, 5))
    assert result.certificate.ok
    note = next(note for note in result.notes if "stay" in note)
    assert "view.default in 0 stay" in note
    assert "its forward may read sizes=[4, 4, 3]" in note
    assert f"allocator.adapters.register('{__name__}.Forgetful')" in note


def test_importing_the_package_loads_no_library_and_using_one_loads_its_file_only() -> None:
    script = """
import sys, torch, allocator
ours = {"allocator.adapters.library", "allocator.adapters.stand_ins", "allocator.adapters.hub"}
files = lambda: {m.rpartition(".")[2] for m in sys.modules.keys() - ours if m.startswith("allocator.adapters.")}
libraries = {"timm", "torchvision", "transformers", "monai", "huggingface_hub"}
assert not files() and not libraries & sys.modules.keys(), files()
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 3, 1))
allocator.allocate(model, "50%", criterion="magnitude", example_inputs=torch.zeros(1, 3, 4, 4))
assert files() == {"torch_attention"} and not {"timm", "torchvision"} & sys.modules.keys(), files()
with torch.device("meta"):
    allocator.trace(allocator.build("torchvision:resnet18"))
assert files() == {"torch_attention", "torchvision"} and "timm" not in sys.modules, files()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_goes_by_whole_heads_and_keeps_its_scale(fused: bool, batch: int) -> None:
    attention = pytest.importorskip("timm.layers").Attention

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.last = attention(16, num_heads=4, qkv_bias=True), nn.Linear(16, 5)
            self.attn.fused_attn = fused

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x + self.attn(x))

    result = allocator.allocate(Net(), "60%", criterion="magnitude", example_inputs=torch.randn(batch, 7, 16))
    small: Any = result.model.attn
    assert (small.num_heads, small.head_dim, small.scale, small.attn_dim) == (2, 4, 0.5, 8)
    rows = result.allocation.kept["attn.qkv.weight"][0]
    assert rows is not None
    columns = result.allocation.kept["attn.proj.weight"][1]
    assert columns == [i for i in range(16) if i in rows]  # a head's values lie where its queries do
    assert rows == [i + 16 * part for part in range(3) for i in columns]
    assert result.certificate.ok
    assert result.certificate.relative_error is not None
    assert result.certificate.relative_error < 1e-12


@pytest.mark.parametrize("block", ["AttentionCl", "Attention2d"])
def test_a_table_of_relative_positions_follows_the_heads(block: str) -> None:
    """MaxViT's and CoAtNet's attention, one of them after and one before its channels."""
    blocks = pytest.importorskip("timm.models.maxxvit")
    bias = functools.partial(pytest.importorskip("timm.layers").RelPosBias, window_size=(3, 3))
    last = block == "AttentionCl"
    attention: Any = getattr(blocks, block)(16, dim_head=4, rel_pos_cls=bias)
    model = nn.Sequential(nn.Linear(16, 16) if last else nn.Conv2d(16, 16, 1), attention)
    nn.init.normal_(attention.rel_pos.relative_position_bias_table)
    image = torch.randn(2, 3, 3, 16) if last else torch.randn(2, 16, 3, 3)
    result = allocator.allocate(model, "70%", criterion="magnitude", example_inputs=image, exclude=["0"])
    small: Any = result.model[1]  # type: ignore[index]
    heads = small.num_heads
    assert heads < 4
    assert small.qkv.weight.shape[0] == 3 * 4 * heads
    assert small.rel_pos.bias_shape == (9, 9, heads)
    assert small.rel_pos.relative_position_bias_table.shape == (25, heads)
    assert not any(" stay" in note for note in result.notes), result.notes
    stay = result.allocation.kept["1.proj.weight"][1]
    assert stay is not None
    with torch.no_grad():  # by hand: the projection of the original without the columns that read the dropped heads
        attention.proj.weight[:, [i for i in range(16) if i not in stay]] = 0
    torch.testing.assert_close(result.model(image), model(image))


@pytest.mark.parametrize("masked", [True, False])
def test_hiera_attention_loses_whole_heads(masked: bool) -> None:
    """Its `dim_out` is the width of its heads, though the stream is as wide."""
    attention: Any = pytest.importorskip("timm.models.hiera").MaskUnitAttention(
        16, 16, heads=4, q_stride=2, window_size=2, use_mask_unit_attn=masked
    )
    model: Any = nn.Sequential(nn.Linear(16, 16), attention)
    tokens = torch.randn(2, 8, 16)
    result = allocator.allocate(model, "70%", criterion="magnitude", example_inputs=tokens, exclude=["0"])
    small: Any = result.model[1]  # type: ignore[index]
    assert 1 < small.heads < 4
    assert (small.dim_out, small.head_dim, small.qkv.out_features) == (4 * small.heads, 4, 12 * small.heads)
    assert not any(" stay" in note for note in result.notes), result.notes
    stay = result.allocation.kept["1.proj.weight"][1]
    assert stay is not None
    with torch.no_grad():  # by hand: the projection of the original without the columns that read the dropped heads
        attention.proj.weight[:, [i for i in range(16) if i not in stay]] = 0
    torch.testing.assert_close(result.model(tokens), model(tokens))


def test_res2net_width_becomes_a_list() -> None:
    block = pytest.importorskip("timm.models.res2net").Bottle2neck
    down = nn.Conv2d(32, 64, 1)
    model = nn.Sequential(block(32, 16, base_width=128, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU, downsample=down))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    result = allocator.allocate(model, "50%", example_inputs=torch.randn(1, 32, 4, 4))
    width = result.model[0].width  # type: ignore[index]
    rows = result.allocation.kept["0.conv1.weight"][0]
    assert rows is not None
    expected = [sum(32 * i <= row < 32 * i + 32 for row in rows) for i in range(4)]
    assert width == expected
    assert len(set(expected)) > 1
    assert allocator.allocate(result.model, "80%", example_inputs=torch.randn(1, 32, 4, 4)).certificate.ok


@pytest.mark.parametrize("channels", [16, 15])
def test_a_ghost_module_cuts_off_what_it_cut_off(channels: int) -> None:
    """15 channels are 8 that are written and 8 that are made of them, the last of which is left away."""
    ghost = pytest.importorskip("timm.models.ghostnet").GhostModule
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), ghost(12, channels), nn.Conv2d(channels, 4, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, scope="all")
    small: Any = result.model.get_submodule("2")
    assert result.certificate.ok
    written, made = small.primary_conv[0].out_channels, small.cheap_operation[0].out_channels
    if channels == 16:
        assert small.out_chs == written + made < 16
    else:
        # As a bound of a slice, a number beyond what there is means all; torch 2.6 records such slices, and lets it be.
        assert min(small.out_chs, written + made) == result.model.get_submodule("3").in_channels


class Misleading(nn.Module):
    """Two attributes have the size of its channels; the first is a number that it scales by."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.width = 12, 12
        self.write, self.norm, self.read = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)
        self.norm.weight = nn.Parameter(torch.linspace(0.5, 1.5, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.norm(self.write(x)).view(-1, self.width, 1).flatten(1)) * self.factor


def test_an_attribute_that_did_not_help_is_taken_back() -> None:
    model = Misleading()
    result = allocator.allocate(model, "60%", example_inputs=torch.randn(2, 5))
    small: Any = result.model
    assert result.certificate.ok
    assert small.factor == 12
    assert small.width == small.write.out_features < 12
    assert not any("stay" in note for note in result.notes)


def test_num_features_follow_what_the_classifier_reads() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    result = allocator.allocate(model, "40%", example_inputs=torch.randn(1, 3, 32, 32), scope="all")
    assert result.model.num_features == result.model.get_classifier().in_features < 512  # type: ignore[operator]
    assert result.model.forward_features(torch.randn(1, 3, 32, 32)).shape[1] == result.model.num_features  # type: ignore[operator]


def test_num_features_follow_the_layer_that_widens_them() -> None:
    """MobileNetV3 has a last convolution between its features and what its classifier reads."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    image = torch.randn(1, 3, 32, 32)
    result = allocator.allocate(model, "50%", example_inputs=image, criterion="magnitude", scope="all")
    small: Any = result.model
    assert small.num_features == small.forward_features(image).shape[1] < model.num_features == 288
    assert small.head_hidden_size == small.get_classifier().in_features < model.head_hidden_size == 1024


def test_heads_of_a_detector_keep_their_outputs() -> None:
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = allocator.build("torchvision:retinanet_resnet50_fpn", num_classes=7)
    layers = adapters.output_layers(dict(model.named_modules()))
    assert layers == ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"]
    graph = allocator.trace(model)
    assert "a detector takes a list of images" in graph.notes[0]
    for name in layers:
        label = graph.slots.labels(f"{name}.weight")[0]
        assert label is not None
        assert (graph.unit_of_slot[label] == -1).all()


def test_keypoints_and_masks_are_found_without_the_sizes_of_boxes() -> None:
    """Where boxes have the size of their heatmaps, and of the image, as torchvision finds them."""
    heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    resize = pytest.importorskip("torchvision.models.detection.transform")
    maps, corner = torch.randn(5, 17, 56, 56), torch.randint(0, 50, (5, 2)).float()
    boxes = torch.cat([corner, corner + 56], 1)
    keypoints = heads.heatmaps_to_keypoints(maps, boxes)
    masks, image = torch.rand(2, 1, 6, 6), torch.tensor([[0.0, 0.0, 24.0, 24.0]]).expand(2, 4)
    pasted = resize.paste_masks_in_image(masks, image, (24, 24))
    with adapters.while_tracing():
        for a, b in zip(heads.heatmaps_to_keypoints(maps, boxes), keypoints, strict=True):
            torch.testing.assert_close(a, b)
        whole = resize.paste_masks_in_image(masks, image, (24, 24))
    assert whole.shape == pasted.shape
    assert float((whole - pasted).abs().mean()) < 0.1  # torchvision pads them by a pixel
    assert resize.paste_masks_in_image is heads.paste_masks_in_image


@pytest.mark.parametrize("name", ["keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_detectors_with_a_third_head_need_no_values(name: str) -> None:
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = allocator.build(f"torchvision:{name}")
    model.transform.min_size = (64,)  # type: ignore[union-attr]
    assert allocator.trace(model, ([torch.rand(3, 64, 64)],)).flow.trace.mode == "meta"


def test_a_head_stays_whatever_is_done_with_what_it_gives() -> None:
    model = nn.Sequential(Table(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    free = allocator.trace(model, IMAGE)
    adapters.register(Table, Adapter(outputs=lambda _: ["read"]))
    try:
        held = allocator.trace(model, IMAGE)
    finally:
        adapters.unregister(Table)
    assert free.size - held.size == 4
    assert ("a head of the model in 0.read", 4) in held.reasons()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (lambda m, kept: {"tabel": {}}, r"Table, asked about the model, gives tabel, which the module does not have"),
        (lambda m, kept: {"table": kept("wirte.weight", 0)}, r"asked about the model, raised AttributeError: .*wirte"),
        (lambda m, kept: 1 / 0, r"raised ZeroDivisionError"),
    ],
)
def test_an_adapter_that_does_not_fit_says_so(sizes: adapters.Sizes, said: str) -> None:
    adapters.register(Table)(sizes)
    try:
        with pytest.raises(allocator.AdapterError, match=said):
            allocator.allocate(Table(), "50%", example_inputs=IMAGE)
    finally:
        adapters.unregister(Table)


def test_a_class_has_one_adapter_and_a_package_is_second_to_it() -> None:
    name = f"{__name__}.Table"
    adapters.register([f"{__name__}.*"], Adapter(norm_scale="v"))
    try:
        assert adapters.find(Table()) == Adapter(norm_scale="v")
        adapters.register(name, Adapter(norm_scale="w"))
        assert adapters.find(Table()) == Adapter(norm_scale="w")
        with pytest.raises(ValueError, match="has an adapter already"):
            adapters.register(Table, Adapter())
    finally:
        adapters.unregister(Table)
        adapters.unregister(f"{__name__}.*")


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("torchvision:inception_v3", [(1, 3, 299, 299)]),
        ("torchvision:r3d_18", [(1, 3, 16, 112, 112)]),
        ("torchvision:s3d", [(1, 3, 16, 224, 224)]),
        ("torchvision:mvit_v2_s", [(1, 3, 16, 224, 224)]),
        ("torchvision:raft_small", [(1, 3, 128, 128)] * 2),
        ("timm:vit_tiny_patch16_384", [(1, 3, 384, 384)]),
    ],
)
def test_a_library_knows_what_its_models_take(name: str, shapes: list[tuple[int, ...]]) -> None:
    from allocator.tracing.inputs import infer_inputs

    with torch.device("meta"):
        model = allocator.build(name)
    inputs = infer_inputs(model)
    assert [tuple(t.shape) for t in inputs.tensors()] == shapes
    assert all(t.is_meta for t in inputs.tensors())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "densenet121", "efficientnet_b0"])
def test_what_timm_says_of_its_stages_follows(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    before = copy.deepcopy(model.feature_info)
    small: Any = allocator.allocate(model, "50%", certify=False, criterion="random", policy="global").model
    assert model.feature_info == before
    returned: dict[str, int] = {}
    for stage in small.feature_info:
        path = stage["module"]
        small.get_submodule(path).register_forward_hook(
            lambda _, __, output, path=path: returned.__setitem__(path, output.shape[1])
        )
    with torch.no_grad():
        small(torch.zeros(1, 3, 64, 64))
    assert {stage["module"]: stage["num_chs"] for stage in small.feature_info} == returned
    assert small.feature_info != before
    assert small.feature_info[-1]["num_chs"] < before[-1]["num_chs"]


class Trainer(nn.Module):
    """A wrapper whose `train` would start a training, and whose `eval` is no change of mode either."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> Trainer:
        raise AssertionError("a training was started")

    def eval(self) -> Trainer:
        raise AssertionError("an evaluation was started")


@pytest.fixture
def _wrapper() -> Iterator[None]:
    adapters.register(
        Trainer, Adapter(network=lambda wrapper: wrapper.network, wrap=lambda _, network: Trainer(network))
    )
    yield
    adapters.unregister(Trainer)


@pytest.mark.usefixtures("_wrapper")
def test_a_wrapper_is_never_run_and_comes_back_around_the_smaller_network(tmp_path: Path) -> None:
    given = Trainer(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)))
    data = torch.rand(8, 3, 8, 8)
    result = allocator.allocate(given, "50%", data=data, example_inputs=data[:1], recover=True)
    assert isinstance(result.model, Trainer)
    assert result.model is not given
    assert result.model.network[0].out_channels < given.network[0].out_channels == 16  # type: ignore[index]
    assert allocator.verify(given, result.model, result.allocation, example_inputs=data[:1]).ok
    assert isinstance(allocator.recover(result, data).model, Trainer)
    assert isinstance(allocator.apply(given, result.allocation), Trainer)
    assert allocator.latency(given, data[:1], threads=1).seconds > 0
    allocator.save(result, tmp_path / "small.safetensors")
    loaded = allocator.load(tmp_path / "small.safetensors", model=given)
    assert isinstance(loaded, Trainer)
    assert torch.equal(loaded.network(data), result.model.network(data))
    seen: list[nn.Module] = []
    done = allocator.iterate(given, "50%", steps=2, example_inputs=data[:1], train=seen.append)
    assert [type(each) for each in (*seen, done.model)] == [Trainer] * 3


class Halves(nn.Module):
    """One attribute stands twice in the list of sizes, as in Ultralytics' blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.write, self.norm, self.read = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        nn.init.uniform_(self.norm.weight, 0.1, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.norm(self.write(x)).split((self.c, self.c), dim=1)
        return self.read(torch.cat([a.sigmoid(), b.relu()], 1))


def test_parts_that_an_adapter_gives_one_number_for_stay_equal() -> None:
    adapters.register(Halves)(lambda _, kept: {"c": int(kept("write.weight", 0).sum()) // 2})
    try:
        result = allocator.allocate(Halves(), "60%", example_inputs=IMAGE)
    finally:
        adapters.unregister(Halves)
    rows = np.array(result.allocation.kept["write.weight"][0])
    first = int((rows < 8).sum())
    assert 0 < first == int((rows >= 8).sum()) == result.model.c
    assert first < 8
    assert not any("stay equal" in note for note in result.notes)  # known before anything was tried


class Attention(nn.Module):
    """Views what its heads gave as if it had the channels of its input, as Ultralytics' does."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.keys, self.values = 2, 4, 8
        self.qkv, self.proj = nn.Conv2d(16, 2 * (2 * 4 + 8), 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        parts = self.qkv(x).view(batch, self.heads, 2 * self.keys + self.values, height * width)
        q, k, v = parts.split([self.keys, self.keys, self.values], dim=2)
        scores = (q.transpose(-2, -1) @ k / 2).softmax(-1)
        return self.proj((v @ scores.transpose(-2, -1)).view(batch, channels, height, width))


def attention_sizes(module: nn.Module, kept: Kept) -> Mapping[str, object]:
    """Values alone get fewer."""
    return {"values": int(kept("proj.weight", 1).sum()) // 2, "keys": 4}


QUERIES_AND_KEYS = np.arange(32).reshape(2, 16)[:, :8].reshape(-1)
WIDTH = ("qkv.weight", 1, slice(None)), ("proj.weight", 1, slice(None))


def test_heads_get_narrower_with_what_they_read_where_an_adapter_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Attention(), nn.Conv2d(16, 4, 1))
    constraints = [WIDTH, (("qkv.weight", 0, QUERIES_AND_KEYS), None)]
    adapters.register(Attention, Adapter(sizes=attention_sizes, together=lambda _: constraints, narrow_heads=True))
    try:
        result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    finally:
        adapters.unregister(Attention)
    small: Any = result.model[1]  # type: ignore[index]
    assert small.qkv.in_channels == small.proj.in_channels == 2 * small.values < 16
    assert small.qkv.out_channels == 2 * (2 * 4 + small.values)
    rows = result.allocation.kept["1.qkv.weight"][0]
    assert rows is not None
    assert set(QUERIES_AND_KEYS) <= set(rows)
    assert result.certificate.relative_error is not None
    assert not [note for note in result.notes if "stay" in note]


def test_places_in_a_tensor_that_is_not_there_are_refused() -> None:
    model = nn.Sequential(Attention())
    said = r"asked about 0, names the tensor query\.weight, which the module does not have"
    adapters.register(Attention, Adapter(together=lambda _: [(("query.weight", 0, slice(None)), None)]))
    try:
        with pytest.raises(allocator.AdapterError, match=said):
            allocator.trace(model, torch.rand(1, 16, 4, 4))
    finally:
        adapters.unregister(Attention)
