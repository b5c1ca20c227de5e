"""Functions that take the place of a library's while a forward is traced: for that thread, and for that time."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import allocator
from allocator.adapters.stand_ins import StandIns

LIBRARY = "library_with_a_function"


def original(number: int) -> str:
    return f"original {number}"


def stand_in(number: int) -> str:
    return f"stand-in {number}"


@pytest.fixture
def library() -> Iterator[types.ModuleType]:
    """A module whose global `function` is called by others."""
    module = types.ModuleType(LIBRARY)
    module.function = original  # type: ignore[attr-defined]
    sys.modules[LIBRARY] = module
    yield module
    del sys.modules[LIBRARY]


@pytest.fixture
def stand_ins() -> StandIns:
    functions = StandIns()
    functions.add(LIBRARY, "function", stand_in)
    return functions


def in_another_thread(function: Callable[[], str]) -> str:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_the_stand_in_is_called_inside_and_the_original_is_back_afterwards(
    library: types.ModuleType, stand_ins: StandIns
) -> None:
    with stand_ins.in_place():
        assert library.function(1) == "stand-in 1"
        assert library.function(number=2) == "stand-in 2"
        assert library.function.__name__ == "original"
    assert library.function is original


def test_other_threads_keep_the_original(library: types.ModuleType, stand_ins: StandIns) -> None:
    with stand_ins.in_place():
        assert in_another_thread(lambda: library.function(1)) == "original 1"
        assert library.function(1) == "stand-in 1"


def test_the_original_is_back_after_an_exception(library: types.ModuleType, stand_ins: StandIns) -> None:
    with pytest.raises(ZeroDivisionError), stand_ins.in_place():
        _ = 1 / 0
    assert library.function is original


def test_nested_traces(library: types.ModuleType, stand_ins: StandIns) -> None:
    with stand_ins.in_place():
        with stand_ins.in_place():
            assert library.function(1) == "stand-in 1"
        assert library.function(1) == "stand-in 1"
    assert library.function is original


def test_the_first_of_two_threads_to_end_takes_nothing_from_the_other(
    library: types.ModuleType, stand_ins: StandIns
) -> None:
    begun, ended = threading.Event(), threading.Event()
    heard: list[str] = []

    def trace() -> None:
        with stand_ins.in_place():
            begun.set()
            assert ended.wait(30)
            heard.append(library.function(2))

    thread = threading.Thread(target=trace)
    with stand_ins.in_place():
        thread.start()
        assert begun.wait(30)
    assert library.function(1) == "original 1"
    ended.set()
    thread.join()
    assert heard == ["stand-in 2"]
    assert library.function is original


def test_a_module_that_is_loaded_between_two_traces(stand_ins: StandIns, request: pytest.FixtureRequest) -> None:
    with stand_ins.in_place():
        library = request.getfixturevalue("library")
        assert library.function is original
        with stand_ins.in_place():
            assert library.function(1) == "stand-in 1"
    assert library.function is original


def test_a_library_without_the_function_is_left_as_it_is(library: types.ModuleType, stand_ins: StandIns) -> None:
    del library.function
    with stand_ins.in_place():
        assert not hasattr(library, "function")
    assert not hasattr(library, "function")


def test_what_somebody_else_puts_there_stays(library: types.ModuleType, stand_ins: StandIns) -> None:
    with stand_ins.in_place():
        library.function = str  # type: ignore[attr-defined]
    assert library.function is str


def test_a_function_has_one_stand_in(stand_ins: StandIns) -> None:
    with pytest.raises(ValueError, match=f"{LIBRARY}.function has a stand-in already"):
        stand_ins.add(LIBRARY, "function", str)


class Pastes(nn.Module):
    """Calls one of the functions that torchvision's have stand-ins for; and, if asked, fails after it."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.conv, self.fails = nn.Conv2d(3, 4, 1), fails

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.models.detection import transform

        masks = self.conv(image).sigmoid().transpose(0, 1)
        pasted: torch.Tensor = transform.paste_masks_in_image(masks, torch.ones(4, 4), (8, 8))
        if self.fails:
            raise RuntimeError("in the middle of a forward")
        return pasted


@pytest.mark.parametrize("fails", [False, True])
def test_torchvision_is_as_it_was_after_a_trace(fails: bool) -> None:
    transform = pytest.importorskip("torchvision.models.detection.transform")
    boxes = pytest.importorskip("torchvision.ops.boxes")
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    before = transform.paste_masks_in_image, boxes._batched_nms_vanilla, roi_heads.heatmaps_to_keypoints
    model, image = Pastes(fails=fails), torch.zeros(1, 3, 4, 4)
    if fails:
        with pytest.raises(allocator.TraceError, match="in the middle of a forward"):
            allocator.trace(model, image)
    else:
        graph = allocator.trace(model, image)
        assert "upsample" in str(graph.flow.trace)
    assert before == (transform.paste_masks_in_image, boxes._batched_nms_vanilla, roi_heads.heatmaps_to_keypoints)
