"""S2FT checkpoint (a whole model, permuted and fused) -> canonical adapter of selected rows and columns.

Owns the order of the work: every tensor that S2FT never trains must be the base's bit by bit, the rest is brought back
into the base's order and the base subtracted. Runs in the converter process. Invariant: base plus adapter is the
checkpoint, up to one rounding of the difference to the image's dtype.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_store.base import SITE_PATHS, SITES
from adapters_store.convert.adapter_writer import encode_indices, encode_values, write_image, write_manifest
from adapters_store.convert.frozen_tensors import check_names, compare_config, compare_frozen
from adapters_store.convert.model_files import BitPair, ModelFiles, file_hashes, num_rows, open_model
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.s2ft_delta import TRAINED_SITES, Selection, order_of, read_selection
from adapters_store.convert.s2ft_order import LayerOrder, read_order
from adapters_store.convert.site_effect import Float64, SourceEffect, measure_effect
from adapters_store.convert.tensor_files import unread_keys
from adapters_store.errors import AdapterWithoutEffect, InvalidOption, TrainedElsewhere, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.manifest import IMAGE_NAME, Manifest, Module, Source
from adapters_store.safetensors_header import CANONICAL_LIMITS, EXTERNAL_LIMITS

_PERMUTED_BIASES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Layers:
    """What was read of all layers: selections by canonical module, and each layer's order."""

    selections: dict[Module, Selection]
    orders: list[LayerOrder]


def convert_s2ft(source: Path, target: Path, options: ConvertOptions) -> None:
    """Read the checkpoint in the folder `source`, write the adapter into the folder `target`.

    Raises:
        AdapterRefused: the subclass and `param` say why; `target` may then hold half a file.
    """
    if options.declared.options:
        name = sorted(options.declared.options)[0]
        raise InvalidOption(f"an S2FT checkpoint has no option {name[:80]!a}", param="options")
    base_dir = _need_base_dir(options)
    is_tied = options.base.tie_word_embeddings
    with (
        open_model(source, EXTERNAL_LIMITS, is_trusted=False, is_tied=is_tied) as found,
        open_model(base_dir, CANONICAL_LIMITS, is_trusted=True, is_tied=is_tied) as base,
    ):
        compare_config(source, base_dir)
        ignored = _compare_untrained(found, base, options)
        layers = _read_layers(found, base, options)
        modules = tuple(sorted(layers.selections))
        tensors = _encoded(layers.selections, options.dtype)
        written = write_image(target, modules, options.base, options.dtype, tensors.__getitem__)
        effects = [_effect(module, layers, found, base) for module in modules]
        error = measure_effect(target / IMAGE_NAME, effects, options.base, options.dtype)
    write_manifest(
        target,
        Manifest(
            family="s2ft",
            base=options.base,
            dtype=options.dtype,
            file_bytes=written.num_bytes,
            file_sha256=written.sha256,
            modules=modules,
            source=Source("s2ft/official", file_hashes(source), {}, (*ignored, *unread_keys(source)), error),
            base_dependent=True,
        ),
    )


def _need_base_dir(options: ConvertOptions) -> Path:
    """Return the folder of the base's weights; raises WrongBase when the store was opened without it."""
    if options.base_dir is None:
        raise WrongBase(
            "an S2FT checkpoint is compared with the base's weights, which are not at hand: name them with --base"
        )
    return Path(options.base_dir)


def _compare_untrained(found: ModelFiles, base: ModelFiles, options: ConvertOptions) -> tuple[str, ...]:
    """Compare all that S2FT leaves alone and does not move; return what was added to the vocabulary."""
    weights = {f"layers.{i}.{SITE_PATHS[site]}" for i in range(options.base.num_hidden_layers) for site in SITES}
    lacking = sorted(f"{path}.weight" for path in weights if f"{path}.weight" not in base.names)
    if lacking:
        raise WrongBase(f"the base holds no {lacking[0]}: checkpoints over fused projections are not read")
    unfused = {
        f"layers.{i}.{SITE_PATHS[site]}.s2" for i in range(options.base.num_hidden_layers) for site in TRAINED_SITES
    }
    tied = {"lm_head.weight"} if options.base.tie_word_embeddings else set()
    check_names(found, (base.names | (unfused & found.names) | (tied & found.names)) - (tied - found.names))
    moved = {f"{path}.{kind}" for path in weights for kind in ("weight", "bias")}
    ignored = compare_frozen(sorted(base.names & found.names - moved), found, base)
    if tied & found.names - base.names:
        _compare_tied_head(found, base)
    return ignored


