"""Channel flow: which channel of which tensor came from which index of which parameter."""
