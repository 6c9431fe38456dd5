"""What an adapter does at one linear layer: the ops of the manifest and their tensors.

Owns the JSON form of the ops and the order and shapes of their tensors in the image; what a gate says is in
`gates.py`, what an op may cost in `op_limits.py`. Invariant: `Module.ops` and `parse_module` are inverse to each other.
"""

import re
from dataclasses import dataclass

from adapters_store.base import HEAD, SITE_PATHS, SITES, BaseDims
from adapters_store.gates import Experts, gate_json, parse_gate
from adapters_store.json_values import flag, integer, integers, json_list, json_object, text
from adapters_store.strict_json import Json

INDEX_DTYPE = "I32"
# near 1 the steps of bfloat16 are as large as what scales learn
SCALE_DTYPE = "F32"
BITS_DTYPE = "U8"

# the output head orders behind every layer
HEAD_LAYER = 1 << 20

_SHORT_SITES = {site: site.removesuffix("_proj") for site in SITES}
_MODULE_PATH = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(self_attn|mlp)\.([a-z]+_proj)\Z")
_KINDS = frozenset(
    {"lowrank", "moe_lowrank", "cols", "rows", "csr", "dense", "out_scale", "in_scale", "bias"}
    | {"in_blockdiag", "out_rot2"}
)


