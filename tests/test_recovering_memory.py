"""Recovering within so many bytes of memory: what lies in a file meanwhile, and that it makes no difference."""

from __future__ import annotations

import gc
import io
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import untouched
from torch import Tensor, nn

import allocator
from allocator.recovering import least_squares, room, samples
from allocator.recovering.holdings import Holdings, references
from allocator.recovering.shelf import Gaps, Shelf
from allocator.torch_private import storage_of

_SHARED: list[Tensor] = []


class Keeps(nn.Module):
    """It keeps tensors for later: in a shortcut, a list, an attribute, a view, and for other calls."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fourth, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not _SHARED:
            _SHARED.append(torch.linspace(0.9, 1.1, 16)[:, None, None] * 1.0)
        y = self.norm(self.first(x)).relu_()
        self.kept = y[:, :8]
        z = (y + self.second(y)).relu()
        several = [y, z, self.third(z) * _SHARED[0]]
        z *= 0.9
        several[2][:, :8] += self.kept
        return self.head(self.fourth(torch.cat(several, 1)).relu().mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Keeps()
    for _ in range(10):
        net(torch.randn(32, 3, 8, 8))
    _SHARED.clear()
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def result(model: nn.Module, images: Tensor) -> allocator.Result:
    return allocator.allocate(model, "50%", example_inputs=images[:1])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The temporary files that were made, in a folder of their own."""
    made: list[Any] = []
    plain = tempfile.TemporaryFile

    def noted(*args: Any, **options: Any) -> Any:
        made.append(plain(*args, dir=tmp_path, **options))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    return made


# Where things lie -----------------------------------------------------------------------------------


def test_parts_of_a_file_never_overlap_and_are_used_again() -> None:
    draw, gaps = random.Random(0), Gaps()
    taken: dict[int, int] = {}
    most = now = 0
    for _ in range(3000):
        if taken and draw.random() < 0.5:
            start = draw.choice(list(taken))
            now -= taken[start]
            gaps.give(start, taken.pop(start))
        else:
            size = draw.choice((16, 16, 64, 100, 7))
            start = gaps.take(size)
            assert all(start + size <= other or other + wide <= start for other, wide in taken.items())
            taken[start] = size
            now += size
            most = max(most, now)
        assert gaps.end >= max((start + size for start, size in taken.items()), default=0)
        assert gaps.end < 2 * most
    for start, size in taken.items():
        gaps.give(start, size)
    assert gaps.end == 0


def test_what_is_laid_down_comes_back_as_it_was() -> None:
    shelf = Shelf(100)
    holdings = Holdings(shelf)
    small, large = torch.randn(8), torch.randn(100, dtype=torch.float64)
    view, before, version = large[3:50], large.clone(), large._version
    holdings.after([], (small, [large, view]), writes=False)
    for _ in range(3):
        holdings.lay()
        assert (shelf.left, shelf.written) == (100 - 32, 800)  # written once, though it lies there three times
        assert (small.untyped_storage().nbytes(), large.untyped_storage().nbytes()) == (32, 0)
        holdings.take()
        assert torch.equal(large, before)
        assert torch.equal(view, before[3:50])
        assert (shelf.left, large._version) == (100, version)
    view += 1
    holdings.after(references(view), view, writes=True)
    holdings.lay()
    assert shelf.written == 1600
    found = holdings.before(view)  # as another forward would that reads it
    assert storage_of(found[0]) is not None
    assert torch.equal(large[3:50], before[3:50] + 1)
    holdings.lay()
    kept = shelf.keep(before)
    assert kept.start == 800
    assert torch.equal(kept.tensor(), before)
    kept.drop()
    holdings.take()
    del large, view, small
    holdings.lay()
    assert shelf.left == 100
    assert shelf.keep(before).start == 0
    shelf.close()


