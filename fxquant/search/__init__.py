"""Scale, rank and rounding searches: pure tensor functions, which passes apply to a graph."""
