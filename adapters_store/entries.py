"""Where everything of an adapter lies in its image: the offsets that a server's kernels read by.

Owns the translation from the manifest's ops to bytes relative to the image's begin. Invariant: an entry names only
tensors that the canonical layout holds, and every tensor of the layout is named by one entry.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.gates import METEORA_GATE, GateOptions
from adapters_store.manifest import Manifest
from adapters_store.ops import Module
from adapters_store.safetensors_header import TensorSlot


@dataclass(frozen=True, slots=True)
class SparseEntry:
    """Where a selection lies: positions int32 `[count]`, and D `[count, out]` (cols) or `[count, in]` (rows)."""

    count: int
    idx_offset: int
    d_offset: int


@dataclass(frozen=True, slots=True)
class CsrEntry:
    """Where a sparse matrix lies: indptr int32 `[out + 1]`, col int32 `[nnz]`, and val `[nnz]` in the image's dtype.

    Ternary: `val_offset` is that of the packed signs `[ceil(nnz / 8)]` uint8, and `scale_offset` of one float32.
    """

    nnz: int
    indptr_offset: int
    col_offset: int
    val_offset: int
    scale_offset: int | None = None


@dataclass(frozen=True, slots=True)
class SiteEntry:
    """Where one module's tensors lie, in bytes relative to `OpenAdapter.data`.

    A is `[rank, in]`, BT `[rank, out]`, stacked by expert; gate `[experts, in]`, its bias `[experts]` float32; bias and
    out_scale `[out]`, in_scale `[in]`, dense `[out, in]`; blocks `[in / blockdiag, blockdiag, blockdiag]`, c0 and c1
    `[out]` float32; all contiguous. `ranks` is empty where there is no low-rank op, and one number for a plain LoRA.
    Experts that follow the gate of their MLP have its options, with its id as `gate.group`, and no `gate_offset`.
    """

    layer: int
    site: str
    ranks: tuple[int, ...]
    a_offset: int
    bt_offset: int
    bias_offset: int | None
    gate_offset: int | None = None
    top_k: int = 0
    temperature: float = 1.0
    cols: SparseEntry | None = None
    rows: SparseEntry | None = None
    out_scale_offset: int | None = None
    in_scale_offset: int | None = None
    gate: GateOptions = METEORA_GATE
    gate_bias_offset: int | None = None
    csr: CsrEntry | None = None
    dense_offset: int | None = None
    blockdiag: int = 0
    blockdiag_offset: int | None = None
    rot2_group: int = 0
    c0_offset: int | None = None
    c1_offset: int | None = None

    @property
    def rank(self) -> int:
        """Rows of A and BT."""
        return sum(self.ranks)


@dataclass(frozen=True, slots=True)
class NormEntry:
    """A norm's weight, float32 `[hidden]` or `[head_dim]`; layer -1: the final norm."""

    layer: int
    norm: str
    offset: int


@dataclass(frozen=True, slots=True)
class TokenRowsEntry:
    """Replaced rows: positions int32 `[count]` and rows `[count, hidden]`; target "embed", "lm_head" or "both"."""

    target: str
    count: int
    idx_offset: int
    e_offset: int


@dataclass(frozen=True, slots=True)
class EmbedEntry:
    """The embedding's low rank: AT `[vocab, rank]`, BT `[rank, hidden]`."""

    rank: int
    at_offset: int
    bt_offset: int


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """Prompt embeddings `[count, hidden]`."""

    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class KvPrefixEntry:
    """Keys and values `[layers, count, kv_heads, head_dim]` each; keys without rope."""

    count: int
    k_offset: int
    v_offset: int


@dataclass(frozen=True, slots=True)
class GateEntry:
    """The gate of a whole MLP: weight `[num_experts, hidden]`, bias float32 `[num_experts]`."""

    gate_id: str
    layer: int
    num_experts: int
    top_k: int
    temperature: float
    options: GateOptions
    is_ffn_moe: bool
    offset: int
    bias_offset: int | None


@dataclass(frozen=True, slots=True)
class ModelEntries:
    """What lies outside the decoder's sites; `head` is the output head's low rank and bias."""

    head: SiteEntry | None = None
    norms: tuple[NormEntry, ...] = ()
    token_rows: tuple[TokenRowsEntry, ...] = ()
    embed_lowrank: EmbedEntry | None = None
    prompt_embeds: PromptEntry | None = None
    kv_prefix: KvPrefixEntry | None = None
    gates: tuple[GateEntry, ...] = ()


