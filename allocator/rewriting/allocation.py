"""An allocation: which neurons of a model stay, as plain data that can be saved, read and composed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from allocator.arguments import checked
from allocator.disk import parse_json, read_text, write_text
from allocator.errors import AllocationMismatchError, FileError, a_kind
from allocator.modules import lies_within
from allocator.rewriting import allocation_checks as checks
from allocator.shown import Shown

FORMAT = 5
READABLE = (1, 2, 3, 4, FORMAT)
"""Formats 1 and 2 knew one budget, of FLOPs, in fields of its own; 3 knew no wider networks, 4 none
in which averages are taken over what was added."""
Indices = list[Any]
"""Original indices kept of one dim, in order; one row per output for a grouped weight's dim 1."""


@dataclass(repr=False)
class Allocation(Shown):
    """Neurons to keep, and what modules have to be told.

    Attributes:
        kept: per parameter or buffer that changes, one entry per dim: the original indices that stay, or
            None where the dim is untouched. Dim 1 of a grouped weight that loses columns has one row of
            indices per output that stays. In a wider network, an index that comes again is one that was added.
        attributes: per module path, attributes and their new values.
        absent: paths of layers that are gone.
        renumbered: buffers that name channels by number; what they hold is counted anew among those that stay.
        architecture: hash of the names and shapes of the model it was made for.
        costs: per metric ("flops" as fvcore counts them, and every other that had a budget) what was asked, and what it
            is before and after.
        policy, criterion, scope, groups, norms: how it was made.
        blocks: per aggregation block its name, kind and branches with channels before and after.
        input_shapes: the shapes that the FLOPs hold for.
        parts: the allocations that it was composed of, first to last; none for one that was planned as a whole.
        added: of a wider network, what added indices are filled with: "init" ("zero" or "copy"), "seed", and "reads",
            per tensor and dim the added indices that read a neuron, and "averaged", those that averages are taken
            over. Empty where nothing was added.
    """

    kept: dict[str, list[Indices | None]] = field(default_factory=dict, repr=False)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    absent: list[str] = field(default_factory=list, repr=False)
    renumbered: list[str] = field(default_factory=list, repr=False)
    architecture: str = ""
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    policy: str = ""
    criterion: str = ""
    scope: str = ""
    groups: str = "whole"
    norms: str = "exact"
    blocks: list[dict[str, Any]] = field(default_factory=list, repr=False)
    input_shapes: list[list[int]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list, repr=False)
    added: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        flops = f"{self.flops_before:,} FLOPs before, {self.flops_after:,} after"
        made = f"policy {self.policy}, criterion {self.criterion}"
        return f"Allocation({flops}; {len(self.kept):,} tensors change; {made})"

    @property
    def flops_asked(self) -> float:
        """The budget in FLOPs, as fvcore counts them; 0 where there was none."""
        return float(self.costs.get("flops", {}).get("asked") or 0)

    @property
    def widens(self) -> bool:
        """Whether it adds neurons, as a whole or in one of its parts."""
        return bool(self.added) or any(part.get("added") for part in self.parts)

    @property
    def flops_before(self) -> int:
        """FLOPs of the network it was made for."""
        return int(self.costs.get("flops", {}).get("before") or 0)

    @property
    def flops_after(self) -> int:
        """FLOPs of what it leaves."""
        return int(self.costs.get("flops", {}).get("after") or 0)

    def shares(self) -> dict[str, float]:
        """Per branch of an aggregation block, as "BLOCK/BRANCH", the share of its channels that is kept; for loggers.

        Of a branch whose channels all stay because they meet others', the channels inside it.
        """
        found = {}
        for block in self.blocks:
            for branch in block["branches"]:
                inside = branch["before"] == branch["after"] and branch.get("inner_before")
                before, after = ("inner_before", "inner_after") if inside else ("before", "after")
                found[f"{block['name']}/{branch['name']}"] = branch[after] / branch[before] if branch[before] else 0.0
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with the format version."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Allocation:
        """Read what `to_dict` gave.

        Raises:
            FileError: not an allocation, or of a format this version does not know.
        """
        if not isinstance(data, dict) or "kept" not in data:
            raise FileError("this is not an allocation: it has no field 'kept'")
        written_as = data.get("format")
        if type(written_as) is not int or written_as not in READABLE:
            raise FileError(
                f"the allocation has format {written_as!r:.40}, this version reads up to {FORMAT}: "
                "install the version of neuron-allocator that wrote it"
            )
        checks.check_plain(data)
        if written_as < 3:
            data = _from_one_budget(data)
        return cls(**_fields_in(data))

    def to_json(self) -> str:
        """`to_dict` as compact JSON with a digest of itself, so that a damaged copy is noticed."""
        data = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}}
        text = _as_json(data)
        return f'{text[:-1]},"digest":"{_digest([text])}"}}'

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """Read what `to_json` gave; JSON without a digest is read as well.

        Raises:
            FileError: not JSON, not an allocation, or changed after it was written.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise FileError(f"this is not JSON: {error}") from error
        checks.check_plain(data)
        digest = data.pop("digest", None) if isinstance(data, dict) else None
        if digest is not None and digest != _digest([_as_json(data)]):
            raise FileError(
                "the allocation was changed or damaged after it was written: get it again, or remove its field "
                "'digest' if the change was meant"
            )
        return cls.from_dict(data)

    @checked
    def save(self, path: str | Path) -> None:
        """Write as JSON, moved into place when complete.

        Raises:
            FileError: the path cannot be written.
        """
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read an allocation from a JSON file.

        Raises:
            FileError: missing, not JSON, or not an allocation.
        """
        try:
            text = read_text(path)
        except UnicodeDecodeError as error:
            raise FileError(f"{path} is not a JSON file: {error}") from error
        try:
            return cls.from_json(text)
        except FileError as error:
            raise FileError(f"{path}: {error}") from error

    def compose(self, second: Allocation) -> Allocation:
        """The allocation that leads from this one's original model to the second one's result.

        Args:
            second: an allocation of the model that this one gives.

        Raises:
            AllocationMismatchError: the second one indexes beyond what this one keeps.
        """
        absent = sorted({*self.absent, *second.absent})
        kept = _compose_kept(self.kept, second.kept)
        kept = {name: dims for name, dims in kept.items() if not lies_within(name, absent)}
        attributes = _compose_attributes(self.attributes, second.attributes)
        attributes = {path: values for path, values in attributes.items() if not lies_within(path, absent)}
        parts = []
        for part in (self, second):
            parts += part.parts or [part.to_dict()]
        composed = second.to_dict() | {
            "kept": kept,
            "attributes": attributes,
            "absent": absent,
            "renumbered": sorted({*self.renumbered, *second.renumbered}),
            "architecture": self.architecture,
            "costs": _compose_costs(self.costs, second.costs),
            "blocks": _compose_blocks(self.blocks, second.blocks),
            "parts": parts,
            "added": {},  # its parts say what they added
        }
        return Allocation.from_dict(composed)


