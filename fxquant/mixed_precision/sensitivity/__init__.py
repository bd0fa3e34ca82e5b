"""The rise of the loss by each group of edges at each width, measured and estimated.

Both run on a graph in stage OBSERVED, whose observers have seen the calibration images, and change
nothing in the graph.
"""
