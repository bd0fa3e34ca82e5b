"""Trains what a policy names, block by block, against the float network.

The trained parts of a block (``trained_block``: ``weights`` and the forms of
``quantizers.trained``) move by a loss (``losses``) on images (``curriculum``), step by step
(``training``), kept on disk (``checkpoint``). The pass ``Reconstruct`` wires them.
"""
