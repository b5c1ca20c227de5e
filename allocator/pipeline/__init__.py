"""The flow from end to end: a model traced, a choice made and proven, many of them, one after the other."""
