"""What an adapter does outside the decoder's linear layers: the ops of the whole model, their tensors, their limits.

Owns their JSON form, the order and shapes of their tensors in the image (behind those of all modules), and the rules
that they must meet. Invariant: `ModelOps.to_json` and `parse_model_ops` are inverse to each other, and ops that
`check_model_ops` lets pass can be served on any base that has the norms they name.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from adapters_store.base import BaseDims
from adapters_store.errors import CorruptUpload, LimitExceeded
from adapters_store.group_gates import GroupGate, check_gates, gates_json, parse_gates
from adapters_store.json_values import integer, json_object, text
from adapters_store.op_limits import check_selected
from adapters_store.ops import Module, TensorSpec
from adapters_store.strict_json import Json

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "q_norm",
    "k_norm",
)
FINAL_NORM = "norm"
HEAD_NORMS = frozenset({"q_norm", "k_norm"})
TARGETS = ("embed", "lm_head", "both")
MAX_VIRTUAL_TOKENS = 4096

_NORM_PATH = re.compile(r"(?:layers\.(0|[1-9][0-9]{0,4})\.)?([a-z_]+)\Z")


@dataclass(frozen=True, slots=True, order=True)
class NormWeight:
    """Replaces the weight of one norm by `[hidden]`, or `[head_dim]` for q_norm and k_norm, float32.

    `norm` is one of `NORMS`, or `FINAL_NORM` with layer -1. Values are those of a checkpoint: what the base adds to
    its own (Gemma's 1), it adds to these.
    """

    layer: int
    norm: str

    @property
    def path(self) -> str:
        """`layers.0.input_layernorm`, or `norm`."""
        return self.norm if self.layer < 0 else f"layers.{self.layer}.{self.norm}"

    @property
    def tensor(self) -> str:
        """Name of the tensor in the file."""
        return self.norm if self.layer < 0 else f"L{self.layer}.{self.norm}"


@dataclass(frozen=True, slots=True, order=True)
class TokenRows:
    """Replaces `count` rows of the embedding, of the output head, or of both: positions `[n]`, rows `[n, hidden]`."""

    target: str
    count: int

    def tensor(self, kind: str) -> str:
        """Return the tensor's name; kinds: idx, E."""
        return f"tokens.{self.target}.{kind}"


@dataclass(frozen=True, slots=True)
class EmbedLowrank:
    """Adds `AT[token] @ BT` to a token's embedding, before the base scales it: AT `[vocab, r]`, BT `[r, hidden]`."""

    rank: int


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Puts `count` embeddings `[n, hidden]` in front of every sequence, as the base's layers read them."""

    count: int


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """Puts `count` keys and values `[layers, n, kv_heads, head_dim]` in front of every sequence; keys without rope."""

    count: int


@dataclass(frozen=True, slots=True)
class ModelOps:
    """All of one adapter, sorted: norms by layer, token rows by target, gates by layer."""

    norms: tuple[NormWeight, ...] = ()
    token_rows: tuple[TokenRows, ...] = ()
    embed_lowrank: EmbedLowrank | None = None
    prompt_embeds: PromptEmbeds | None = None
    kv_prefix: KvPrefix | None = None
    gates: tuple[GroupGate, ...] = ()

    @property
    def acts(self) -> bool:
        """Is there any op besides gates, which only serve modules?"""
        return self != ModelOps(gates=self.gates)

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the adapter puts in front of every sequence."""
        return sum(op.count for op in (self.prompt_embeds, self.kv_prefix) if op is not None)

    def paths(self) -> list[str]:
        """Return the parts of the model that are acted on, as a report names them."""
        targets = {rows.target for rows in self.token_rows}
        paths = [norm.path for norm in self.norms]
        if targets & {"embed", "both"} or self.embed_lowrank is not None:
            paths.append("embed_tokens")
        if targets & {"lm_head", "both"}:
            paths.append("lm_head")
        paths += ["prompt_embeds"] if self.prompt_embeds is not None else []
        return paths + (["kv_prefix"] if self.kv_prefix is not None else [])

    def tensors(self, base: BaseDims) -> list[TensorSpec]:
        """Return the tensors in the image's order: gates, norms, token rows, embedding, prompt, prefix."""
        hidden = base.hidden_size
        specs: list[TensorSpec] = []
        for gate in self.gates:
            specs += gate.tensors(base)
        for norm in self.norms:
            width = base.head_dim if norm.norm in HEAD_NORMS else hidden
            specs.append(TensorSpec(norm.tensor, (width,), is_scale=True))
        for rows in self.token_rows:
            specs.append(TensorSpec(rows.tensor("idx"), (rows.count,), index_limit=base.vocab_size))
            specs.append(TensorSpec(rows.tensor("E"), (rows.count, hidden)))
        if self.embed_lowrank is not None:
            specs.append(TensorSpec("embed.AT", (base.vocab_size, self.embed_lowrank.rank)))
            specs.append(TensorSpec("embed.BT", (self.embed_lowrank.rank, hidden)))
        if self.prompt_embeds is not None:
            specs.append(TensorSpec("prompt.E", (self.prompt_embeds.count, hidden)))
        if self.kv_prefix is not None:
            shape = (base.num_hidden_layers, self.kv_prefix.count, base.num_key_value_heads, base.head_dim)
            specs += [TensorSpec(f"prefix.{kind}", shape) for kind in ("K", "V")]
        return specs

    def to_json(self) -> dict[str, Json]:
        """Return the manifest's keys `gates` and `model_ops`, each only where there is something to say."""
        ops: list[Json] = [*self._ops()]
        return {key: value for key, value in (("gates", gates_json(self.gates)), ("model_ops", ops)) if value}

    def _ops(self) -> Iterator[Json]:
        for norm in self.norms:
            yield {"op": "norm_weight", "norm": norm.path, "weight": norm.tensor}
        for rows in self.token_rows:
            places: dict[str, Json] = {"idx": rows.tensor("idx"), "E": rows.tensor("E")}
            yield {"op": "token_rows", "target": rows.target, "count": rows.count, **places}
        if self.embed_lowrank is not None:
            yield {"op": "embed_lowrank", "rank": self.embed_lowrank.rank, "AT": "embed.AT", "BT": "embed.BT"}
        if self.prompt_embeds is not None:
            yield {"op": "prompt_embeds", "count": self.prompt_embeds.count, "E": "prompt.E"}
        if self.kv_prefix is not None:
            yield {"op": "kv_prefix", "count": self.kv_prefix.count, "K": "prefix.K", "V": "prefix.V"}


NO_MODEL_OPS = ModelOps()


def parse_model_ops(ops: list[Json], gates: dict[str, Json]) -> ModelOps:
    """Read the two keys; the caller compares with `ModelOps.to_json`, which catches what is not read here.

    Raises:
        ValueError, TypeError, KeyError: nothing that could have been written.
    """
    by_kind: dict[str, list[dict[str, Json]]] = {}
    for op in map(json_object, ops):
        by_kind.setdefault(text(op["op"]), []).append(op)

    def count(kind: str, key: str) -> int | None:
        found = by_kind.get(kind, [])
        return integer(found[-1][key]) if found else None

    rank, prompt, prefix = count("embed_lowrank", "rank"), count("prompt_embeds", "count"), count("kv_prefix", "count")
    rows = (TokenRows(text(op["target"]), integer(op["count"])) for op in by_kind.get("token_rows", []))
    return ModelOps(
        norms=tuple(sorted(_norm(text(op["norm"])) for op in by_kind.get("norm_weight", []))),
        token_rows=tuple(sorted(rows)),
        embed_lowrank=None if rank is None else EmbedLowrank(rank),
        prompt_embeds=None if prompt is None else PromptEmbeds(prompt),
        kv_prefix=None if prefix is None else KvPrefix(prefix),
        gates=parse_gates(gates),
    )


def check_model_ops(ops: ModelOps, modules: Iterable[Module], base: BaseDims) -> None:
    """Hold the ops to their limits, and gates and modules to each other.

    Raises:
        CorruptUpload: nothing real has this form. LimitExceeded, InvalidGate: too much, or a gate that cannot weigh.
    """
    for norm in ops.norms:
        is_final = norm == NormWeight(-1, FINAL_NORM)
        if not is_final and not (0 <= norm.layer < base.num_hidden_layers and norm.norm in NORMS):
            raise CorruptUpload(f"{norm.path} is no norm of a base of {base.num_hidden_layers} layers", param=norm.path)
    _refuse_twins([norm.path for norm in ops.norms])
    _check_token_rows(ops.token_rows, base)
    if ops.embed_lowrank is not None and ops.embed_lowrank.rank < 1:
        raise CorruptUpload("embed_lowrank has no rank", param="embed_tokens")
    if ops.prompt_embeds is not None and ops.kv_prefix is not None:
        raise CorruptUpload("an adapter has prompt embeddings or a prefix of keys and values, not both", param="prompt")
    for op in (ops.prompt_embeds, ops.kv_prefix):
        if op is not None and op.count < 1:
            raise CorruptUpload("the adapter's prompt has no tokens", param="prompt")
    if ops.num_virtual_tokens > MAX_VIRTUAL_TOKENS:
        raise LimitExceeded(
            f"the adapter's prompt has {ops.num_virtual_tokens} tokens; the limit is {MAX_VIRTUAL_TOKENS}",
            param="prompt",
        )
    check_gates(ops.gates, modules)


def _norm(path: str) -> NormWeight:
    match = _NORM_PATH.match(path)
    if match is None:
        raise ValueError(path)
    return NormWeight(-1 if match[1] is None else int(match[1]), match[2])


def _refuse_twins(names: list[str]) -> None:
    for left, right in pairwise(names):
        if left == right:
            raise CorruptUpload(f"{left} is replaced twice", param=left)


def _check_token_rows(token_rows: tuple[TokenRows, ...], base: BaseDims) -> None:
    _refuse_twins([rows.target for rows in token_rows])
    for rows in token_rows:
        if rows.target not in TARGETS or rows.count < 1:
            shown = ascii(rows.target)[:60]
            raise CorruptUpload(f"token_rows of {shown} replace {rows.count} rows", param="token_rows")
        if rows.target == "both" and len(token_rows) > 1:
            raise CorruptUpload("token_rows of 'both' exclude all others", param="token_rows")
        check_selected(rows.count, base.vocab_size, f"token_rows of '{rows.target}'", param="token_rows")
