"""The integer backend: products on integer codes with exact integer accumulators.

Read :mod:`lowering` for how a graph is rewritten, :mod:`modules` for what its nodes compute,
:mod:`kernels` and :mod:`convolve` for why the sums are exact. :mod:`integer_only` has the form
without any float arithmetic between the first and the last code, :mod:`audit` the proof of it.
"""

from fxquant.backends.integer.audit import float_operations
from fxquant.backends.integer.lowering import lower_to_integer

__all__ = ["float_operations", "lower_to_integer"]
