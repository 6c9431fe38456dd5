"""PEFT's LORA: `delta = s B A`, with s = alpha / r or alpha / sqrt(r) per module, and s times a bias of lora_B; DoRA.

Owns LoRA's keys and which tensors its variants have; the values are in `lora_factors.py`, what changed the base in
`lora_inits.py`. Invariant: a LoRA whose base was changed while it was trained is brought back to the base or refused.
"""

import math
from dataclasses import dataclass

from adapters_store.base import BaseDims
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.config_values import (
    Config,
    read_flag,
    read_rank_pattern,
    read_scale,
    read_scale_pattern,
    read_whole,
)
from adapters_store.convert.dora import DoraDelta
from adapters_store.convert.lora_factors import (
    NO_BLOCKS,
    Blocks,
    EmbeddingValues,
    LoraValues,
    read_blocks,
    refuse_other_base,
    refuse_swapped,
)
from adapters_store.convert.lora_inits import KASA, OLORA, PISSA, ChangedBaseDelta
from adapters_store.convert.lora_keys import LORA_RULES
from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.outer_tensors import EMBED
from adapters_store.convert.peft_patterns import Pattern
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Delta, PlannedModule, Served
from adapters_store.errors import CorruptUpload, UnconvertedInit, UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

_A, _B, _BIAS, _DIAG = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_diag"
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# the second: PEFT of 2024
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class LoraTuner:
    """How a LoRA acts: rank and scaling per module. `changed_by`: the kind of init that changed the base."""

    rank: int
    alpha: float
    use_rslora: bool
    lora_bias: bool
    rank_pattern: Pattern[int]
    alpha_pattern: Pattern[float]
    use_dora: bool = False
    changed_by: str | None = None
    blocks: Blocks = NO_BLOCKS

    def scaling_of(self, path: str) -> float:
        """Return what PEFT multiplies B A with."""
        alpha, rank = self.alpha_pattern.of(path, self.alpha), self.rank_pattern.of(path, self.rank)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return A [r, in], B [out, r] and perhaps a bias [out] or a magnitude [out] for every module."""
        tensors.take_shared()
        plan = self._plan_dora if self.use_dora else self._plan_module
        return {path: plan(module, base, tensors.weights) for path, module in tensors.modules.items()}

    def read_model(self, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
        """Return the LoRA of the embedding, A [r, V] and B [H, r], if there is one."""
        a, b = (tensors.outer.take((EMBED, name)) for name in _EMBEDDING)
        if a is None and b is None:
            return ModelFactors()
        path = f"{tensors.prefix}{EMBED}"
        if a is None or b is None:
            raise CorruptUpload(f"the file holds one factor of {path} without the other", param=path)
        if self.use_dora or self.changed_by is not None or self.blocks != NO_BLOCKS:
            raise UnsupportedAdapter(
                f"the file holds a LoRA of {path}; on the embedding a plain LoRA is served: target linear layers with "
                "this variant",
                param=a.name,
            )
        rank = self.rank_pattern.of(path, self.rank)
        for slot, shape in ((a, (rank, base.vocab_size)), (b, (base.hidden_size, rank))):
            check_shape(slot, shape)
        return ModelFactors(embedding=EmbeddingValues(file.floats(a), file.floats(b), self.scaling_of(path)))

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        return self.rank_pattern.unused(paths) + self.alpha_pattern.unused(paths)

    def _plan_dora(self, module: PeftModule, base: BaseDims, weights: BaseWeights) -> PlannedModule:
        spelling = next((name for name in _MAGNITUDES if name in module.parts), _MAGNITUDES[0])
        a, b, magnitude = module.take(_A, _B, spelling)
        rank, scaling = self.rank_pattern.of(module.path, self.rank), self.scaling_of(module.path)
        num_out, num_in = module.dims(base)
        refuse_swapped(a, b, (rank, num_in), (num_out, rank))
        refuse_other_base(a, b, (rank, num_in), (num_out, rank))

        def load(file: TensorFile) -> DoraDelta:
            values = file.floats(a), file.floats(b)
            plain = LoraValues(*values, None, scaling)
            return DoraDelta(plain, *values, scaling, file.floats(magnitude), module, weights)

        shapes = ((a, (rank, num_in)), (b, (num_out, rank)), (magnitude, (num_out,)))
        return PlannedModule(module, rank, False, shapes, load, has_out_scale=True)

    def _plan_module(self, module: PeftModule, base: BaseDims, weights: BaseWeights) -> PlannedModule:
        path = module.path
        if not self.lora_bias and _BIAS in module.parts:
            raise UnsupportedAdapter(f"the file has a {_BIAS} for {path} but lora_bias is not true", param="lora_bias")
        if self.lora_bias and _BIAS not in module.parts:
            raise CorruptUpload(f"lora_bias is true but the file has no {_BIAS} for {path}", param=path)
        names = [name for name, there in ((_BIAS, self.lora_bias), (_DIAG, self.changed_by == KASA)) if there]
        a, b, *others = module.take(_A, _B, *names)
        optional = dict(zip(names, others, strict=True))
        rank, scaling = self.rank_pattern.of(path, self.rank), self.scaling_of(path)
        num_out, num_in = dims = module.dims(base)
        in_blocks = self.blocks.of(path)
        wanted_a = self.blocks.shape((rank, num_in)) if in_blocks == "A" else (rank, num_in)
        wanted_b = self.blocks.shape((num_out, rank)) if in_blocks == "B" else (num_out, rank)
        refuse_swapped(a, b, wanted_a, wanted_b)
        refuse_other_base(a, b, wanted_a, wanted_b)

        def load(file: TensorFile) -> Delta:
            first, second = file.floats(a), file.floats(b)
            bias, diag = (file.floats(optional[name]) if name in optional else None for name in (_BIAS, _DIAG))
            first = self.blocks.densified(first) if in_blocks == "A" else first
            second = self.blocks.densified(second) if in_blocks == "B" else second
            plain = LoraValues(first, second, bias, scaling, diag)
            if self.changed_by is None:
                return plain
            return ChangedBaseDelta(plain, self.changed_by, rank, scaling, module, weights, dims)

        sizes: dict[str, tuple[int, ...]] = {_BIAS: (num_out,), _DIAG: (rank,)}
        shapes: list[tuple[TensorSlot, tuple[int, ...]]] = [(a, wanted_a), (b, wanted_b)]
        shapes += [(slot, sizes[name]) for name, slot in optional.items()]
        served = rank if self.changed_by is None else 2 * rank
        return PlannedModule(module, served, self.lora_bias, tuple(shapes), load)


def _read(config: Config) -> LoraTuner:
    changed_by, blocks = _changed_by(config), read_blocks(config.get("use_bdlora"))
    lora_bias, use_dora = read_flag(config, "lora_bias"), read_flag(config, "use_dora")
    if lora_bias and use_dora:
        raise UnsupportedAdapter("lora_bias is true beside use_dora, which PEFT does not define", param="lora_bias")
    # PEFT itself combines none of these
    variants = {
        "use_dora": use_dora,
        "use_bdlora": blocks != NO_BLOCKS,
        "alora_invocation_tokens": config.get("alora_invocation_tokens") not in (None, []),
        "kasa_config": changed_by == KASA,
        "init_lora_weights": changed_by in (PISSA, OLORA),
    }
    chosen = [key for key, is_set in variants.items() if is_set]
    if len(chosen) > 1:
        raise UnsupportedAdapter(
            f"the config sets both {chosen[0]} and {chosen[1]}; one of them is served", param=chosen[1]
        )
    return LoraTuner(
        rank=read_whole(config, "r", 8),
        alpha=read_scale(config, "lora_alpha", 8),
        use_rslora=read_flag(config, "use_rslora"),
        lora_bias=lora_bias,
        rank_pattern=read_rank_pattern(config, "rank_pattern"),
        alpha_pattern=read_scale_pattern(config, "alpha_pattern"),
        use_dora=use_dora,
        changed_by=changed_by,
        blocks=blocks,
    )


def _changed_by(config: Config) -> str | None:
    """Return what changed the base and can be computed again; raises UnconvertedInit for what cannot."""
    kasa = config.get("kasa_config")
    if kasa is not None and kasa is not False:
        if not isinstance(kasa, dict) or not kasa.keys() <= {"beta", "gamma"}:
            raise UnsupportedAdapter("kasa_config must be an object with beta and gamma", param="kasa_config")
        return KASA
    init = config.get("init_lora_weights", True)
    if isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in _KEEPS_BASE):
        return None
    if init in (PISSA, OLORA):
        return str(init)
    raise UnconvertedInit(
        f"init_lora_weights is {ascii(init)[:40]}, which changed the base weights while training; save the adapter "
        "with path_initial_model_for_weight_conversion, which turns it into a plain LoRA of twice the rank",
        param="init_lora_weights",
    )


LORA = Served(
    title="LoRA, rsLoRA, DoRA, PiSSA, OLoRA, KaSA, BD-LoRA, aLoRA",
    served_as="low rank r, scaling alpha / r or alpha / sqrt(r) folded into B; bias of lora_B. DoRA: its scale of the "
    "outputs is computed from the base's weights and kept in fp32. PiSSA, OLoRA and KaSA: low rank 2 r, what they took "
    "from the base computed from its weights. BD-LoRA: its factors made whole. aLoRA: from its tokens on. Also on "
    "embedding and head",
    limits="`pissa_niter`, `corda`, `lora_ga`, `loftq`, and the three above over a base that is not in float32 or "
    "whose parts lie too near to each other: save with `path_initial_model_for_weight_conversion`. DoRA without the "
    "base's weights at hand, or with lora_bias. Two variants in one: train with one of them",
    rules=LORA_RULES,
    parts=frozenset({_A, _B, _BIAS, _DIAG, *_MAGNITUDES}),
    read=_read,
    recorded=(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "use_dora",
        "use_bdlora",
        "alora_invocation_tokens",
    ),
)
