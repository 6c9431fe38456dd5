"""What S2FT trained at one layer: dense rows of v_proj and up_proj, dense columns of o_proj and down_proj.

Owns the difference to the base in the base's own order. Invariant: only positions with a non-zero difference are
selected, and the difference is taken in float32.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.base import SITE_PATHS
from adapters_store.convert.model_files import BitPair, ModelFiles, num_rows
from adapters_store.convert.s2ft_order import LayerOrder, Order
from adapters_store.errors import AmbiguousOrder, CorruptUpload, TrainedElsewhere, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.op_limits import check_selected

# site -> whether its selection is of columns (inputs) rather than of rows (outputs)
TRAINED_SITES = {"v_proj": False, "o_proj": True, "up_proj": False, "down_proj": True}
# sites that share a selection's range: the first one's begins at 0, the second one's behind what only the first has
_PAIRS = {"v_proj": "o_proj", "o_proj": "v_proj", "up_proj": "down_proj", "down_proj": "up_proj"}
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class Selection:
    """One site's trained part in the base's order: positions, strictly increasing, and D [positions, other dim]."""

    indices: npt.NDArray[np.int64]
    values: Float32


def order_of(site: str, order: LayerOrder) -> Order:
    """Return the order of the site's selectable dimension."""
    return {"v_proj": order.key, "o_proj": order.query}.get(site, order.channel)


def read_selection(layer: int, site: str, order: LayerOrder, found: ModelFiles, base: ModelFiles) -> Selection | None:
    """Return what was trained at one site, None if nothing was.

    Raises:
        LimitExceeded: more than a quarter was. WrongBase: another shape. AmbiguousOrder, TrainedElsewhere,
        CorruptUpload: tensors `s2` that were not fused, and whose place cannot be told.
    """
    stem = f"layers.{layer}.{SITE_PATHS[site]}"
    name, is_columns = f"{stem}.weight", TRAINED_SITES[site]
    pair = BitPair.read(name, found, base)
    if pair.found.shape != pair.base.shape:
        raise WrongBase(
            f"{found.original(name)} has shape {list(pair.found.shape)}; the base's has {list(pair.base.shape)}",
            param=found.original(name),
        )
    own = order_of(site, order)
    changed = _changed_columns(pair, own) if is_columns else _changed_rows(pair, own)
    if f"{stem}.s2" in found.names:
        if changed.any():
            raise TrainedElsewhere(
                f"{found.original(name)} is not the base's although the file holds its s2 apart",
                param=found.original(name),
            )
        positions, values = _unfused(stem, layer, site, own, found)
    else:
        positions = np.flatnonzero(changed)
        check_selected(len(positions), len(own), found.original(name), param=found.original(name))
        values = _difference(pair, positions, own, is_columns=is_columns)
    return _sorted(own[positions], values)


def _changed_rows(pair: BitPair, order: Order) -> npt.NDArray[np.bool_]:
    changed = np.zeros(len(order), dtype=np.bool_)
    step = num_rows(pair.found.shape, _CHUNK_VALUES)
    for begin in range(0, len(order), step):
        chunk = slice(begin, begin + step)
        changed[chunk] = np.any(pair.found[chunk] != pair.base[order[chunk]], axis=1)
    return changed


def _changed_columns(pair: BitPair, order: Order) -> npt.NDArray[np.bool_]:
    changed = np.zeros(len(order), dtype=np.bool_)
    step = num_rows(pair.found.shape, _CHUNK_VALUES)
    for begin in range(0, len(pair.found), step):
        chunk = slice(begin, begin + step)
        changed |= np.any(pair.found[chunk] != pair.base[chunk][:, order], axis=0)
    return changed


def _difference(pair: BitPair, positions: npt.NDArray[np.int64], order: Order, *, is_columns: bool) -> Float32:
    if is_columns:
        found, base = pair.found[:, positions].T, pair.base[:, order[positions]].T
    else:
        found, base = pair.found[positions], pair.base[order[positions]]
    with np.errstate(invalid="ignore", over="ignore"):
        return pair.values(found) - pair.values(base)


def _unfused(
    stem: str, layer: int, site: str, order: Order, found: ModelFiles
) -> tuple[npt.NDArray[np.int64], Float32]:
    """Return the positions in the checkpoint that a tensor `s2` stands for, and its values [positions, other dim]."""
    name = f"{stem}.s2"
    is_columns = TRAINED_SITES[site]
    partner = f"layers.{layer}.{SITE_PATHS[_PAIRS[site]]}.s2"
    if is_columns and partner in found.names:
        # begins behind what only the partner selected; how much that is, no file says
        raise AmbiguousOrder(
            f"the place of {found.original(name)} cannot be told beside {found.original(partner)}: fuse s2 into the "
            "weights before saving",
            param=found.original(name),
        )
    shape, other = found.shape(name), found.shape(f"{stem}.weight")[0 if is_columns else 1]
    if len(shape) != 2 or shape[0 if is_columns else 1] != other:
        raise CorruptUpload(f"{found.original(name)} has shape {list(shape)}", param=found.original(name))
    values = found.values(name)
    values = np.ascontiguousarray(values.T) if is_columns else values
    check_selected(len(values), len(order), found.original(name), param=found.original(name))
    return np.arange(len(values)), values


def _sorted(indices: npt.NDArray[np.int64], values: Float32) -> Selection | None:
    # a sum with 0 may change the sign of a 0: that is no training
    is_trained = np.any(values != 0, axis=1)
    indices, values = indices[is_trained], values[is_trained]
    if len(indices) == 0:
        return None
    ascending = np.argsort(indices)
    return Selection(indices[ascending], values[ascending])
