"""Bit allocation in plain numbers: chooses the width of each group of edges within a budget.

These modules do not depend on graphs or tensors; ``fxquant.mixed_precision.choose`` builds the
problem from a graph.
"""
