"""What a PEFT config trains whole beside its own kind: norms and tables of `modules_to_save`, and tokens' rows.

Owns these keys and what their tensors become: norms replace the base's, tables replace the rows that differ from the
base's. Invariant: a copy of the base's own table is compared with it, value by value, before it is dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_flag
from adapters_store.convert.model_factors import Ids, ModelFactors, TokenValues
from adapters_store.convert.outer_tensors import EMBED, FINAL_NORM_PLACE, HEAD_PLACE, OuterName
from adapters_store.convert.peft_patterns import read_names
from adapters_store.convert.peft_tensors import PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Array
from adapters_store.errors import CorruptUpload, TrainedElsewhere, UnsupportedAdapter
from adapters_store.float_bits import Float32
from adapters_store.model_ops import HEAD_NORMS
from adapters_store.safetensors_header import TensorSlot
from adapters_store.strict_json import Json

_TOKENS = "trainable_token_indices"
_ROWS = "token_adapter.trainable_tokens_delta"
_TARGETS = {EMBED: "embed", HEAD_PLACE: "lm_head"}
_COPIES = ("base_layer.weight", "token_adapter.base_layer.weight")
# every base has these; others are looked up in its files
_EVERYWHERE = frozenset({"input_layernorm", "post_attention_layernorm", FINAL_NORM_PLACE})
MAX_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Saved:
    """`modules` as modules_to_save lists them; `tokens` are token ids by the place whose rows were trained."""

    modules: tuple[str, ...]
    tokens: dict[str, tuple[int, ...]]
    is_tying: bool

    def declares(self, place: str, prefix: str) -> bool:
        """Return whether PEFT trains the module at this place whole: it goes by the end of the path."""
        path = place if place == HEAD_PLACE else f"{prefix}{place}"
        return any(path.endswith(name) for name in self.modules)


def read_saved(config: Config) -> Saved:
    """Read the keys; raises UnsupportedAdapter, with the key as `param`."""
    modules = read_names(config.get("modules_to_save"), "modules_to_save")
    tokens = config.get(_TOKENS)
    by_place = tokens if isinstance(tokens, dict) else {} if tokens is None else {EMBED: tokens}
    if not by_place.keys() <= _TARGETS.keys():
        raise UnsupportedAdapter(
            f"{_TOKENS} names {sorted(by_place.keys() - _TARGETS.keys())[0]!a}; read here: {', '.join(_TARGETS)}",
            param=_TOKENS,
        )
    read = {place: read_token_ids(ids, _TOKENS) for place, ids in by_place.items()}
    return Saved(modules, read, read_flag(config, "ensure_weight_tying"))


def read_token_ids(value: Json, key: str) -> tuple[int, ...]:
    """Read a list of distinct token ids; raises UnsupportedAdapter, with the key as `param`."""
    ids = value if isinstance(value, list) else []
    whole = [number for number in ids if isinstance(number, int) and not isinstance(number, bool) and number >= 0]
    if not 0 < len(ids) <= MAX_TOKENS or len(whole) != len(ids) or len(set(whole)) != len(whole):
        raise UnsupportedAdapter(f"{key} must list 1 to {MAX_TOKENS} token ids, each once", param=key)
    return tuple(whole)


def read_saved_modules(saved: Saved, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
    """Take and read what the config trained whole.

    Raises:
        CorruptUpload: a declared tensor lacks. UnsupportedAdapter: an undeclared one, or another vocabulary.
        TrainedElsewhere: what should be a copy of the base's table is none. WrongBase: the base is not at hand.
    """
    norms = dict(_norms(saved, tensors, file, base))
    rows = _token_rows(saved, tensors, file, base)
    for place in _TARGETS:
        slot = tensors.outer.take((place, "weight"))
        if slot is not None:
            found = _differing(place, slot, tensors, file, base)
            if len(found.ids):
                rows[_TARGETS[place]] = found
                if not saved.declares(place, tensors.prefix):
                    raise TrainedElsewhere(
                        f"{slot.name} is not the base's, but modules_to_save does not name {place}", param=slot.name
                    )
        elif saved.declares(place, tensors.prefix):
            raise CorruptUpload(f"modules_to_save names {place}, but the file does not hold it", param=place)
        _drop_copies(place, tensors, file, base)
    if base.tie_word_embeddings and saved.is_tying and (rows.keys() & {"embed", "lm_head"}):
        raise UnsupportedAdapter(
            "ensure_weight_tying is true on a base whose embedding and head are one: save the adapter without it",
            param="ensure_weight_tying",
        )
    _check_all_declared(saved, norms, tensors, base)
    return ModelFactors(norms=norms, token_rows=rows)


def norm_place(place: str) -> tuple[int, str]:
    """Return layer and name of a norm: (0, "q_norm") for layers.0.self_attn.q_norm, (-1, "norm") for the last."""
    if place == FINAL_NORM_PLACE:
        return -1, FINAL_NORM_PLACE
    _, layer, *names = place.split(".")
    return int(layer), names[-1]


def norm_path(norm: str) -> str:
    """Return a norm's path in its layer."""
    return f"self_attn.{norm}" if norm in HEAD_NORMS else norm


