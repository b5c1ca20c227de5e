"""Criteria: how much each neuron matters. Importing this package fills the table of those that come with it."""

from allocator.scoring import surgeon, weights, with_data

__all__ = ["surgeon", "weights", "with_data"]
