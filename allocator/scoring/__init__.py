"""Criteria: how much each neuron matters."""
