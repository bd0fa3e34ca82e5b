"""Integer backend: products on integer codes with exact integer accumulators.

Read :mod:`lowering` for the rewriting of a graph, :mod:`modules` for the computations of its nodes,
:mod:`kernels` and :mod:`convolve` for the exactness of the sums. :mod:`integer_only` lowers a graph
to a form without any float arithmetic between the first and the last code, :mod:`audit` checks it.
"""

from fxquant.backends.integer.audit import float_operations
from fxquant.backends.integer.lowering import lower_to_integer

__all__ = ["float_operations", "lower_to_integer"]
