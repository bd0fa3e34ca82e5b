"""Trains roundings, scales and biases block by block against the float network.

The trained parameters of a block (``trained_block``: ``weights`` and the forms of
``quantizers.trained``) minimize a loss (``losses``) on images (``curriculum``), step by step
(``training``); results are saved on disk (``checkpoint``). The pass ``Reconstruct`` connects these
modules.
"""