def read_norm(place: str, slot: TensorSlot, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> Array:
    """Read the weight of one norm that the base has; raises UnsupportedAdapter for any other."""
    layer, norm = norm_place(place)
    name = place.partition(".")[2].partition(".")[2] or place
    if layer >= base.num_hidden_layers or (norm not in _EVERYWHERE and not tensors.weights.has_norm(layer, name)):
        raise UnsupportedAdapter(f"{slot.name} is a norm that this base does not have", param=slot.name)
    check_shape(slot, (base.head_dim if norm in HEAD_NORMS else base.hidden_size,))
    return file.floats(slot)


def sorted_rows(ids: tuple[int, ...], rows: Float32, base: BaseDims, key: str) -> TokenValues:
    """Return rows in order of their tokens; raises UnsupportedAdapter for tokens beyond the base's vocabulary."""
    if max(ids) >= base.vocab_size:
        raise UnsupportedAdapter(
            f"{key} holds token {max(ids)}; this base knows {base.vocab_size}: a resized vocabulary is not served",
            param=key,
        )
    places: Ids = np.asarray(ids, np.int64)
    order = np.argsort(places)
    return TokenValues(places[order], rows[order])


def _norms(
    saved: Saved, tensors: PeftTensors, file: TensorFile, base: BaseDims
) -> Iterator[tuple[tuple[int, str], Array]]:
    for name in tensors.outer.names("weight"):
        place = name[0]
        if place in _TARGETS:
            continue
        slot = tensors.outer.take(name)
        assert slot is not None, "it was just listed"
        if not saved.declares(place, tensors.prefix):
            raise UnsupportedAdapter(
                f"the file holds {slot.name}, which modules_to_save does not name", param="modules_to_save"
            )
        yield norm_place(place), read_norm(place, slot, tensors, file, base)


def _token_rows(saved: Saved, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> dict[str, TokenValues]:
    tokens = dict(saved.tokens)
    if base.tie_word_embeddings and tokens.get(EMBED) == tokens.get(HEAD_PLACE):
        # PEFT keeps the head tied to the trained rows, and saves them once
        tokens.pop(HEAD_PLACE, None)
    rows: dict[str, TokenValues] = {}
    for place, ids in tokens.items():
        name: OuterName = (place, _ROWS)
        slot = tensors.outer.take(name)
        if slot is None:
            raise CorruptUpload(f"{_TOKENS} names rows of {place}, but the file does not hold them", param=place)
        check_shape(slot, (len(ids), base.hidden_size))
        is_both = base.tie_word_embeddings and place == EMBED and HEAD_PLACE not in tokens
        rows["both" if is_both else _TARGETS[place]] = sorted_rows(ids, file.floats(slot), base, _TOKENS)
    return rows


def _differing(place: str, slot: TensorSlot, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> TokenValues:
    """Return the rows of a whole table that are not the base's; a few MB of both are in memory at a time."""
    check_shape(slot, (base.vocab_size, base.hidden_size))
    ids: list[Ids] = []
    rows: list[Float32] = []
    for part, own in tensors.weights.table(place):
        found = file.rows(slot, part.start, part.stop)
        changed = np.flatnonzero((found != own).any(axis=1))
        ids.append(part.start + changed)
        rows.append(found[changed])
    return TokenValues(np.concatenate(ids), np.concatenate(rows))


def _drop_copies(place: str, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> None:
    """Compare what PEFT saved of the base's own table with the base."""
    for part in _COPIES:
        slot = tensors.outer.take((place, part))
        if slot is not None and len(_differing(place, slot, tensors, file, base).ids):
            raise TrainedElsewhere(
                f"{slot.name} should be the base's own {place}, and is not: the adapter is of another base",
                param=slot.name,
            )


def _check_all_declared(
    saved: Saved, norms: dict[tuple[int, str], Array], tensors: PeftTensors, base: BaseDims
) -> None:
    """Refuse a name of modules_to_save that trained nothing, and a norm that it names and the file lacks."""
    # which others there are differs between bases: one that the file holds anywhere must be in every layer
    kinds = {norm for _, norm in norms} | _EVERYWHERE - {FINAL_NORM_PLACE}
    places = {f"layers.{layer}.{norm_path(norm)}" for layer in range(base.num_hidden_layers) for norm in kinds}
    places = {place for place in places if not place.endswith(f".{FINAL_NORM_PLACE}")} | {FINAL_NORM_PLACE}
    for place in sorted(places):
        if saved.declares(place, tensors.prefix) and norm_place(place) not in norms:
            raise CorruptUpload(f"modules_to_save names {place}, but the file does not hold it", param=place)
    for name in saved.modules:
        one = Saved((name,), {}, is_tying=False)
        if not any(one.declares(place, tensors.prefix) for place in (*places, *_TARGETS)):
            raise UnsupportedAdapter(
                f"modules_to_save names '{name}'; norms, embed_tokens and lm_head are served", param="modules_to_save"
            )
