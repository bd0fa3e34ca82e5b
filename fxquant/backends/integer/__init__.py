"""The integer backend: products on integer codes with exact integer accumulators.

Read :mod:`lowering` for how a graph is rewritten, :mod:`modules` for what its nodes compute,
:mod:`kernels` and :mod:`convolve` for why the sums are exact.
"""

from fxquant.backends.integer.lowering import lower_to_integer

__all__ = ["lower_to_integer"]
