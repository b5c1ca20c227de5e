"""Which of a forward's draws are its own: from a generator that it made, holds or seeded, the same on every run.

Of fewer numbers each would be another, so that channels which meet them can't go; what is drawn anew on every run says
nothing of the network.
"""

from __future__ import annotations

from typing import Any

from allocator.torch_private import generator_states


class Seeds:
    """Tells a forward's own draws from others, by the states of the process's generators; to be made before it runs."""

    def __init__(self) -> None:
        self._unseeded = generator_states()

    def is_own(self, given: dict[str, Any]) -> bool:
        """Whether a call that draws, given these arguments by name, is about to draw from such a generator."""
        return given.get("generator") is not None or generator_states() != self._unseeded

    def drew(self) -> None:
        """A call that was not one's own has drawn."""
        self._unseeded = generator_states()
