"""From the store's entries of model ops to the kernels' offset table, and what of the base these ops depend on.

The same fields, of two rooms that do not know each other; decides nothing.
"""

from adapter_kernels.gate_options import GateOptions
from adapter_kernels.image import ImageError
from adapter_kernels.model_rows import (
    EmbedRow,
    GateRow,
    HeadRow,
    ModelRows,
    ModelShapes,
    NormRow,
    PrefixRow,
    PromptRow,
    TokenRow,
)
from adapters_store.entries import NO_MODEL_ENTRIES, GateEntry, SiteEntry
from adapters_store.store import OpenAdapter
from serve.model.families import QkNorm
from serve.model.spec import ModelSpec
from serve.model.weight_names import block_norm_names


def model_rows(adapter: OpenAdapter) -> ModelRows | None:
    """Return where an open adapter's model ops lie; None where it has none."""
    model = adapter.model
    if model == NO_MODEL_ENTRIES:
        return None
    embed, prompt, prefix = model.embed_lowrank, model.prompt_embeds, model.kv_prefix
    return ModelRows(
        norms=tuple(NormRow(entry.layer, entry.norm, entry.offset) for entry in model.norms),
        token_rows=tuple(
            TokenRow(entry.target, entry.count, entry.idx_offset, entry.e_offset) for entry in model.token_rows
        ),
        embed_lowrank=None if embed is None else EmbedRow(embed.rank, embed.at_offset, embed.bt_offset),
        prompt_embeds=None if prompt is None else PromptRow(prompt.count, prompt.offset),
        kv_prefix=None if prefix is None else PrefixRow(prefix.count, prefix.k_offset, prefix.v_offset),
        gates=tuple(_gate(entry) for entry in model.gates),
        head=None if model.head is None else _head(model.head),
    )


def refuse_model_ops(adapter: OpenAdapter) -> None:
    """Refuse an adapter that acts outside the linear layers, where nothing computes that.

    Raises:
        ImageError: it does; the message names what, and the way out.
    """
    model = adapter.model
    found = {
        "norms": model.norms,
        "token rows": model.token_rows,
        "the embedding": model.embed_lowrank,
        "the output head": model.head,
        "a prompt": model.prompt_embeds,
        "a prefix of keys and values": model.kv_prefix,
        "the gate of an MLP": model.gates,
    }
    names = [name for name, part in found.items() if part]
    if names:
        raise ImageError(
            f"the adapter changes {', '.join(names)}, which this device's kernels do not compute; serve it with "
            "--device cpu"
        )


def model_shapes(spec: ModelSpec) -> ModelShapes:
    """Return what of a base model ops depend on; norms over all heads at once (OLMo2) cannot be replaced."""
    dims = spec.dims
    norms = [norm for block in block_norm_names(spec.norm_placement) for norm in (block.before, block.after)]
    widths = {norm: dims.hidden_size for norm in norms if norm is not None}
    if spec.qk_norm is QkNorm.HEAD:
        widths |= {"q_norm": dims.head_dim, "k_norm": dims.head_dim}
    return ModelShapes(
        hidden_size=dims.hidden_size,
        vocab_size=dims.vocab_size,
        num_layers=dims.num_hidden_layers,
        num_kv_heads=dims.num_key_value_heads,
        head_dim=dims.head_dim,
        norm_widths={**widths, "norm": dims.hidden_size},
    )


def _head(entry: SiteEntry) -> HeadRow:
    return HeadRow(entry.rank, entry.a_offset, entry.bt_offset, entry.bias_offset)


def _gate(entry: GateEntry) -> GateRow:
    options = entry.options
    return GateRow(
        layer=entry.layer,
        num_experts=entry.num_experts,
        top_k=entry.top_k,
        temperature=entry.temperature,
        weight_offset=entry.offset,
        bias_offset=entry.bias_offset,
        options=GateOptions(options.in_norm, options.logit, options.weight, options.mix),
        is_ffn_moe=entry.is_ffn_moe,
    )
