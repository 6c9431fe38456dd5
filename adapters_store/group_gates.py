"""One gate for all experts of an MLP: its tensors, its form in the manifest, and the modules that follow it.

Owns what belongs to the MLP as a whole; the options are in `gates.py`. Invariant: every module that follows a gate says
the same of it as the gate itself, and every gate has followers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from adapters_store.base import BaseDims
from adapters_store.errors import CorruptUpload
from adapters_store.gates import Experts, GateOptions, check_experts, gate_json, parse_gate
from adapters_store.json_values import flag, integer, json_object
from adapters_store.ops import Module, TensorSpec
from adapters_store.strict_json import Json

_GATE_ID = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.mlp\Z")
_MLP_SITES = frozenset({"gate_proj", "up_proj", "down_proj"})
# before the true limit is checked, what no list of experts may make us allocate
_MAX_PARSED_EXPERTS = 1 << 12


@dataclass(frozen=True, slots=True)
class GroupGate:
    """One gate for all experts of one MLP, of its input: weight `[experts, hidden]`, bias `[experts]` float32.

    `is_ffn_moe`: the experts are whole MLPs, mixed after the activation; otherwise each site mixes its own.
    """

    layer: int
    num_experts: int
    top_k: int
    temperature: float
    options: GateOptions
    is_ffn_moe: bool

    @property
    def gate_id(self) -> str:
        """`layers.0.mlp`."""
        return f"layers.{self.layer}.mlp"

    def tensor(self, kind: str) -> str:
        """Return the tensor's name; kinds: G, Gb."""
        return f"L{self.layer}.mlp.{kind}"

    def tensors(self, base: BaseDims) -> list[TensorSpec]:
        """Return the gate's tensors in the image's order."""
        specs = [TensorSpec(self.tensor("G"), (self.num_experts, base.hidden_size))]
        if self.options.has_bias:
            specs.append(TensorSpec(self.tensor("Gb"), (self.num_experts,), is_scale=True))
        return specs

    def experts(self, ranks: tuple[int, ...]) -> Experts:
        """Return what a module of this MLP says of experts of these ranks."""
        options = replace(self.options, group=self.gate_id, has_bias=False)
        return Experts(ranks, self.top_k, self.temperature, options)


def gates_json(gates: Iterable[GroupGate]) -> dict[str, Json]:
    """Return the manifest's object of gates by id."""
    return {gate.gate_id: _gate_json(gate) for gate in gates}


def parse_gates(value: dict[str, Json]) -> tuple[GroupGate, ...]:
    """Read `gates_json`, sorted by layer; raises ValueError, TypeError, KeyError for what it never writes."""
    gates = (_gate(gate_id, json_object(gate)) for gate_id, gate in value.items())
    return tuple(sorted(gates, key=lambda gate: gate.layer))


def check_gates(gates: tuple[GroupGate, ...], modules: Iterable[Module]) -> None:
    """Hold gates to their limits and to their modules; raises CorruptUpload, LimitExceeded, InvalidGate."""
    by_id = {gate.gate_id: gate for gate in gates}
    used = set()
    for module in modules:
        if module.experts is None or not module.experts.gate.group:
            continue
        gate = by_id.get(module.experts.gate.group)
        is_member = gate is not None and gate.layer == module.layer and module.site in _MLP_SITES
        if gate is None or not is_member or module.experts != gate.experts(module.ranks):
            raise CorruptUpload(f"{module.path} follows a gate that is not its MLP's", param=module.path)
        if len(module.ranks) != gate.num_experts:
            raise CorruptUpload(
                f"{module.path} has {len(module.ranks)} experts; the gate of its MLP weighs {gate.num_experts}",
                param=module.path,
            )
        used.add(gate.gate_id)
    for gate in gates:
        check_experts(Experts((1,) * gate.num_experts, gate.top_k, gate.temperature, gate.options), gate.gate_id)
        if gate.options.group or (gate.is_ffn_moe and gate.options.mix != "output"):
            raise CorruptUpload(f"the gate {gate.gate_id} follows another, or mixes ranks of MLPs", param=gate.gate_id)
    if used != by_id.keys():
        raise CorruptUpload(f"the gate {min(by_id.keys() - used)} weighs nothing", param="gates")


def _gate_json(gate: GroupGate) -> Json:
    experts = Experts((1,) * gate.num_experts, gate.top_k, gate.temperature, gate.options)
    own = gate_json(experts, gate.tensor("G"), gate.tensor("Gb"))
    return {**own, "experts": gate.num_experts, "ffn_moe": gate.is_ffn_moe}


def _gate(gate_id: str, value: dict[str, Json]) -> GroupGate:
    match = _GATE_ID.match(gate_id)
    if match is None:
        raise ValueError(gate_id)
    num_experts = integer(value["experts"])
    if num_experts > _MAX_PARSED_EXPERTS:
        raise ValueError("experts")
    experts = parse_gate(value, (1,) * num_experts)
    return GroupGate(
        layer=int(match[1]),
        num_experts=num_experts,
        top_k=experts.top_k,
        temperature=experts.temperature,
        options=experts.gate,
        is_ffn_moe=flag(value["ffn_moe"]),
    )
