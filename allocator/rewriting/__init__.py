"""An allocation as data, and the smaller network that it leads to."""
