"""Bit allocation in plain numbers: which groups of edges get which width, within a budget.

Nothing here depends on graphs or tensors; ``fxquant.mixed_precision.choose`` makes the problem from
a graph.
"""
