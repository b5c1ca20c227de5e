"""Which neurons to keep under a budget."""