def _compare_tied_head(found: ModelFiles, base: ModelFiles) -> None:
    """Compare the head of a model that ties it to the embedding; raises WrongBase, TrainedElsewhere."""
    if found.shape("lm_head.weight") != found.shape("embed_tokens.weight"):
        raise WrongBase("lm_head.weight and embed_tokens.weight differ in shape over a base that ties them")
    pair = BitPair.read("lm_head.weight", found, found, "embed_tokens.weight")
    if not np.array_equal(pair.found, pair.base):
        raise TrainedElsewhere("lm_head.weight differs from embed_tokens.weight, which the base ties")


def _read_layers(found: ModelFiles, base: ModelFiles, options: ConvertOptions) -> _Layers:
    selections: dict[Module, Selection] = {}
    orders = []
    for layer in range(options.base.num_hidden_layers):
        order = read_order(layer, found, base, options.base)
        orders.append(order)
        _compare_biases(layer, order, found, base)
        for site, is_columns in TRAINED_SITES.items():
            selection = read_selection(layer, site, order, found, base)
            if selection is not None:
                count = len(selection.indices)
                cols, rows = (count, 0) if is_columns else (0, count)
                module = Module(layer, SITES.index(site), 0, has_bias=False, cols=cols, rows=rows)
                selections[module] = selection
    if not selections:
        raise AdapterWithoutEffect("the checkpoint is the base itself, in another order: nothing was trained")
    return _Layers(selections, orders)


def _compare_biases(layer: int, order: LayerOrder, found: ModelFiles, base: ModelFiles) -> None:
    """Refuse biases that were trained: they move with the rows, or (o, down) stay."""
    orders = {"q_proj": order.query, "k_proj": order.key, "v_proj": order.key}
    for site in SITES:
        name = f"layers.{layer}.{SITE_PATHS[site]}.bias"
        if name not in base.names:
            continue
        pair = BitPair.read(name, found, base)
        own = orders.get(site, order.channel) if site in _PERMUTED_BIASES else np.arange(len(pair.base))
        if pair.found.shape != pair.base.shape or not np.array_equal(pair.found, pair.base[own]):
            raise TrainedElsewhere(
                f"{found.original(name)} is not the base's: it was trained, or did not move with its rows",
                param=found.original(name),
            )


def _encoded(selections: dict[Module, Selection], dtype: str) -> dict[str, bytes]:
    tensors = {}
    for module, selection in selections.items():
        op = "cols" if module.cols else "rows"
        tensors[module.tensor(f"{op}.idx")] = encode_indices(selection.indices)
        tensors[module.tensor(f"{op}.D")] = encode_values(selection.values, dtype, f"the difference of {module.path}")
    return tensors


def _effect(module: Module, layers: _Layers, found: ModelFiles, base: ModelFiles) -> SourceEffect:
    """Return how the checkpoint's layer differs from the base's, by running both in the base's order."""
    own = order_of(module.site, layers.orders[module.layer])
    stem = f"layers.{module.layer}.{SITE_PATHS[module.site]}"
    is_columns = TRAINED_SITES[module.site]

    def apply(x: Float64) -> tuple[Float64, Float64]:
        trained, untrained = _fused(stem, found, is_columns=is_columns), base.values(f"{stem}.weight")
        outputs = np.arange(len(trained)) if is_columns else own
        moved = x[:, own] if is_columns else x
        y, noise = (np.zeros((len(x), len(trained))) for _ in range(2))
        step = num_rows(trained.shape, _CHUNK_VALUES)
        for begin in range(0, len(trained), step):
            rows = slice(begin, begin + step)
            weight, original = trained[rows].astype(np.float64), untrained[outputs[rows]].astype(np.float64)
            y[:, outputs[rows]] = moved @ weight.T - x @ original.T
            noise[:, outputs[rows]] = np.abs(moved) @ np.abs(weight).T + np.abs(x) @ np.abs(original).T
        return y, noise

    return SourceEffect(module, apply)


def _fused(stem: str, found: ModelFiles, *, is_columns: bool) -> Float32 | Float64:
    """Return the trained weight as the checkpoint runs it, its s2 added if that is apart."""
    weight = found.values(f"{stem}.weight")
    if f"{stem}.s2" not in found.names:
        return weight
    s2, fused = found.values(f"{stem}.s2"), weight.astype(np.float64)
    if is_columns:
        fused[:, : s2.shape[1]] += s2
    else:
        fused[: len(s2)] += s2
    return fused
