"""Single entries of a weight out of a file: places in any order become rows and columns in order.

Owns the order and its check. Invariant: no place occurs twice, so adding an entry and setting it are the same.
"""

import numpy as np
import numpy.typing as npt

from adapters_store.convert.tuner import SparseValues
from adapters_store.errors import InvalidIndex
from adapters_store.float_bits import Float32


def entries_in_order(flat: npt.NDArray[np.int64], values: Float32, num_in: int, what: str) -> SparseValues:
    """Return the entries of flat, row-major places [n] of a weight with `num_in` columns, and their values [n].

    Raises:
        InvalidIndex: a place occurs twice; `param` is `what`.
    """
    order = np.argsort(flat, kind="stable")
    places = flat[order]
    if np.any(places[1:] == places[:-1]):
        raise InvalidIndex(f"{what} names a place of the weight twice", param=what)
    return SparseValues(rows=places // num_in, cols=places % num_in, values=values[order])
