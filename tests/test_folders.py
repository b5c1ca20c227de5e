"""Networks whose weights stay in folders: read and written tensor by tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import allocator
from allocator.cli import main
from allocator.errors import AllocationMismatchError, FileError, InputError, UnsupportedModelError
from allocator.io.shards import Shards, write_shards


class Tied(nn.Module):
    """Words in and out by one matrix, a wide layer between, and a buffer."""

    def __init__(self, hidden: int = 96, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.up = nn.Linear(width, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.down = nn.Linear(hidden, width)
        self.out = nn.Linear(width, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        inside = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2).relu()
        answer: torch.Tensor = self.out(x + self.down(inside))
        return answer


IDS = torch.arange(10)[None]


def sharded(model: nn.Module, folder: Path, most: int) -> Path:
    """Its weights in several files of a folder, each once."""
    folder.mkdir()
    state = model.state_dict()
    tied = [name for name in state if name == "out.weight"]
    write_shards(((name, tensor) for name, tensor in state.items() if name not in tied), folder, "model", most)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = sharded(Tied().to(torch.bfloat16), tmp_path / "large", 4000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"of the original's widths")
    (folder / "onnx").mkdir()
    return folder


def on_meta(**sizes: int) -> nn.Module:
    with torch.device("meta"):
        return Tied(**sizes).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def loaded(folder: Path) -> Tied:
    """The original with what lies in its folder."""
    model = Tied().to(torch.bfloat16)
    model.load_state_dict({**Shards(folder), "out.weight": Shards(folder)["words.weight"]})
    return model.eval()


def test_weights_go_from_folder_to_folder(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    said: list[str] = []
    result = allocator.allocate_folder(
        source, tmp_path / "small", "60%", model=on_meta(), example_inputs=IDS, max_shard_size=3000,
        progress=said.append,
    )  # fmt: skip
    assert contents(source) == before
    assert result.certificate.ok
    assert "outputs not compared" in str(result.certificate)
    assert any("writing" in each and "down.weight" in each for each in said)
    expected = allocator.apply(loaded(source), result.allocation)
    written = Shards(tmp_path / "small")
    assert written.keys() == Shards(source).keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected.state_dict()[name])
        assert tensor.dtype == expected.state_dict()[name].dtype
    files = contents(tmp_path / "small")
    assert files["tokenizer.json"] == b"{}"
    assert "pytorch_model.bin" not in files
    index = json.loads(files["model.safetensors.index.json"])
    assert len({*index["weight_map"].values()}) > 2
    assert all(len(files[name]) < 6000 for name in index["weight_map"].values())


def test_neurons_are_ranked_by_the_weights_in_the_folder(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"criterion": ["magnitude", "bn_scale"], "policy": "global"}
    streamed = allocator.allocate_folder(source, tmp_path / "s", "60%", model=on_meta(), example_inputs=IDS, **options)
    whole = allocator.allocate(loaded(source).float(), "60%", example_inputs=IDS, **options)
    assert streamed.allocation.kept == whole.allocation.kept


def test_an_allocation_is_applied_to_a_folder(source: Path, tmp_path: Path) -> None:
    graph = allocator.trace(on_meta(), IDS)
    plan = allocator.plan(graph, allocator.score(graph, "random"), "60%")
    plan.save(tmp_path / "choice.json")
    certificate = allocator.apply_folder(
        source, tmp_path / "choice.json", tmp_path / "small", model=on_meta(), example_inputs=IDS
    )
    assert certificate.ok
    assert certificate.relative_error is None
    expected = allocator.apply(loaded(source), plan).state_dict()
    written = load_file(tmp_path / "small" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    with pytest.raises(AllocationMismatchError, match="keeps index"):
        allocator.apply_folder(
            sharded(Tied(12), tmp_path / "other", 10**6), plan, tmp_path / "o", model=on_meta(hidden=12)
        )


def test_nothing_is_left_of_what_failed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(source)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(FileError, match="No space left on device"):
        allocator.allocate_folder(source, tmp_path / "small", "60%", model=on_meta(), example_inputs=IDS)
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_place_that_is_taken_is_refused(source: Path, tmp_path: Path) -> None:
    def run(output: Path) -> None:
        allocator.allocate_folder(source, output, "60%", model=on_meta(), example_inputs=IDS)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match="it exists, and is not an empty folder"):
        run(tmp_path / "full")
    with pytest.raises(FileError, match="which is to stay as it is"):
        run(source / "small")
    with pytest.raises(FileError, match="there is no folder"):
        run(tmp_path / "absent" / "small")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_folder_with_other_weights_is_told(source: Path, tmp_path: Path) -> None:
    def run(folder: Path, model: nn.Module) -> None:
        allocator.allocate_folder(folder, tmp_path / "small", "60%", model=model, example_inputs=IDS)

    with pytest.raises(FileError, match=r"holds \S+ in size .*, and Tied has"):
        run(source, on_meta(hidden=48))
    with pytest.raises(FileError, match=r"not hold the tensors of Linear under its names, as down\.bias"):
        run(source, nn.Linear(24, 24, device="meta"))
    state = {name: tensor for name, tensor in Tied().state_dict().items() if name not in ("out.weight", "up.bias")}
    (tmp_path / "less").mkdir()
    save_file(state, tmp_path / "less" / "model.safetensors")
    with pytest.raises(FileError, match=r"under its names, as up\.bias"):
        run(tmp_path / "less", on_meta())
    with pytest.raises(InputError, match=r"is 60, and takes|takes a path"):
        allocator.apply_folder(source, 60, tmp_path / "small")  # type: ignore[arg-type]


def test_a_damaged_folder_is_told(source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for content, said in (
        ("{", "weight_map cannot be read"),
        (
            json.dumps({"weight_map": {"a": "../../secret.safetensors"}}),
            "does not name .safetensors files of its folder",
        ),
        (json.dumps({"weight_map": {**names, "a": "model-00009.safetensors"}}), "names model-00009"),
        (json.dumps({"weight_map": {**names, "a": names["up.weight"]}}), "names a, which no file holds"),
    ):
        index.write_text(content)
        with pytest.raises(FileError, match=said):
            Shards(source)
    index.write_text(json.dumps({"weight_map": names}))
    with (source / names["up.weight"]).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(FileError, match="truncated or damaged"):
        Shards(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"holds no weights as \.safetensors"):
        Shards(tmp_path / "empty")
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(FileError, match="several files of weights and no index"):
        Shards(tmp_path / "empty")


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    """Half precision, one matrix for words in and out, in three files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "large", max_shard_size="60KB")
    assert len(list((tmp_path / "large").glob("model-*-of-00003.safetensors"))) == 3
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("settings", [{"at_least": 0}, {"policy": "uniform", "fill": False}], ids=["uneven", "even"])
def test_a_language_model_goes_from_folder_to_folder(llama: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.arange(12)[None]
    result = allocator.allocate_folder(tmp_path / "large", tmp_path / "small", "60%", max_shard_size=50_000, **settings)
    expected: Any = allocator.apply(llama, result.allocation)
    readers = [lambda: allocator.load(f"hf:{tmp_path / 'small'}")]
    if "policy" in settings:
        readers.append(lambda: type(llama).from_pretrained(tmp_path / "small", dtype=torch.bfloat16))
    for read in readers:
        again: Any = read()
        assert type(again) is type(llama)
        assert again.dtype == torch.bfloat16
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again.eval()(ids).logits, expected(ids).logits)
        assert again.config.intermediate_size == expected.config.intermediate_size
    assert (tmp_path / "small" / "generation_config.json").exists()


