"""What an adapter does at one linear layer: the ops of the manifest, their tensors and their limits.

Owns the JSON form of the ops, the order and shapes of their tensors in the image, and the rules that each op must
meet. Invariant: `Module.ops` and `parse_module` are inverse to each other, and a module that `check_module` lets pass
can be served as it is.
"""

import math
import re
from dataclasses import dataclass

from adapters_store.base import SITE_PATHS, SITES, BaseDims
from adapters_store.errors import CorruptUpload, InvalidGate, LimitExceeded
from adapters_store.json_values import integer, integers, json_list, json_object, number, text
from adapters_store.strict_json import Json

MAX_EXPERTS = 128
MAX_TOP_K = 8
MAX_RANK_SUM = 2048
# a selection beyond this share of a dimension is a dense change in disguise
MAX_SELECTED_SHARE = 0.25
# far beyond any published value; nearer to 0 or infinity, logits divided by it leave float32
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6

INDEX_DTYPE = "I32"
# near 1 the steps of bfloat16 are as large as what scales learn
SCALE_DTYPE = "F32"

_SHORT_SITES = {site: site.removesuffix("_proj") for site in SITES}
_MODULE_PATH = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(self_attn|mlp)\.([a-z]+_proj)\Z")
_KINDS = frozenset({"lowrank", "moe_lowrank", "cols", "rows", "out_scale", "in_scale", "bias"})


@dataclass(frozen=True, slots=True)
class Experts:
    """Low-rank experts behind a gate of the layer's input: `top_k` of the logits, softmax over these / temperature."""

    ranks: tuple[int, ...]
    top_k: int
    temperature: float


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a module.

    `index_limit` is set for positions, which must lie below it; scales are float32 whatever the image's dtype.
    """

    name: str
    shape: tuple[int, ...]
    index_limit: int | None = None
    is_scale: bool = False

    def dtype(self, image_dtype: str) -> str:
        """Return the tensor's dtype in the file of an image of `image_dtype`, as safetensors spells both."""
        if self.index_limit is not None:
            return INDEX_DTYPE
        return SCALE_DTYPE if self.is_scale else image_dtype


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """One linear layer that the adapter acts on. Orders as the image does; no two modules share layer and site.

    `rank` is that of a plain LoRA, 0 where there is none; `cols` and `rows` count the selected inputs and outputs.
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

    @property
    def site(self) -> str:
        """Name of the site, one of `SITES`."""
        return SITES[self.site_index]

    @property
    def path(self) -> str:
        """Base-neutral module name, `layers.0.self_attn.q_proj`."""
        return f"layers.{self.layer}.{SITE_PATHS[self.site]}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert; a plain LoRA counts as one."""
        if self.experts is not None:
            return self.experts.ranks
        return (self.rank,) if self.rank else ()

    def tensor(self, kind: str) -> str:
        """Return the tensor's name in the file; `kind` as in `tensors`."""
        return f"L{self.layer}.{_SHORT_SITES[self.site]}.{kind}"

    def tensors(self, base: BaseDims) -> list[TensorSpec]:
        """Return the module's tensors in the image's order.

        Kinds: G, A, BT, cols.idx, cols.D, rows.idx, rows.D, out_scale, in_scale, bias.
        """
        num_out, num_in = base.site_shape(self.site)
        specs: list[TensorSpec] = []
        if self.experts is not None:
            specs.append(TensorSpec(self.tensor("G"), (len(self.ranks), num_in)))
        if rank := sum(self.ranks):
            specs.append(TensorSpec(self.tensor("A"), (rank, num_in)))
            specs.append(TensorSpec(self.tensor("BT"), (rank, num_out)))
        if self.cols:
            specs.append(TensorSpec(self.tensor("cols.idx"), (self.cols,), index_limit=num_in))
            specs.append(TensorSpec(self.tensor("cols.D"), (self.cols, num_out)))
        if self.rows:
            specs.append(TensorSpec(self.tensor("rows.idx"), (self.rows,), index_limit=num_out))
            specs.append(TensorSpec(self.tensor("rows.D"), (self.rows, num_in)))
        if self.has_out_scale:
            specs.append(TensorSpec(self.tensor("out_scale"), (num_out,), is_scale=True))
        if self.has_in_scale:
            specs.append(TensorSpec(self.tensor("in_scale"), (num_in,), is_scale=True))
        if self.has_bias:
            specs.append(TensorSpec(self.tensor("bias"), (num_out,)))
        return specs

    def ops(self) -> list[Json]:
        """Return the manifest's list of ops for this module."""
        ops: list[Json] = []
        factors: dict[str, Json] = {"A": self.tensor("A"), "BT": self.tensor("BT")}
        if self.experts is not None:
            ranks: list[Json] = [*self.experts.ranks]
            ops.append({"op": "moe_lowrank", "ranks": ranks, "gate": self._gate(self.experts), **factors})
        elif self.rank:
            ops.append({"op": "lowrank", "rank": self.rank, **factors})
        for op, count in (("cols", self.cols), ("rows", self.rows)):
            if count:
                ops.append({"op": op, "count": count, "idx": self.tensor(f"{op}.idx"), "D": self.tensor(f"{op}.D")})
        for op, is_present in (
            ("out_scale", self.has_out_scale),
            ("in_scale", self.has_in_scale),
            ("bias", self.has_bias),
        ):
            if is_present:
                ops.append({"op": op, op: self.tensor(op)})
        return ops

    def _gate(self, experts: Experts) -> Json:
        return {
            "source": "self",
            "W": self.tensor("G"),
            "in_norm": "none",
            "logit": "linear",
            "temperature": experts.temperature,
            "select": {"topk": experts.top_k},
            "weight": "softmax_selected",
            "mix": "output",
        }


