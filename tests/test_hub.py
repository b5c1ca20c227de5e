"""Results on the hub of Hugging Face, with folders in its place: nothing is sent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import allocator
from allocator.errors import FileError, MissingPackageError

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the hub; repositories are folders in it."""
    place = tmp_path / "hub"

    def create(_api: Any, repo_id: str, **_: Any) -> None:
        (place / repo_id).mkdir(parents=True, exist_ok=True)

    def upload(_api: Any, *, folder_path: Path, repo_id: str, **_: Any) -> str:
        shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
        return f"commit of {repo_id}"

    def download(repo_id: str, **_: Any) -> str:
        if not (place / repo_id).is_dir():
            raise ConnectionError("404: no such repository\nand more lines")
        return str(place / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return place


def test_a_result_is_shared_and_read_again(hub: Path) -> None:
    torch.manual_seed(0)
    model = allocator.build("recipe:resnet-small").eval()
    result = allocator.allocate(model, "60%", certify=False)
    assert allocator.push_to_hub(result, "me/small") == "commit of me/small"
    assert {path.name for path in (hub / "me/small").iterdir()} == {"allocation.safetensors", "README.md"}
    assert 'allocator.from_hub("me/small")' in (hub / "me/small/README.md").read_text()
    again = allocator.from_hub("me/small")
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(again(image), result.model(image))


def test_a_folder_is_shared_as_it_is(hub: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    allocator.allocate_folder(tmp_path / "large", tmp_path / "small", "80%")
    allocator.push_to_hub(tmp_path / "small", "me/llama")
    again = allocator.from_hub("me/llama")
    assert type(again) is transformers.LlamaForCausalLM
    with pytest.raises(FileError, match=r"is no folder with weights as \.safetensors"):
        allocator.push_to_hub(tmp_path, "me/llama")


def test_what_the_hub_lacks_is_told(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match=r"cannot read the repository me/absent: 404: no such repository$"):
        allocator.from_hub("me/absent")
    (hub / "me/empty").mkdir(parents=True)
    with pytest.raises(FileError, match=r"holds neither allocation\.safetensors nor a config\.json"):
        allocator.from_hub("me/empty")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'neuron-allocator\[hub\]'"):
        allocator.from_hub("me/small")