@pytest.mark.parametrize("damage", [{"architectures": 3}, {"num_attention_heads": 5}, {"model_type": "zzz"}])
def test_a_config_that_describes_no_model_is_told(tmp_path: Path, damage: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    config = {"model_type": "llama", "hidden_size": 32, "vocab_size": 50, "num_attention_heads": 4, "head_dim": 8}
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "intermediate_size": 8} | damage))
    save_file({"lm_head.weight": torch.zeros(50, 32)}, source / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"building .*hf:.* raised \w+: "):
        allocator.allocate_folder(source, tmp_path / "out", "70%")
    with pytest.raises(UnsupportedModelError, match=r"building .*hf:.* raised \w+: "):
        allocator.load(f"hf:{source}")


def test_from_folder_to_folder_in_the_shell(llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, choice = f"hf:{tmp_path / 'large'}", str(tmp_path / "choice.json")
    a, b = (f"hf:{tmp_path / name}" for name in "ab")
    options = ["--flops", "60%", "--input-size", "1x20"]
    assert main(["allocate", large, *options, "--allocation", choice, "-o", a]) == 0
    assert f"modelwrittento{a}" in "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    assert main(["apply", large, choice, "-o", b]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert main(["verify", large, a, choice]) == 0
    assert main(["allocate", large, *options, "-o", a]) == 1
    assert "it exists, and is not an empty folder" in capsys.readouterr().err
    assert main(["allocate", large, *options, "-o", f"{a}c", "--data", "texts.npy"]) == 2
    assert "--data needs the weights in memory" in capsys.readouterr().err
    assert main(["allocate", "torchvision:resnet18", "--flops", "60%", "-o", f"{a}c"]) == 2
    assert "MODEL must be hf:FOLDER, or OUT a file" in capsys.readouterr().err


def test_a_number_computed_from_the_width_is_seen_without_weights() -> None:
    """Of a model on the meta device, buffers are what its class computes."""
    pytest.importorskip("transformers")
    from benchmarks.hugging_face_models import tiny

    with torch.device("meta"):
        model = tiny("Gemma3Text")[0]
    graph = allocator.trace(model, {"input_ids": IDS}, norms="loose")
    plan = allocator.plan(graph, allocator.score(graph, "random"), "60%", policy="uniform", fill=False)
    assert "config.hidden_size" not in plan.attributes[""]


MEASURED = """
import resource, sys, torch, allocator
from pathlib import Path
from torch import nn
from allocator.io.shards import write_shards

folder, layers, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def build():
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)])
with torch.device("meta"):
    model = build().eval()
(folder / "large").mkdir()
drawn = ((name, torch.rand(tensor.shape).to(torch.bfloat16)) for name, tensor in model.state_dict().items())
write_shards(drawn, folder / "large", "model", 8 * width * width)
inputs = torch.zeros(1, width)
graph = allocator.trace(model, inputs)
plan = allocator.plan(graph, allocator.score(graph, "random"), "60%")
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
allocator.apply_folder(folder / "large", plan, folder / "small", model=model, max_shard_size=8 * width * width)
print(sum(path.stat().st_size for path in (folder / "large").iterdir()), peak() - before)
"""


def measured(folder: Path, layers: int, width: int) -> tuple[int, int]:
    """Bytes of the folder, and by how many the peak of the process grows as it is written smaller."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURED, str(folder), str(layers), str(width)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=280)
    size, grown = map(int, done.stdout.split())
    return size, grown


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak as Linux tells it")
@pytest.mark.parametrize(("layers", "width"), [(48, 1000), pytest.param(100, 2900, marks=pytest.mark.sweep)])
def test_a_file_of_weights_is_in_memory_at_a_time(layers: int, width: int, tmp_path: Path) -> None:
    size, grown = measured(tmp_path, layers, width)
    print(f"{size:,} bytes in the folder, {grown:,} more in memory")
    assert size > layers * width * width * 2
    assert grown < size / 3  # four layers are written at a time; one more is read, and there is the trace
