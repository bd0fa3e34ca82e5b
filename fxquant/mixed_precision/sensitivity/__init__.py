"""What each group of edges at each width does to the loss, measured and estimated.

All of it runs on a graph in stage OBSERVED, whose observers have seen the calibration images, and
changes nothing in it.
"""