NO_MODEL_ENTRIES = ModelEntries()


@dataclass(frozen=True, slots=True)
class Entries:
    """All of an adapter: `sites` in the image's order, `model` the rest."""

    sites: tuple[SiteEntry, ...]
    model: ModelEntries


def read_entries(manifest: Manifest, slots: Iterable[TensorSlot]) -> Entries:
    """Say where the manifest's tensors lie among the file's slots."""
    offsets = {slot.name: slot.begin for slot in slots}
    head = [_site(module, offsets) for module in manifest.modules if module.is_head]
    return Entries(
        sites=tuple(_site(module, offsets) for module in manifest.modules if not module.is_head),
        model=_model(manifest, offsets, head[0] if head else None),
    )


def _site(module: Module, offsets: dict[str, int]) -> SiteEntry:
    def offset(kind: str) -> int | None:
        return offsets.get(module.tensor(kind))

    def sparse(op: str, count: int) -> SparseEntry | None:
        names = (module.tensor(f"{op}.idx"), module.tensor(f"{op}.D"))
        return SparseEntry(count, offsets[names[0]], offsets[names[1]]) if count else None

    experts = module.experts
    return SiteEntry(
        layer=module.layer,
        site=module.site,
        ranks=module.ranks,
        a_offset=offset("A") or 0,
        bt_offset=offset("BT") or 0,
        bias_offset=offset("bias"),
        gate_offset=offset("G"),
        top_k=experts.top_k if experts is not None else 0,
        temperature=experts.temperature if experts is not None else 1.0,
        cols=sparse("cols", module.cols),
        rows=sparse("rows", module.rows),
        out_scale_offset=offset("out_scale"),
        in_scale_offset=offset("in_scale"),
        gate=experts.gate if experts is not None else METEORA_GATE,
        gate_bias_offset=offset("Gb"),
        csr=_csr(module, offsets),
        dense_offset=offset("dense"),
        blockdiag=module.blockdiag,
        blockdiag_offset=offset("in_blockdiag"),
        rot2_group=module.rot2_group,
        c0_offset=offset("rot2.c0"),
        c1_offset=offset("rot2.c1"),
    )


def _csr(module: Module, offsets: dict[str, int]) -> CsrEntry | None:
    if module.csr is None:
        return None
    return CsrEntry(
        nnz=module.csr.nnz,
        indptr_offset=offsets[module.tensor("csr.indptr")],
        col_offset=offsets[module.tensor("csr.col")],
        val_offset=offsets[module.tensor("csr.sign" if module.csr.is_ternary else "csr.val")],
        scale_offset=offsets.get(module.tensor("csr.scale")),
    )


def _model(manifest: Manifest, offsets: dict[str, int], head: SiteEntry | None) -> ModelEntries:
    ops = manifest.model_ops
    embed, prompt, prefix = ops.embed_lowrank, ops.prompt_embeds, ops.kv_prefix
    return ModelEntries(
        head=head,
        norms=tuple(NormEntry(norm.layer, norm.norm, offsets[norm.tensor]) for norm in ops.norms),
        token_rows=tuple(
            TokenRowsEntry(rows.target, rows.count, offsets[rows.tensor("idx")], offsets[rows.tensor("E")])
            for rows in ops.token_rows
        ),
        embed_lowrank=None if embed is None else EmbedEntry(embed.rank, offsets["embed.AT"], offsets["embed.BT"]),
        prompt_embeds=None if prompt is None else PromptEntry(prompt.count, offsets["prompt.E"]),
        kv_prefix=None if prefix is None else KvPrefixEntry(prefix.count, offsets["prefix.K"], offsets["prefix.V"]),
        gates=tuple(
            GateEntry(
                gate_id=gate.gate_id,
                layer=gate.layer,
                num_experts=gate.num_experts,
                top_k=gate.top_k,
                temperature=gate.temperature,
                options=gate.options,
                is_ffn_moe=gate.is_ffn_moe,
                offset=offsets[gate.tensor("G")],
                bias_offset=offsets.get(gate.tensor("Gb")),
            )
            for gate in ops.gates
        ),
    )
