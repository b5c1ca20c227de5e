"""Policies: who competes with whom. Importing this package fills the table of those that come with it."""

from allocator.planning.policies import ordered, priced

__all__ = ["ordered", "priced"]
