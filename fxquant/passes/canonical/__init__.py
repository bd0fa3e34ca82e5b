"""The passes that bring a captured graph to the canonical dialect."""
