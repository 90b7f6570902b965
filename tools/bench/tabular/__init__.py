"""A complete small search space, evaluated once, and samplers replayed on it."""
