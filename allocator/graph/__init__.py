"""The channel graph: neurons, and the blocks where branches meet."""
