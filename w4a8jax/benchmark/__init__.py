"""Measurements of the kernels on a GPU beside their peers, and the choice of configurations from measurements."""
