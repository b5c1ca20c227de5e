"""An allocation as data: written and read again, damage noticed, older formats, and one after the other."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import allocator
from allocator.errors import AllocationMismatchError, FileError
from allocator.rewriting.allocation import Allocation, architecture_hash
from allocator.rewriting.index_map import take

# Written and read -----------------------------------------------------------------------------------

NAMES = st.sampled_from(["", "stem", "layer1.0.conv1", "naïve", 'a"b'])
INDICES = st.lists(st.integers(0, 2000), max_size=4)
ROWS = st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), max_size=3))
NUMBERS = st.none() | st.integers(-1, 10**15) | st.floats(allow_nan=False, allow_infinity=False)
SIZES = st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=3) | st.dictionaries(NAMES, st.integers(0, 9))
BRANCHES = st.fixed_dictionaries({"name": NAMES, "before": st.integers(0, 9), "after": st.integers(0, 9)})
BLOCKS = st.fixed_dictionaries({"name": NAMES, "kind": NAMES, "branches": st.lists(BRANCHES, max_size=2)})
ALLOCATIONS = st.builds(
    Allocation,
    kept=st.dictionaries(NAMES, st.lists(st.none() | INDICES | ROWS, max_size=4), max_size=3),
    attributes=st.dictionaries(NAMES, st.dictionaries(NAMES, SIZES, max_size=2), max_size=2),
    absent=st.lists(NAMES.filter(bool), max_size=2),
    architecture=NAMES,
    costs=st.dictionaries(NAMES, st.dictionaries(NAMES, NUMBERS, max_size=3), max_size=2),
    policy=NAMES,
    criterion=NAMES,
    blocks=st.lists(BLOCKS, max_size=2),
    input_shapes=st.lists(INDICES, max_size=2),
)


@settings(deadline=None, max_examples=100)
@given(ALLOCATIONS)
def test_what_was_written_is_read(allocation: Allocation) -> None:
    assert Allocation.from_json(allocation.to_json()) == allocation
    assert Allocation.from_dict(json.loads(json.dumps(allocation.to_dict()))) == allocation
    again = Allocation.from_json(allocation.to_json())
    assert again.to_json() == allocation.to_json()


SMALL = Allocation(
    kept={"a.weight": [[0, 2], None, None], "b.weight": [None, [[0, 1], [1, 2]]]},
    attributes={"a": {"out_channels": 2, "sizes": [1, 1]}},
    absent=["c"],
    architecture="0123456789abcdef",
    costs={"flops": {"asked": 60.5, "before": 100, "after": 60}, "params": {"asked": None, "before": 9, "after": 7}},
    policy="per_block",
    criterion="bn_scale",
    scope="inner",
    blocks=[{"name": "model", "kind": "concat", "branches": [{"name": "a", "before": 3, "after": 2}]}],
    input_shapes=[[1, 3, 8, 8]],
)


def test_any_other_character_in_a_file_is_noticed_or_changes_nothing() -> None:
    text = SMALL.to_json()
    noticed = 0
    for place, old in enumerate(text):
        for new in ("7" if old != "7" else "8", "x", " "):
            try:
                assert Allocation.from_json(text[:place] + new + text[place + 1 :]) == SMALL, text[place:][:20]
            except FileError:
                noticed += 1
    assert noticed > 2.5 * len(text)


def test_a_file_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    SMALL.save(path)
    assert Allocation.load(path) == Allocation.load(str(path)) == SMALL
    path.write_text(json.dumps({**json.loads(path.read_text()), "policy": "global"}))
    with pytest.raises(FileError, match=r"a\.json: the allocation was changed or damaged after it was written"):
        Allocation.load(path)
    path.write_text("{")
    with pytest.raises(FileError, match=r"a\.json: this is not JSON: "):
        Allocation.load(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(FileError, match=r"a\.json is not a JSON file: "):
        Allocation.load(path)
    with pytest.raises(FileError, match=r"there is no file .*none\.json"):
        Allocation.load(tmp_path / "none.json")
    with pytest.raises(FileError, match=r"cannot read 'a\\x00\.json': embedded null"):
        Allocation.load("a\0.json")
    for other in ("[]", "7", '{"digest": "0"}', "{}"):
        with pytest.raises(FileError, match=r"not an allocation: it has no field 'kept'|changed or damaged"):
            Allocation.from_json(other)


def test_json_without_a_digest_is_read() -> None:
    data = json.loads(SMALL.to_json())
    del data["digest"]
    assert Allocation.from_json(json.dumps(data, indent=2)) == SMALL


# Older formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_one_budget_of_flops_becomes_one_of_several(version: int) -> None:
    figures = {"flops_asked": 60.5, "flops_before": 100, "flops_after": 60}
    data = {"format": version, "kept": {"a.weight": [[0], None]}, "policy": "global", **figures}
    before = copy.deepcopy(data)
    allocation = Allocation.from_dict(data)
    assert data == before
    assert allocation.costs == {"flops": {"asked": 60.5, "before": 100, "after": 60}}
    assert (allocation.flops_asked, allocation.flops_before, allocation.flops_after) == (60.5, 100, 60)
    assert (allocation.policy, allocation.kept) == ("global", {"a.weight": [[0], None]})
    assert (allocation.groups, allocation.norms, allocation.parts) == ("whole", "exact", [])
    assert Allocation.from_json(allocation.to_json()) == allocation
    with pytest.raises(FileError, match="the allocation's flops_asked is a str, not a number"):
        Allocation.from_dict({**data, "flops_asked": "60%"})
    bare = Allocation.from_dict({"format": version, "kept": {}})
    assert (bare.flops_asked, bare.flops_before, bare.flops_after) == (0, 0, 0)


@pytest.mark.parametrize("version", [None, 0, 6, "4", [4]])
def test_other_formats_are_refused(version: Any) -> None:
    with pytest.raises(FileError, match="reads up to 5: install the version of neuron-allocator that wrote it"):
        Allocation.from_dict({"kept": {}, "format": version})


def test_costs_without_flops() -> None:
    allocation = Allocation(costs={"params": {"asked": 5.0, "before": 9, "after": 4}})
    assert (allocation.flops_asked, allocation.flops_before, allocation.flops_after) == (0, 0, 0)


BLOCK: dict[str, Any] = {"name": "a", "kind": "concat"}
DEEP: Any = functools.reduce(lambda inner, _: [inner], range(40), list[Any]([0.5]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": 7}, "policy is an int, not a str"),
        ({"absent": "c"}, "absent is a str, not a list"),
        ({"attributes": []}, "attributes is a list, not a dict"),
        ({"kept": {"a": [0]}}, "entry for a is not a list of index lists"),
        ({"kept": {"a": None}}, "entry for a is not a list of index lists"),
        ({"kept": {"a": [[True]]}}, "entry for a is not a list of index lists"),
        ({"kept": {"a": [[[[0]]]]}}, "entry for a is not a list of index lists"),
        ({"kept": {"a": [[[0], []]]}}, "entry for a is not a list of index lists"),
        ({"costs": {"flops": {"asked": "60%"}}}, "costs in flops are not numbers"),
        ({"input_shapes": [[1, 2.5]]}, "input shapes are not lists of numbers"),
        ({"input_shapes": [8]}, "input shapes are not lists of numbers"),
        ({"input_shapes": [[-1]]}, "input shapes are not lists of numbers"),
        ({"attributes": {"a": [2]}}, "attributes of a are not a mapping"),
        ({"absent": [""]}, "absent layers are not a list of names"),
        ({"absent": [3]}, "absent layers are not a list of names"),
        ({"blocks": [{"name": "a", "kind": "concat"}]}, "blocks are not a list of names, kinds and branches"),
        ({"blocks": ["a"]}, "blocks are not a list of names, kinds and branches"),
        ({"blocks": [{**BLOCK, "branches": [{"name": "b", "before": 2}]}]}, "block a has a branch without channels"),
        ({"blocks": [{**BLOCK, "branches": [{"name": "b", "before": 2, "after": 1.5}]}]}, "channels that are not num"),
        ({"attributes": {"a": {"x": math.nan}}}, "holds nan, a number that nothing can be computed with"),
        ({"costs": {"flops": {"asked": 10**400}}}, "holds 1000.*, a number that nothing can be computed with"),
        ({"attributes": {"a": {"x": DEEP}}}, "lists or mappings more than 32 levels deep"),
        ({"kept": {"a": [[2**63]]}}, "entry for a is not a list of index lists"),
    ],
)
def test_wrong_types_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FileError, match=said):
        Allocation.from_dict({**SMALL.to_dict(), **changes})


# Architectures --------------------------------------------------------------------------------------


def test_the_hash_of_an_architecture_is_that_of_its_names_and_shapes() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (4, 3), "b.weight": (2, 4), "b.bias": (2,)}
    same = architecture_hash(dict(reversed(shapes.items())))
    assert architecture_hash(shapes) == same
    others: list[dict[str, tuple[int, ...]]] = [
        {**shapes, "b.bias": (3,)},
        {**shapes, "c.bias": (2,)},
        {"a.weight": (4, 3), "b.weight": (2, 4)},
        {"a.weight": (2, 4), "b.weight": (4, 3), "b.bias": (2,)},
        {"A.weight": (4, 3), "b.weight": (2, 4), "b.bias": (2,)},
    ]
    hashes = {architecture_hash(other) for other in others}
    assert len(hashes) == len(others)
    assert same not in hashes
    assert len(same) == 16


# One after the other --------------------------------------------------------------------------------


def subset(generator: np.random.Generator, size: int, count: int | None = None) -> list[int]:
    count = int(generator.integers(1, size + 1)) if count is None else count
    chosen: list[int] = np.sort(generator.permutation(size)[:count]).tolist()
    return chosen


def rows_of(generator: np.random.Generator, rows: int, size: int) -> list[list[int]]:
    count = int(generator.integers(1, size + 1))
    return [subset(generator, size, count) for _ in range(rows)]


def some(generator: np.random.Generator, shape: tuple[int, ...]) -> list[Any]:
    """What may be kept of a tensor: of dim 0 a subset, of dim 1 a subset, or one per row of dim 0; or all of them."""
    first = subset(generator, shape[0]) if generator.random() < 0.7 else None
    rows = shape[0] if first is None else len(first)
    kind = generator.random()
    if kind < 0.3:
        return [first, None, None]
    return [first, subset(generator, shape[1]) if kind < 0.6 else rows_of(generator, rows, shape[1]), None]


@pytest.mark.parametrize("seed", range(40))
def test_one_after_the_other_takes_what_both_together_take(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = torch.randn(6, 5, 2)
    first = some(generator, tuple(weight.shape))
    between = take(weight, first)
    second = some(generator, tuple(between.shape))
    both = Allocation({"a.weight": first}).compose(Allocation({"a.weight": second}))
    assert torch.equal(take(weight, both.kept["a.weight"]), take(between, second))


def test_three_compose_in_any_grouping() -> None:
    generator = np.random.default_rng(0)
    weight = cut = torch.randn(9, 8, 1)
    chain: list[Allocation] = []
    for _ in range(3):
        dims = some(generator, tuple(cut.shape))
        chain.append(Allocation({"a.weight": dims}, architecture=str(len(chain))))
        cut = take(cut, dims)
    a, b, c = chain
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    assert left == right
    assert torch.equal(take(weight, left.kept["a.weight"]), cut)
    assert [part["architecture"] for part in left.parts] == ["0", "1", "2"]


def test_what_one_of_two_says_alone_remains() -> None:
    first = Allocation({"a": [[1, 2]]}, {"m": {"x": 2, "y": 3}, "n": {"z": 1}})
    second = Allocation({"b": [[0]]}, {"m": {"y": 1}, "o": {"w": 1}})
    both = first.compose(second)
    assert both.kept == {"a": [[1, 2]], "b": [[0]]}
    assert both.attributes == {"m": {"x": 2, "y": 1}, "n": {"z": 1}, "o": {"w": 1}}
    assert first.attributes == {"m": {"x": 2, "y": 3}, "n": {"z": 1}}
    assert first.kept == {"a": [[1, 2]]}


def test_what_is_gone_is_kept_by_nobody() -> None:
    first = Allocation({"m.weight": [[0, 1]], "m.0.weight": [[0]], "mm.weight": [[1]]}, {"m": {"x": 2}, "mm": {"x": 1}})
    second = Allocation({"mm.weight": [[0]]}, {"m.0": {"x": 1}}, absent=["m"])
    both = first.compose(second)
    assert both.kept == {"mm.weight": [[1]]}
    assert both.attributes == {"mm": {"x": 1}}
    assert both.absent == ["m"]
    assert Allocation(absent=["b", "a"]).compose(second).absent == ["a", "b", "m"]


def test_figures_go_from_the_first_to_the_last() -> None:
    def blocks(before: int, after: int) -> list[dict[str, Any]]:
        return [{"name": "model", "kind": "concat", "branches": [{"name": "a", "before": before, "after": after}]}]

    first = replace(SMALL, blocks=blocks(8, 6), architecture="first", input_shapes=[[1]])
    second = Allocation(
        costs={"flops": {"asked": 30.0, "before": 60, "after": 29}, "activations": {"before": 5, "after": 4}},
        policy="global",
        blocks=blocks(6, 2),
        architecture="second",
        input_shapes=[[2]],
    )
    both = first.compose(second)
    assert both.costs == {
        "flops": {"asked": 30.0, "before": 100, "after": 29},
        "activations": {"before": 5, "after": 4},
    }
    assert both.blocks == blocks(8, 2)
    assert (both.policy, both.architecture, both.input_shapes) == ("global", "first", [[2]])
    assert both.parts == [first.to_dict(), second.to_dict()]


def test_indices_beyond_what_is_kept_are_refused() -> None:
    with pytest.raises(AllocationMismatchError, match="a: index 2 of the second allocation, 2 are kept"):
        Allocation({"a": [[3, 4], None]}).compose(Allocation({"a": [[0, 2], None]}))
    with pytest.raises(AllocationMismatchError, match="a: index 1 of the second allocation, 1 are kept"):
        Allocation({"a": [None, [[3], [4]]]}).compose(Allocation({"a": [None, [1]]}))


def test_a_layer_that_keeps_nothing_is_refused_unless_it_is_named_as_gone() -> None:
    with pytest.raises(AllocationMismatchError, match="weight, dim 0: the allocation keeps nothing of the model's 4"):
        allocator.rewrite(nn.Linear(3, 4), Allocation({"weight": [[], None], "bias": [[]]}))