def parse_module(path: str, ops: list[Json]) -> Module:
    """Read one module of a manifest; the caller compares with `Module.ops`, which catches what is not read here.

    Raises:
        ValueError, TypeError, KeyError: no module that could have been written.
    """
    match = _MODULE_PATH.match(path)
    if match is None:
        raise ValueError(path)
    kinds = {text(op["op"]): op for op in map(json_object, ops)}
    if not kinds.keys() <= _KINDS or {"lowrank", "moe_lowrank"} <= kinds.keys():
        raise ValueError("ops")
    return Module(
        layer=int(match[1]),
        site_index=SITES.index(match[3]),
        rank=integer(kinds["lowrank"]["rank"]) if "lowrank" in kinds else 0,
        has_bias="bias" in kinds,
        experts=_experts(kinds["moe_lowrank"]) if "moe_lowrank" in kinds else None,
        cols=integer(kinds["cols"]["count"]) if "cols" in kinds else 0,
        rows=integer(kinds["rows"]["count"]) if "rows" in kinds else 0,
        has_out_scale="out_scale" in kinds,
        has_in_scale="in_scale" in kinds,
    )


def check_module(module: Module, base: BaseDims) -> None:
    """Hold one module to the limits of its ops.

    Raises:
        CorruptUpload: nothing real has this form. LimitExceeded: too many experts, ranks or selected channels.
        InvalidGate: top_k or temperature. Each `param` is the module's path.
    """
    if not 0 <= module.layer < base.num_hidden_layers:
        raise CorruptUpload(f"{module.path} lies beyond the base's {base.num_hidden_layers} layers", param=module.path)
    if not module.ops() or min(module.rank, module.cols, module.rows, *module.ranks) < 0:
        raise CorruptUpload(f"{module.path} holds no op, or one of negative size", param=module.path)
    check_experts(module.experts, module.path)
    num_out, num_in = base.site_shape(module.site)
    for op, count, dim in (("cols", module.cols, num_in), ("rows", module.rows, num_out)):
        check_selected(count, dim, f"{module.path} {op}", param=module.path)


def check_experts(experts: Experts | None, what: str) -> None:
    """Hold a mixture to its limits; raises CorruptUpload, LimitExceeded, InvalidGate."""
    if experts is None:
        return
    num_experts = len(experts.ranks)
    if num_experts == 0 or min(experts.ranks) < 1:
        raise CorruptUpload(f"{what} has no experts, or one of rank 0", param=what)
    if num_experts > MAX_EXPERTS:
        raise LimitExceeded(f"{what} has {num_experts} experts; the limit is {MAX_EXPERTS}", param=what)
    if sum(experts.ranks) > MAX_RANK_SUM:
        raise LimitExceeded(
            f"the experts of {what} have rank {sum(experts.ranks)} together; the limit is {MAX_RANK_SUM}", param=what
        )
    most = min(num_experts, MAX_TOP_K)
    if not 1 <= experts.top_k <= most:
        raise InvalidGate(f"{what} takes the top {experts.top_k} experts; this mixture allows 1 to {most}", param=what)
    temperature = experts.temperature
    if not (math.isfinite(temperature) and MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        raise InvalidGate(
            f"{what} has temperature {temperature:g}; it must lie in {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            param=what,
        )


def check_selected(count: int, dim: int, what: str, *, param: str) -> None:
    """Raise LimitExceeded when more of a dimension is selected than a sparse op may."""
    most = int(dim * MAX_SELECTED_SHARE)
    if count > most:
        raise LimitExceeded(
            f"{what} selects {count} of {dim}; the limit is {most} (a quarter): this is a dense change", param=param
        )


def _experts(op: dict[str, Json]) -> Experts:
    gate = json_object(op["gate"])
    return Experts(
        ranks=integers(json_list(op["ranks"])),
        top_k=integer(json_object(gate["select"])["topk"]),
        temperature=number(gate["temperature"]),
    )
