"""Rotation of residual streams and of heads, folded into the weights around them."""
