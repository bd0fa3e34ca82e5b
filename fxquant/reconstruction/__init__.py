"""Trains what a policy names, block by block, against the float network.

What can be trained (``activations``, ``weights``) of a block (``trained_block``), by which loss
(``losses``), on which images (``curriculum``), step by step (``training``), kept on disk
(``checkpoint``). The pass ``Reconstruct`` wires them.
"""
