"""Mixed precision: the sensitivity of each group of edges, and the widths chosen by it."""
