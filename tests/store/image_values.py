"""Reads a served image the slow way: numpy views at the entry's offsets, and the execution model one row at a time.

Owns the oracle of what an adapter adds to a module's output. Invariant: shares no code with the store but the offsets.
"""

import numpy as np
import numpy.typing as npt

from adapters_store.store import OpenAdapter, SiteEntry, SparseEntry

Array = npt.NDArray[np.float32]


class ImageValues:
    """One float32 image."""

    def __init__(self, image: OpenAdapter) -> None:
        assert image.dtype == "float32", "this oracle reads float32 images"
        self._image = image
        self.entries = {(entry.layer, entry.site): entry for entry in image.entries}

    def floats(self, offset: int | None, *shape: int) -> Array:
        """Return a float32 tensor."""
        assert offset is not None and offset % 128 == 0
        count = int(np.prod(shape))
        return np.frombuffer(self._image.data, dtype="<f4", count=count, offset=offset).reshape(shape)

    def indices(self, sparse: SparseEntry) -> list[int]:
        """Return the positions of a selection."""
        assert sparse.idx_offset % 128 == 0
        return [*np.frombuffer(self._image.data, dtype="<i4", count=sparse.count, offset=sparse.idx_offset).tolist()]

    def delta(self, layer: int, site: str, x: Array) -> Array:
        """Return what the adapter adds to the module's output for rows x [T, in]."""
        num_out, num_in = self._image.base.site_shape(site)
        entry = self.entries.get((layer, site))
        y = np.zeros((len(x), num_out), dtype=np.float32)
        if entry is None:
            return y
        for row, values in zip(y, x, strict=True):
            if entry.ranks:
                row += self._mixed(entry, values, num_out, num_in)
            if entry.cols is not None:
                d = self.floats(entry.cols.d_offset, entry.cols.count, num_out)
                for index, line in zip(self.indices(entry.cols), d, strict=True):
                    row += values[index] * line
            if entry.rows is not None:
                d = self.floats(entry.rows.d_offset, entry.rows.count, num_in)
                for index, line in zip(self.indices(entry.rows), d, strict=True):
                    row[index] += line @ values
        return y

    def _mixed(self, entry: SiteEntry, x: Array, num_out: int, num_in: int) -> Array:
        a = self.floats(entry.a_offset, entry.rank, num_in)
        bt = self.floats(entry.bt_offset, entry.rank, num_out)
        weights = {0: 1.0}
        if entry.gate_offset is not None:
            scores = self.floats(entry.gate_offset, len(entry.ranks), num_in) @ x
            best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: entry.top_k]
            shares = np.exp((scores[best] - scores[best[0]]) / entry.temperature)
            weights = dict(zip(best, (shares / shares.sum()).tolist(), strict=True))
        y = np.zeros(num_out, dtype=np.float32)
        for expert, weight in weights.items():
            begin = sum(entry.ranks[:expert])
            part = slice(begin, begin + entry.ranks[expert])
            y += weight * ((a[part] @ x) @ bt[part])
        return y
