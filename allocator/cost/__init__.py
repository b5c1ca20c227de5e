"""What a network costs as a function of the neurons that are kept, and what it costs when it is measured."""
