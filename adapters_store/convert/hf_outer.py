"""What a fine-tuned model changed outside its linear layers: norms and rows of the vocabulary.

Owns the comparison of both, and the rows that resizing added behind the base's, which no served token names: they are
named and left. Invariant: a tensor that differs from the base's is served whole or refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.foreign import Values
from adapters_store.convert.frozen_tensors import MAX_ADDED_ROWS
from adapters_store.convert.hf_source import norm_name
from adapters_store.convert.model_files import ModelFiles, num_rows
from adapters_store.errors import LimitExceeded, TrainedElsewhere, UnsupportedAdapter, WrongBase
from adapters_store.model_ops import FINAL_NORM, NORMS, ModelOps, NormWeight, TokenRows
from adapters_store.op_limits import MAX_SELECTED_SHARE

_EMBED, _HEAD = "embed_tokens.weight", "lm_head.weight"
_CHUNK_VALUES = 1 << 22


@dataclass(slots=True)
class Outer:
    """The ops and their values, and what was left, as `name[from:to]`."""

    norms: list[NormWeight] = field(default_factory=list)
    rows: list[TokenRows] = field(default_factory=list)
    values: dict[str, Callable[[], Values]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def ops(self) -> ModelOps:
        """Return the model's ops."""
        return ModelOps(norms=tuple(sorted(self.norms)), token_rows=tuple(sorted(self.rows)))


def read_outer(found: ModelFiles, base: ModelFiles, dims: BaseDims) -> Outer:
    """Compare everything but the linear layers.

    Raises:
        UnsupportedAdapter: a tensor changed that no op serves. LimitExceeded: too many rows of the vocabulary.
        TrainedElsewhere: a tied output head that is not the embedding. WrongBase: another vocabulary.
    """
    outer = Outer()
    places = [(-1, FINAL_NORM), *((layer, norm) for layer in range(dims.num_hidden_layers) for norm in NORMS)]
    norms = {norm_name(*place): NormWeight(*place) for place in places}
    for name in sorted(base.names):
        if name in norms:
            _compare_norm(name, norms[name], found, base, outer)
    target = "both" if dims.tie_word_embeddings else "embed"
    _compare_table(_EMBED, target, found, base, outer)
    if dims.tie_word_embeddings:
        _compare_tied(found)
    else:
        _compare_table(_HEAD, "lm_head", found, base, outer)
    return outer


def _compare_norm(name: str, norm: NormWeight, found: ModelFiles, base: ModelFiles, outer: Outer) -> None:
    own = found.values(name)
    if np.array_equal(own, base.values(name)):
        return
    outer.norms.append(norm)
    outer.values[norm.tensor] = partial(_constant, own)


def _compare_table(name: str, target: str, found: ModelFiles, base: ModelFiles, outer: Outer) -> None:
    count, width = base.shape(name)
    own_count = found.shape(name)[0]
    if found.shape(name)[1:] != (width,) or not count <= own_count <= count + MAX_ADDED_ROWS:
        raise WrongBase(f"{found.original(name)} has shape {list(found.shape(name))}; the base's has {[count, width]}")
    changed: list[int] = []
    step = num_rows((count, width), _CHUNK_VALUES)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        differs = np.any(found.rows(name, begin, end) != base.rows(name, begin, end), axis=1)
        changed += (np.flatnonzero(differs) + begin).tolist()
    if own_count > count:
        outer.ignored.append(f"{found.original(name)}[{count}:{own_count}]")
    most = int(count * MAX_SELECTED_SHARE)
    if len(changed) > most:
        raise LimitExceeded(
            f"{found.original(name)} changed in {len(changed)} of {count} rows; the limit is {most} (a quarter): "
            "freeze the vocabulary, or train the few new tokens alone",
            param=found.original(name),
        )
    if changed:
        rows = TokenRows(target, len(changed))
        outer.rows.append(rows)
        outer.values[rows.tensor("idx")] = partial(_constant, np.array(changed, dtype=np.int64))
        outer.values[rows.tensor("E")] = partial(_rows, found, name, changed)


def _compare_tied(found: ModelFiles) -> None:
    """Refuse an output head that a base shares with its embedding and the checkpoint does not."""
    if _HEAD not in found.names:
        return
    if found.shape(_HEAD) != found.shape(_EMBED):
        raise UnsupportedAdapter(f"{found.original(_HEAD)} has another shape than the embedding, which the base ties")
    count = found.shape(_HEAD)[0]
    step = num_rows(found.shape(_HEAD), _CHUNK_VALUES)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        if not np.array_equal(found.rows(_HEAD, begin, end), found.rows(_EMBED, begin, end)):
            raise TrainedElsewhere(
                f"{found.original(_HEAD)} differs from the embedding, which the base ties", param=found.original(_HEAD)
            )


def _rows(found: ModelFiles, name: str, numbers: list[int]) -> Values:
    return np.stack([found.rows(name, number, number + 1)[0] for number in numbers])


def _constant(values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> Values:
    return values
