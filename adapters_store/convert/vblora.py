"""PEFT's VBLORA: A and B whose rows are made of pieces, each a softmax-weighted sum of k vectors of one shared bank.

Owns VB-LoRA's keys, both of its file forms (all logits, or the chosen k indices and k - 1 weights) and its formula.
Invariant: the k vectors are those that PEFT would choose; where logits tie at the edge, so that PEFT's own choice
depends on the device, the file is refused.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_flag, read_whole
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_targets import DefaultTargets
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_TOPK = tuple(f"{name}_topk_{kind}" for name in _LOGITS for kind in ("indices", "weights"))
_BANK = "vblora_vector_bank"

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which vectors make each piece, and with what weights that sum to 1: both [first, second, k]."""

    indices: Indices
    weights: Float64

    def mix(self, bank: Float64) -> Float64:
        """Return the pieces [first, second, length]."""
        pieces: Float64 = np.einsum("fsk,fskl->fsl", self.weights, bank[self.indices])
        return pieces


@dataclass(frozen=True, slots=True)
class _Delta:
    """bank [h, length]; A is chosen as [r, in / length], B as [out / length, r]."""

    bank: Float64
    of_a: _Choice
    of_b: _Choice

    def factors(self) -> Factors:
        magnitudes = np.abs(self.bank)
        return Factors(
            a=_as_a(self.of_a.mix(self.bank)),
            b=_as_b(self.of_b.mix(self.bank)),
            a_terms=_as_a(self.of_a.mix(magnitudes)),
            b_terms=_as_b(self.of_b.mix(magnitudes)),
        )

    def apply(self, x: Float64) -> Float64:
        length = self.bank.shape[1]
        tiles = x.reshape(len(x), -1, length)
        y = np.zeros((len(x), len(self.of_b.indices), length))
        for row in range(len(self.of_a.indices)):
            hidden = np.zeros(len(x))
            for chosen, weight in zip(self.of_a.indices[row].T, self.of_a.weights[row].T, strict=True):
                hidden += np.einsum("til,il,i->t", tiles, self.bank[chosen], weight)
            for chosen, weight in zip(self.of_b.indices[:, row].T, self.of_b.weights[:, row].T, strict=True):
                y += hidden[:, None, None] * (weight[:, None] * self.bank[chosen])
        return y.reshape(len(x), -1)


def _as_a(pieces: Float64) -> Float64:
    return pieces.reshape(len(pieces), -1)


def _as_b(pieces: Float64) -> Float64:
    return pieces.transpose(0, 2, 1).reshape(-1, pieces.shape[1])


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    num_vectors: int
    length: int
    topk: int
    only_topk: bool

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the logits, or indices and weights, of every module over the bank [num_vectors, vector_length]."""
        (bank,) = tensors.take_shared(_BANK)
        check_shape(bank, (self.num_vectors, self.length))
        return {path: self._plan_module(module, bank, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, bank: TensorSlot, base: BaseDims) -> PlannedModule:
        slots = module.take(*(_TOPK if self.only_topk else _LOGITS))
        num_out, num_in = module.dims(base)
        if num_out % self.length or num_in % self.length:
            raise UnsupportedAdapter(
                f"vector_length {self.length} does not divide the sizes of {module.path}, {num_out} and {num_in}",
                param="vector_length",
            )
        pieces = [(self.rank, num_in // self.length), (num_out // self.length, self.rank)]
        ends = (self.topk, self.topk - 1) if self.only_topk else (self.num_vectors,)
        shapes = tuple((*piece, end) for piece in pieces for end in ends)

        def load(file: TensorFile) -> _Delta:
            half = len(slots) // 2
            of_a, of_b = (self._choice(file, part) for part in (slots[:half], slots[half:]))
            return _Delta(file.shared(bank).astype(np.float64), of_a, of_b)

        return PlannedModule(module, self.rank, False, tuple(zip(slots, shapes, strict=True)), load)

    def _choice(self, file: TensorFile, slots: tuple[TensorSlot, ...]) -> _Choice:
        if not self.only_topk:
            return _choose(file.floats(slots[0]).astype(np.float64), self.topk, slots[0])
        indices = file.indices(slots[0], self.num_vectors)
        ordered = np.sort(indices, axis=-1)
        weights = file.floats(slots[1]).astype(np.float64)
        last = 1 - weights.sum(axis=-1, keepdims=True)
        if np.any(ordered[..., 1:] == ordered[..., :-1]) or np.any(weights < 0) or np.any(last < 0):
            raise UnsupportedAdapter(
                f"{slots[1].name} and its indices are no choice of {self.topk} vectors with weights that sum to 1",
                param=slots[1].name,
            )
        return _Choice(indices, np.concatenate([weights, last], axis=-1))


def _choose(logits: Float64, topk: int, slot: TensorSlot) -> _Choice:
    """Return the `topk` largest logits along the last axis, and their softmax."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1)
    if topk < logits.shape[-1] and np.any(ranked[..., topk - 1] == ranked[..., topk]):
        raise UnsupportedAdapter(
            f"{slot.name} holds equal logits at the edge of its top {topk}, so which vector counts would depend on the "
            "device; save the adapter with save_only_topk_weights=True, which records the choice",
            param=slot.name,
        )
    chosen = np.exp(ranked[..., :topk] - ranked[..., :1])
    return _Choice(order[..., :topk], chosen / chosen.sum(axis=-1, keepdims=True))


def _read(config: Config) -> _Tuner:
    num_vectors, topk = read_whole(config, "num_vectors", 256), read_whole(config, "topk", 2)
    if topk > num_vectors:
        raise UnsupportedAdapter(f"topk is {topk}; the bank has {num_vectors} vectors", param="topk")
    return _Tuner(
        rank=read_whole(config, "r", 4),
        num_vectors=num_vectors,
        length=read_whole(config, "vector_length", 256),
        topk=topk,
        only_topk=read_flag(config, "save_only_topk_weights"),
    )


VBLORA = Served(
    title="VB-LoRA",
    served_as="low rank r, materialised from the bank; both file forms",
    limits="logits that tie at the edge of the top k: save with `save_only_topk_weights=True`",
    rules=(
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"),
        used("r", "rank of every module"),
        used("num_vectors", "vectors in the bank"),
        used("vector_length", "length of each"),
        used("topk", "vectors per piece"),
        used("save_only_topk_weights", "which of the two forms the file has"),
        training_only("vblora_dropout", 0.0),
        training_only("init_vector_bank_bound", 0.02),
        training_only("init_logits_std", 0.1),
    ),
    parts=frozenset({*_LOGITS, *_TOPK}),
    shared=frozenset({_BANK}),
    integers=frozenset(name for name in _TOPK if name.endswith("indices")),
    read=_read,
    recorded=("r", "num_vectors", "vector_length", "topk"),
    default_targets=DefaultTargets(
        ("q_proj", "v_proj"), frozenset({"llama", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"})
    ),
    allows_empty=True,
)
