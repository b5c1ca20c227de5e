"""Module attributes that follow the kept channels: which, which are on trial, and which were tried in vain."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from allocator.flow.facts import Attribute
from allocator.flow.options import Pair
from allocator.rewriting.describe import AttributeKey


@dataclass
class Mends:
    """Module attributes that follow the kept channels, because the forward reads them as sizes.

    Attributes:
        pieces: per attribute the labels whose kept count is its value; several arrays for one that holds several.
        trial: the last ones, and the place (forward, index) of the call that they are for.
        wrong: those that did not help there, each with the labels that they were tried for.
        in_vain: by place those that did not help there, one at a time; empty once they were tried together.
        notes: what was said of them, each with those that it is about.
        tied: slots that were tied last, with the place and what was said; taken back where that did not help.
        apart: those for which it did not.
        counted: by place which layers a call was found to hang on beside its own, each by a slot of it.
    """

    pieces: dict[AttributeKey, tuple[np.ndarray, ...]] = field(default_factory=dict)
    trial: tuple[tuple[int, int], list[AttributeKey]] | None = None
    wrong: dict[AttributeKey, list[tuple[np.ndarray, ...]]] = field(default_factory=dict)
    in_vain: dict[tuple[int, int], dict[AttributeKey, tuple[np.ndarray, ...]] | None] = field(default_factory=dict)
    notes: dict[str, list[AttributeKey]] = field(default_factory=dict)
    tied: tuple[tuple[int, int], set[Pair], str] | None = None
    apart: set[Pair] = field(default_factory=set)
    counted: dict[tuple[int, int], set[int]] = field(default_factory=dict)

    def attributes(self) -> list[Attribute]:
        """All of them."""
        return [Attribute(path, name, pieces) for (path, name), pieces in self.pieces.items()]

    def judge(self, place: tuple[int, int]) -> bool:
        """Take the last ones back if the forward got no further with them; whether it stopped before their call."""
        trial, self.trial = self.trial, None
        if trial is None or place > trial[0]:
            return False
        vain = self.in_vain.setdefault(trial[0], {})
        for key in trial[1]:
            tried = self.pieces.pop(key, ())
            self.wrong.setdefault(key, []).append(tried)
            if vain is not None and tried:
                vain[key] = tried
        return place < trial[0]

    def was_wrong(self, key: AttributeKey, pieces: tuple[np.ndarray, ...]) -> bool:
        """Whether an attribute was tried for these labels in vain."""
        tried = (each for each in self.wrong.get(key, ()) if len(each) == len(pieces))
        return any(all(map(np.array_equal, each, pieces)) for each in tried)

    def together(self, place: tuple[int, int]) -> list[AttributeKey]:
        """Let all that did not help at a place one at a time follow at once; their keys, none where that was tried."""
        vain = self.in_vain.get(place) or {}
        if len({name for _, name in vain}) < 2:
            return []
        self.in_vain[place] = None
        self.pieces.update(vain)
        self.trial = place, list(vain)
        return self.trial[1]

    def ties_in_vain(self, place: tuple[int, int], notes: list[str]) -> set[Pair]:
        """What was tied last, if the forward got no further with it; out of `notes` too."""
        last, self.tied = self.tied, None
        if last is None or place > last[0]:
            return set()
        self.apart |= last[1]
        notes.remove(last[2])
        return last[1]

    def forget(self, paths: set[str]) -> None:
        """Take all of these modules back."""
        for key in [key for key in self.pieces if key[0] in paths]:
            del self.pieces[key]

    def retract(self, notes: list[str]) -> None:
        """Take out of `notes` what no longer holds of any of them."""
        for note, keys in list(self.notes.items()):
            if self.pieces.keys().isdisjoint(keys):
                notes.remove(note)
                del self.notes[note]