@dataclass(frozen=True, slots=True, order=True)
class Csr:
    """A sparse matrix of `nnz` values; ternary ones are signs times one scale."""

    nnz: int
    is_ternary: bool


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the image.

    `index_limit` is set for positions, which must lie below it and increase; `is_indptr` and `is_col` for those of a
    sparse matrix, which have rules of their own. Scales are float32 whatever the image's dtype, bits are packed bytes.
    """

    name: str
    shape: tuple[int, ...]
    index_limit: int | None = None
    is_scale: bool = False
    is_bits: bool = False
    is_indptr: bool = False
    is_col: bool = False

    def dtype(self, image_dtype: str) -> str:
        """Return the tensor's dtype in the file of an image of `image_dtype`, as safetensors spells both."""
        if self.index_limit is not None:
            return INDEX_DTYPE
        if self.is_bits:
            return BITS_DTYPE
        return SCALE_DTYPE if self.is_scale else image_dtype


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """One linear layer that the adapter acts on. Orders as the image does; no two modules share layer and site.

    `rank` is that of a plain LoRA, 0 where there is none; `cols` and `rows` count the selected inputs and outputs;
    `blockdiag` is the size of the blocks that inputs are turned in, `rot2_group` that of the groups that outputs are
    turned in, 0: none. The output head is `head_module`.
    """

    layer: int
    site_index: int
    rank: int
    has_bias: bool
    experts: Experts | None = None
    cols: int = 0
    rows: int = 0
    has_out_scale: bool = False
    has_in_scale: bool = False
    csr: Csr | None = None
    has_dense: bool = False
    blockdiag: int = 0
    rot2_group: int = 0

    @property
    def is_head(self) -> bool:
        """Is this the output head, which belongs to no layer?"""
        return self.layer == HEAD_LAYER

    @property
    def site(self) -> str:
        """Name of the site, one of `SITES` or `HEAD`."""
        return HEAD if self.is_head else SITES[self.site_index]

    @property
    def path(self) -> str:
        """Base-neutral module name, `layers.0.self_attn.q_proj` or `lm_head`."""
        return HEAD if self.is_head else f"layers.{self.layer}.{SITE_PATHS[self.site]}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert; a plain LoRA counts as one."""
        if self.experts is not None:
            return self.experts.ranks
        return (self.rank,) if self.rank else ()

    @property
    def has_own_gate(self) -> bool:
        """Are there experts behind a gate of this module's own input?"""
        return self.experts is not None and not self.experts.gate.group

    def tensor(self, kind: str) -> str:
        """Return the tensor's name in the file; `kind` as in `tensors`."""
        return f"{HEAD}.{kind}" if self.is_head else f"L{self.layer}.{_SHORT_SITES[self.site]}.{kind}"

    def tensors(self, base: BaseDims) -> list[TensorSpec]:
        """Return the module's tensors in the image's order.

        Kinds: G, Gb, A, BT, cols.idx, cols.D, rows.idx, rows.D, csr.indptr, csr.col, csr.val or csr.sign and
        csr.scale, dense, out_scale, in_scale, in_blockdiag, rot2.c0, rot2.c1, bias.
        """
        num_out, num_in = base.site_shape(self.site)
        specs: list[TensorSpec] = []
        if self.experts is not None and self.has_own_gate:
            specs.append(TensorSpec(self.tensor("G"), (len(self.ranks), num_in)))
            if self.experts.gate.has_bias:
                specs.append(TensorSpec(self.tensor("Gb"), (len(self.ranks),), is_scale=True))
        if rank := sum(self.ranks):
            specs.append(TensorSpec(self.tensor("A"), (rank, num_in)))
            specs.append(TensorSpec(self.tensor("BT"), (rank, num_out)))
        if self.cols:
            specs.append(TensorSpec(self.tensor("cols.idx"), (self.cols,), index_limit=num_in))
            specs.append(TensorSpec(self.tensor("cols.D"), (self.cols, num_out)))
        if self.rows:
            specs.append(TensorSpec(self.tensor("rows.idx"), (self.rows,), index_limit=num_out))
            specs.append(TensorSpec(self.tensor("rows.D"), (self.rows, num_in)))
        if self.csr is not None:
            specs += self._sparse_tensors(self.csr, num_out, num_in)
        if self.has_dense:
            specs.append(TensorSpec(self.tensor("dense"), (num_out, num_in)))
        return specs + self._frame_tensors(num_out, num_in)

    def ops(self) -> list[Json]:
        """Return the manifest's list of ops for this module."""
        ops: list[Json] = []
        factors: dict[str, Json] = {"A": self.tensor("A"), "BT": self.tensor("BT")}
        if self.experts is not None:
            ranks: list[Json] = [*self.experts.ranks]
            gate = gate_json(self.experts, self.tensor("G"), self.tensor("Gb"))
            ops.append({"op": "moe_lowrank", "ranks": ranks, "gate": gate, **factors})
        elif self.rank:
            ops.append({"op": "lowrank", "rank": self.rank, **factors})
        for op, count in (("cols", self.cols), ("rows", self.rows)):
            if count:
                ops.append({"op": op, "count": count, "idx": self.tensor(f"{op}.idx"), "D": self.tensor(f"{op}.D")})
        if self.csr is not None:
            ops.append(self._sparse_op(self.csr))
        for op, is_present in (
            ("dense", self.has_dense),
            ("out_scale", self.has_out_scale),
            ("in_scale", self.has_in_scale),
        ):
            if is_present:
                ops.append({"op": op, op: self.tensor(op)})
        if self.blockdiag:
            ops.append({"op": "in_blockdiag", "block": self.blockdiag, "R": self.tensor("in_blockdiag")})
        if self.rot2_group:
            pair: dict[str, Json] = {"c0": self.tensor("rot2.c0"), "c1": self.tensor("rot2.c1")}
            ops.append({"op": "out_rot2", "group": self.rot2_group, **pair})
        if self.has_bias:
            ops.append({"op": "bias", "bias": self.tensor("bias")})
        return ops

    def _sparse_tensors(self, csr: Csr, num_out: int, num_in: int) -> list[TensorSpec]:
        specs = [
            TensorSpec(self.tensor("csr.indptr"), (num_out + 1,), index_limit=csr.nnz + 1, is_indptr=True),
            TensorSpec(self.tensor("csr.col"), (csr.nnz,), index_limit=num_in, is_col=True),
        ]
        if not csr.is_ternary:
            return [*specs, TensorSpec(self.tensor("csr.val"), (csr.nnz,))]
        specs.append(TensorSpec(self.tensor("csr.sign"), (-(-csr.nnz // 8),), is_bits=True))
        return [*specs, TensorSpec(self.tensor("csr.scale"), (1,), is_scale=True)]

    def _frame_tensors(self, num_out: int, num_in: int) -> list[TensorSpec]:
        specs: list[TensorSpec] = []
        if self.has_out_scale:
            specs.append(TensorSpec(self.tensor("out_scale"), (num_out,), is_scale=True))
        if self.has_in_scale:
            specs.append(TensorSpec(self.tensor("in_scale"), (num_in,), is_scale=True))
        if size := self.blockdiag:
            specs.append(TensorSpec(self.tensor("in_blockdiag"), (num_in // size, size, size), is_scale=True))
        if self.rot2_group:
            specs += [TensorSpec(self.tensor(f"rot2.{part}"), (num_out,), is_scale=True) for part in ("c0", "c1")]
        if self.has_bias:
            specs.append(TensorSpec(self.tensor("bias"), (num_out,)))
        return specs

    def _sparse_op(self, csr: Csr) -> Json:
        places: dict[str, Json] = {"indptr": self.tensor("csr.indptr"), "col": self.tensor("csr.col")}
        if csr.is_ternary:
            values: dict[str, Json] = {"sign": self.tensor("csr.sign"), "scale": self.tensor("csr.scale")}
        else:
            values = {"val": self.tensor("csr.val")}
        return {"op": "csr", "nnz": csr.nnz, "ternary": csr.is_ternary, **places, **values}


def head_module(rank: int, *, has_bias: bool = False) -> Module:
    """Return the module of the output head."""
    return Module(HEAD_LAYER, 0, rank, has_bias)


def parse_module(path: str, ops: list[Json]) -> Module:
    """Read one module of a manifest; the caller compares with `Module.ops`, which catches what is not read here.

    Raises:
        ValueError, TypeError, KeyError: no module that could have been written.
    """
    layer, site_index = _place(path)
    kinds = {text(op["op"]): op for op in map(json_object, ops)}
    if not kinds.keys() <= _KINDS or {"lowrank", "moe_lowrank"} <= kinds.keys():
        raise ValueError("ops")
    return Module(
        layer=layer,
        site_index=site_index,
        rank=_size(kinds, "lowrank", "rank"),
        has_bias="bias" in kinds,
        experts=_experts(kinds["moe_lowrank"]) if "moe_lowrank" in kinds else None,
        cols=_size(kinds, "cols", "count"),
        rows=_size(kinds, "rows", "count"),
        has_out_scale="out_scale" in kinds,
        has_in_scale="in_scale" in kinds,
        csr=Csr(integer(kinds["csr"]["nnz"]), flag(kinds["csr"]["ternary"])) if "csr" in kinds else None,
        has_dense="dense" in kinds,
        blockdiag=_size(kinds, "in_blockdiag", "block"),
        rot2_group=_size(kinds, "out_rot2", "group"),
    )


def _place(path: str) -> tuple[int, int]:
    if path == HEAD:
        return HEAD_LAYER, 0
    match = _MODULE_PATH.match(path)
    if match is None:
        raise ValueError(path)
    return int(match[1]), SITES.index(match[3])


def _size(kinds: dict[str, dict[str, Json]], op: str, key: str) -> int:
    return integer(kinds[op][key]) if op in kinds else 0


def _experts(op: dict[str, Json]) -> Experts:
    return parse_gate(op["gate"], integers(json_list(op["ranks"])))
