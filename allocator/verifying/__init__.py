"""Proof that the smaller network is the original minus the neurons that were dropped."""