# What is found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "fold"])
def test_a_file_in_place_of_memory_makes_no_difference(
    model: nn.Module, result: allocator.Result, images: Tensor, files: list[Any], tmp_path: Path, method: Any
) -> None:
    once = allocator.recover(result, images, method, memory="1GB")
    assert not files
    for memory in (0, 3e5):
        with untouched(model), untouched(result.model):
            again = allocator.recover(result, images, method, memory=memory)
        assert files.pop().closed
        assert not list(tmp_path.iterdir())
        assert again.recovery == once.recovery
        for (name, a), (_, b) in zip(once.model.state_dict().items(), again.model.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
    assert once.recovery is not None
    assert once.recovery.after < 0.5 * once.recovery.before
    assert [layer.note for layer in once.recovery.layers if layer.note and method == "auto"] == []
    assert not _SHARED


def test_inputs_go_through_few_at_a_time_where_they_are_large(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at a time as hold so much; here every pixel is looked at, so that no draw tells them apart."""
    images = images.double()
    result = allocator.allocate(model.double(), "50%", example_inputs=images[:1])
    whole = allocator.recover(result, images, "least_squares")
    seen = set()
    plain = nn.functional.conv2d

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.add(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", counted)
    monkeypatch.setattr(samples, "AT_ONCE", 5 * 8 * (3 + 48) * 64)
    parted = allocator.recover(result, images, "least_squares")
    assert max(seen) < 16
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), parted.model.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


def test_memory_does_not_grow_with_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the inputs, and no more is alive beside them at any layer."""
    torch.manual_seed(0)
    layers = [layer for _ in range(2) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *layers, *pool)
    data = torch.randn(256, 3, 24, 24)
    result = allocator.allocate(model.eval(), "60%", example_inputs=data[:1], certify=False)
    seen: list[int] = []
    plain = least_squares.refit

    def held() -> dict[int, int]:
        """Bytes by address of all that is alive on the CPU, and no mere cycle."""
        gc.collect()
        plain = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))
        tensors = (each for each in plain if each.device.type == "cpu" and each.layout is torch.strided)
        return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}

    def noting(*args: Any, **options: Any) -> Any:
        seen.append(sum(bytes for address, bytes in held().items() if address not in before))
        return plain(*args, **options)

    def alive(count: int, memory: Any) -> int:
        seen.clear()
        monkeypatch.setattr(least_squares, "refit", noting)
        allocator.recover(result, data[:count], "least_squares", memory=memory)
        assert len(seen) == 4
        return max(seen)

    before = held()
    few, many = alive(64, 0), alive(256, 0)
    assert many < 1.05 * few
    assert alive(256, "1GB") > 2 * many


# What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [-1, "much", "50%", float("nan"), float("inf"), True, [1]])
def test_what_is_no_number_of_bytes_is_refused(result: allocator.Result, images: Tensor, memory: Any) -> None:
    with pytest.raises(allocator.InputError, match=r"memory=.* is no number of bytes, such as 2e9 or '2GB'"):
        allocator.recover(result, images, memory=memory)


def test_bytes_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    asked = (0, 1e6, "2GB", "2 gb", "2e9", "1.5M")
    assert [room.allowed_bytes(each, cpu) for each in asked] == [0, 10**6, *[2 * 10**9] * 3, 1_500_000]
    assert 0 < room.allowed_bytes(None, cpu) < 2**60
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  600 kB\n", encoding="ascii")
    monkeypatch.setattr(room, "_FREE", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_GROUP", tmp_path)
    assert room.allowed_bytes(None, cpu) == 300 * 1024
    for name, text in {"max": "5000", "current": "4000", "stat": "anon 3\ninactive_file 1000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text, encoding="ascii")
    assert room.allowed_bytes(None, cpu) == 1000
    (tmp_path / "memory.max").write_text("max", encoding="ascii")
    assert room.allowed_bytes(None, cpu) == 300 * 1024


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_and_nothing_is_left(
    model: nn.Module, result: allocator.Result, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = io.FileIO("/dev/full", "r+")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
    said = r"cannot write .* MB of activations into a temporary file in .*: No space left .*; set TMPDIR .*memory="
    with untouched(model), untouched(result.model), pytest.raises(allocator.FileError, match=said):
        allocator.recover(result, images, "least_squares", memory=0)
    assert full.closed
