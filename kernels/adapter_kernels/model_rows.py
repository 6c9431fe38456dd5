"""Where an adapter's model ops lie in its image: the offset table of what acts outside the linear layers.

Owns the table's types alone; `model_image.py` reads the tensors. Offsets are bytes from the image's begin; indices are
int32, norms and biases of gates float32, all else in the image's dtype.
"""

from dataclasses import dataclass

from adapter_kernels.gate_options import METEORA, GateOptions


@dataclass(frozen=True, slots=True)
class NormRow:
    """Byte offset of one norm's weight fp32, as a checkpoint holds it; layer -1 and "norm": the norm after the last."""

    layer: int
    norm: str
    offset: int


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Byte offsets of `count` token ids int32 and of as many rows [H]; target "embed", "lm_head" or "both"."""

    target: str
    count: int
    idx_offset: int
    e_offset: int


@dataclass(frozen=True, slots=True)
class EmbedRow:
    """Byte offsets of AT [V, rank] and BT [rank, H]."""

    rank: int
    at_offset: int
    bt_offset: int


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Byte offset of `count` embeddings [H]."""

    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class PrefixRow:
    """Byte offsets of the keys and the values of `count` positions, each [layers, count, K, E]."""

    count: int
    k_offset: int
    v_offset: int


@dataclass(frozen=True, slots=True)
class HeadRow:
    """Byte offsets of A [rank, H] and BT [rank, V] of the output head, and of its bias [V]; rank 0: no low rank."""

    rank: int
    a_offset: int
    bt_offset: int
    bias_offset: int | None


@dataclass(frozen=True, slots=True)
class GateRow:
    """The gate that the experts of one layer's MLP share: byte offsets of W [E, H] and bias [E], and its options.

    `is_ffn_moe`: the experts are mixed behind the activation; otherwise each of the MLP's sites mixes its own.
    """

    layer: int
    num_experts: int
    top_k: int
    temperature: float
    weight_offset: int
    bias_offset: int | None = None
    options: GateOptions = METEORA
    is_ffn_moe: bool = False


@dataclass(frozen=True, slots=True)
class ModelRows:
    """Where an adapter's model ops lie in its image."""

    norms: tuple[NormRow, ...] = ()
    token_rows: tuple[TokenRow, ...] = ()
    embed_lowrank: EmbedRow | None = None
    prompt_embeds: PromptRow | None = None
    kv_prefix: PrefixRow | None = None
    gates: tuple[GateRow, ...] = ()
    head: HeadRow | None = None


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The base's dimensions that model ops depend on."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    # width of each norm of a layer that may be replaced, by name, and of the last one, "norm"
    norm_widths: dict[str, int]