def _fields_in(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of an allocation among what a file holds, each of the kind that it has to be.

    Raises:
        FileError: one is not.
    """
    usual = Allocation()
    given = {each.name: data[each.name] for each in fields(Allocation) if each.name in data}
    for name, value in given.items():
        kind = type(getattr(usual, name))
        if not isinstance(value, kind):
            raise FileError(f"the allocation's {name} is {a_kind(value)}, not a {kind.__name__}")
        if name in _CHECKS:
            _CHECKS[name](value)
    return given


def _check_parts(parts: Iterable[Any]) -> None:
    """Allocations, as plain data."""
    for part in parts:
        try:
            Allocation.from_dict(part)
        except FileError as error:
            raise FileError(f"the allocation has a part that is none: {error}") from error


_CHECKS: dict[str, Callable[[Any], None]] = {
    "kept": checks.check_kept,
    "attributes": checks.check_attributes,
    "absent": checks.check_absent,
    "renumbered": checks.check_renumbered,
    "costs": checks.check_costs,
    "blocks": checks.check_blocks,
    "input_shapes": checks.check_input_shapes,
    "added": checks.check_added,
    "parts": _check_parts,
}


def _compose_kept(
    first: Mapping[str, list[Indices | None]], second: Mapping[str, list[Indices | None]]
) -> dict[str, list[Indices | None]]:
    """Indices into the original of the first, of what the second keeps of the first one's result."""
    kept = dict(first)
    for name, dims in second.items():
        before = first.get(name, [None] * len(dims))
        try:
            kept[name] = [_compose_dim(name, a, b, dims[0]) for a, b in zip(before, dims, strict=True)]
        except AllocationMismatchError:
            raise
        except (IndexError, ValueError) as error:  # other dims or rows than the first allocation leaves
            raise AllocationMismatchError(
                f"{name}: the second allocation does not fit what the first one keeps ({error})"
            ) from error
    return kept


def _compose_dim(name: str, first: Indices | None, second: Indices | None, rows: Indices | None) -> Indices | None:
    """Indices of one dim; `rows` are those that the second allocation keeps of the first dim's."""
    if first is None:
        return second
    a = np.asarray(first)
    if a.ndim == 2 and rows is not None:
        a = a[np.asarray(rows, dtype=np.int64)]
    if second is None:
        return list(a.tolist())
    b = np.asarray(second, dtype=np.int64)
    if b.size and (b.min() < 0 or b.max() >= a.shape[-1]):
        raise AllocationMismatchError(f"{name}: index {b.max()} of the second allocation, {a.shape[-1]} are kept")
    if a.ndim == 1 and b.ndim == 1:
        return list(a[b].tolist())
    # One of the two has a row per output (a grouped weight); the other is the same for all of them.
    a = np.broadcast_to(a, (len(b) if b.ndim == 2 else len(a), a.shape[-1]))
    b = np.broadcast_to(b, (len(a), b.shape[-1]))
    return list(np.take_along_axis(a, b, axis=1).tolist())


def _compose_attributes(
    first: Mapping[str, dict[str, Any]], second: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Of both, the second's where both set one."""
    attributes = {path: dict(values) for path, values in first.items()}
    for path, values in second.items():
        attributes.setdefault(path, {}).update(values)
    return attributes


def _from_one_budget(data: dict[str, Any]) -> dict[str, Any]:
    """Data of formats 1 and 2 in the present one."""
    figures = {key: data[f"flops_{key}"] for key in ("asked", "before", "after") if f"flops_{key}" in data}
    for key, value in figures.items():
        if not isinstance(value, (int, float)):
            raise FileError(f"the allocation's flops_{key} is {a_kind(value)}, not a number")
    return {**data, "format": FORMAT, "costs": {"flops": figures}}


def _compose_costs(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the second asked for and left, of what there was before the first."""
    costs = {}
    for name, figures in second.items():
        before = first.get(name, figures).get("before", figures.get("before"))
        costs[name] = {**figures, "before": before}
    return costs


def _compose_blocks(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the second has left of the branches that there were before the first."""
    before = {}
    for block in first:
        for branch in block["branches"]:
            before[block["name"], branch["name"]] = branch["before"]
    composed = []
    for block in second:
        branches = []
        for branch in block["branches"]:
            # Of a branch that the first did not know, the second says what there was.
            widest = before.get((block["name"], branch["name"]), branch["before"])
            branches.append({**branch, "before": widest})
        composed.append({**block, "branches": branches})
    return composed


def architecture_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash of the names and shapes of all parameters and buffers, as `shapes_of` gives them."""
    return _digest(f"{name} {shape}" for name, shape in sorted(shapes.items()))


def _as_json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
