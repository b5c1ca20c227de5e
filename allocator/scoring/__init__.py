"""Criteria: how much each neuron matters. Importing this package fills the table of those that come with it."""

from allocator.scoring import weights, with_data

__all__ = ["weights", "with_data"]
