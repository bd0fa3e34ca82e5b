"""Trains what a policy names, block by block, against the float network.

What can be trained (``activations``, ``weights``), by which loss (``losses``), on which images
(``curriculum``), one block at a time (``block_trainer``), kept on disk (``checkpoint``). The pass
``Reconstruct`` wires them.
"""
