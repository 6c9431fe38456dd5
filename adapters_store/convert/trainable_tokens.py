"""PEFT's TRAINABLE_TOKENS: rows of the embedding, and of a head that is tied to it, trained and saved whole.

Owns its keys. Invariant: despite their name in the file the values are the rows themselves, not differences.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config
from adapters_store.convert.model_factors import ModelFactors, TokenValues
from adapters_store.convert.outer_tensors import EMBED, HEAD_PLACE
from adapters_store.convert.peft_keys import common_rules, used
from adapters_store.convert.peft_targets import DefaultTargets
from adapters_store.convert.peft_tensors import PeftTensors, TensorFile, check_shape
from adapters_store.convert.saved_modules import read_token_ids, sorted_rows
from adapters_store.convert.tuner import PlannedModule, Served
from adapters_store.errors import CorruptUpload

_ROWS = "trainable_tokens_delta"
_IDS = "token_indices"


@dataclass(frozen=True, slots=True)
class _Tuner:
    ids: tuple[int, ...]

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return nothing: no linear layer changes."""
        tensors.take_shared()
        return {}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def read_model(self, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
        """Return the rows by target; raises CorruptUpload when those of a tied embedding and head differ."""
        rows: dict[str, TokenValues] = {}
        for place, part in tensors.outer.names(_ROWS):
            slot = tensors.outer.take((place, part))
            assert slot is not None, "it was just listed"
            check_shape(slot, (len(self.ids), base.hidden_size))
            target = "lm_head" if place == HEAD_PLACE else "both" if base.tie_word_embeddings else "embed"
            rows[target] = sorted_rows(self.ids, file.floats(slot), base, _IDS)
        # PEFT keeps one set of rows for both ends, and saves it twice
        copy = rows.pop("lm_head", None) if "both" in rows else None
        if copy is not None and not np.array_equal(rows["both"].rows, copy.rows):
            raise CorruptUpload("the file holds two sets of rows for a tied embedding and head", param=HEAD_PLACE)
        return ModelFactors(token_rows=rows)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_token_ids(config.get(_IDS), _IDS))


TRAINABLE_TOKENS = Served(
    title="trainable tokens",
    served_as="rows of the embedding, and of a head that is tied to it",
    limits="more than a quarter of the vocabulary; tokens beyond the base's vocabulary",
    rules=(*common_rules("init_weights"), used(_IDS, "tokens whose rows were trained")),
    parts=frozenset(),
    read=_read,
    recorded=(_IDS,),
    default_targets=DefaultTargets((EMBED,), frozenset()),
    acts_on="tables",
)
