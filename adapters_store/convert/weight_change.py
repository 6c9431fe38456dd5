"""What kind of change one matrix of a fine-tuned model is, and its values in the cheapest exact form.

Owns the choice between rows, columns, single entries, a low rank and the whole matrix. Invariants: rows, columns,
entries and whole matrices are exact; a low rank is taken only where it meets the difference to within the rounding of
float32 sums, or, if the uploader allows `lossy`, of the checkpoint's own dtype; its error is measured on all values.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.convert.tensor_files import Int64
from adapters_store.float_bits import ROUNDOFF, Float32
from adapters_store.op_limits import MAX_DENSITY, MAX_SELECTED_SHARE

# beyond the true rank, so that a matrix of that rank is met for certain
_OVERSAMPLING = 8
_SEED = 20260905
# squared and summed over a row it stays in float32
_MAX_VALUE = 1e12
# the sum of a weight and a change, and the difference taken back, round once each
_EXACT_SLACK = 4.0


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix' difference [out, in], as `kind`: rows, cols, csr, lowrank or dense.

    `places` are the rows, columns or flat places; `values` [n, in], [n, out], [n] or [out, in]; a low rank has
    `values` BT [r, out] and `a` [r, in]. `error` is the largest difference that a low rank leaves.
    """

    kind: str
    places: Int64
    values: Float32
    a: Float32 | None = None
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Rank of a low rank, else 0."""
        return 0 if self.a is None else len(self.a)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a matrix that no form fits is like, for its refusal: share of changed values, and rank if it was found."""

    density: float
    rank: int | None


def classify(found: Float32, base: Float32, dtype: str, max_rank: int, *, is_lossy: bool) -> Change | Facts | None:
    """Return the change from `base` to `found` [out, in] in its cheapest form; None where nothing changed.

    Args:
        dtype: the checkpoint's, as safetensors spells it.
        max_rank: of a low rank. is_lossy: a low rank may miss by the checkpoint's rounding.
    Returns:
        Facts where only the whole matrix would be exact.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        delta = found - base
    changed = delta != 0
    num_changed = int(np.count_nonzero(changed))
    if num_changed == 0:
        return None
    sparse = _sparse(delta, changed, num_changed)
    if sparse is not None:
        return sparse
    density = num_changed / delta.size
    if not np.all(np.isfinite(delta)):
        return Facts(density, None)
    # the sum that the trainer rounded, at its largest: a fit spreads the roundings of all values over each
    size = float(np.max(np.abs(found)) + np.max(np.abs(base)))
    low = _low_rank(delta, _EXACT_SLACK * ROUNDOFF["F32"] * size, max_rank)
    if low is None and is_lossy:
        low = _low_rank(delta, ROUNDOFF[dtype] * size, max_rank)
    return low if low is not None else Facts(density, None)


def _sparse(delta: Float32, changed: npt.NDArray[np.bool_], num_changed: int) -> Change | None:
    """Return rows, columns or entries, whichever holds the fewest numbers; None where too much changed for each."""
    num_out, num_in = delta.shape
    rows, cols = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    sizes: dict[str, int] = {}
    if len(rows) <= int(num_out * MAX_SELECTED_SHARE):
        sizes["rows"] = len(rows) * num_in
    if len(cols) <= int(num_in * MAX_SELECTED_SHARE):
        sizes["cols"] = len(cols) * num_out
    if num_changed <= int(delta.size * MAX_DENSITY):
        # each entry has its place beside it
        sizes["csr"] = 2 * num_changed + num_out
    if not sizes:
        return None
    kind = min(sizes, key=lambda name: sizes[name])
    if kind == "rows":
        return Change(kind, rows, delta[rows])
    if kind == "cols":
        return Change(kind, cols, np.ascontiguousarray(delta[:, cols].T))
    places = np.flatnonzero(changed)
    return Change(kind, places, delta.reshape(-1)[places])


def _low_rank(delta: Float32, allowed: float, max_rank: int) -> Change | None:
    """Return a low rank whose product misses no value by more than `allowed`; None if none does."""
    num_out, num_in = delta.shape
    width = min(max_rank + _OVERSAMPLING, num_out, num_in)
    largest = float(np.max(np.abs(delta)))
    if largest > _MAX_VALUE:
        # its sketch would overflow float32
        return None
    random = np.random.default_rng(_SEED)
    # two passes: the second turns the sketch towards the large directions
    sketch = delta @ random.standard_normal((num_in, width)).astype(np.float32)
    sketch = delta @ (delta.T @ np.linalg.qr(sketch.astype(np.float64))[0].astype(np.float32))
    q = np.linalg.qr(sketch.astype(np.float64))[0]
    u, values, vh = np.linalg.svd(q.T @ delta, full_matrices=False)
    left = q @ u
    for rank in _ranks(values, min(max_rank, len(values))):
        # both factors carry half of the size, so neither overflows
        root = np.sqrt(values[:rank])
        bt, a = (left[:, :rank] * root).T.astype(np.float32), (vh[:rank] * root[:, None]).astype(np.float32)
        error = float(np.max(np.abs(delta - bt.T @ a)))
        if error <= allowed:
            return Change("lowrank", np.zeros(0, dtype=np.int64), bt, a, error)
    return None


def _ranks(values: npt.NDArray[np.float64], most: int) -> list[int]:
    """Return the ranks worth trying: where the singular values drop most steeply, then all that is allowed."""
    steps = values[1:] / np.maximum(values[:-1], np.finfo(np.float64).tiny)
    steep = [int(index) + 1 for index in np.argsort(steps, kind="stable")[:2] if index + 1 <= most]
    return [*dict.fromkeys([*steep, most])]
