"""PEFT's POLY with one task: a LoRA whose A and B are weighted means of several skills', split by split.

Owns Poly's keys and formula. With several tasks a request would have to name one, so these are refused. Invariant:
the weights are the sigmoids of the router's logits, divided by their sum.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.peft_keys import common_rules, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter

_NAMES = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
_LEAST_SUM = 1e-12


@dataclass(frozen=True, slots=True)
class _Delta:
    """a [splits, skills, in / splits, r], b [splits, skills, r, out / splits], logits [splits, skills]."""

    a: Float64
    b: Float64
    logits: Float64

    def factors(self) -> Factors:
        rank = self.a.shape[3]
        gates = _sigmoid(self.logits)
        weights = gates / (gates.sum(axis=1, keepdims=True) + _LEAST_SUM)
        return Factors(
            a=_joined_a(self.a, weights),
            b=_joined_b(self.b, weights) / rank,
            a_terms=_joined_a(np.abs(self.a), weights),
            b_terms=_joined_b(np.abs(self.b), weights) / rank,
        )

    def apply(self, x: Float64) -> Float64:
        num_splits, num_skills, width, rank = self.a.shape
        hidden = np.zeros((len(x), rank))
        for split in range(num_splits):
            total = _sigmoid(self.logits[split]).sum() + _LEAST_SUM
            for skill in range(num_skills):
                part = x[:, split * width : (split + 1) * width] @ self.a[split, skill]
                hidden += _sigmoid(self.logits[split, skill]) / total * part
        pieces = []
        for split in range(num_splits):
            total = _sigmoid(self.logits[split]).sum() + _LEAST_SUM
            skills = [_sigmoid(self.logits[split, n]) * (hidden @ self.b[split, n]) for n in range(num_skills)]
            pieces.append(np.sum(skills, axis=0) / total)
        y: Float64 = np.concatenate(pieces, axis=1) / rank
        return y


def _sigmoid(logits: Float64) -> Float64:
    with np.errstate(over="ignore"):
        gates: Float64 = 1 / (1 + np.exp(-logits))
    return gates


def _joined_a(a: Float64, weights: Float64) -> Float64:
    joined: Float64 = np.einsum("qs,qsdr->rqd", weights, a).reshape(a.shape[3], -1)
    return joined


def _joined_b(b: Float64, weights: Float64) -> Float64:
    joined: Float64 = np.einsum("qs,qsrd->qdr", weights, b).reshape(-1, b.shape[2])
    return joined


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    num_skills: int
    num_splits: int

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the skills' factors and the router's logits of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        slots = module.take(*_NAMES)
        num_out, num_in = module.dims(base)
        splits, skills = self.num_splits, self.num_skills
        if num_out % splits or num_in % splits:
            raise UnsupportedAdapter(
                f"n_splits {splits} does not divide the sizes of {module.path}, {num_out} and {num_in}",
                param="n_splits",
            )
        shapes = (
            (splits, skills, num_in // splits, self.rank),
            (splits, skills, self.rank, num_out // splits),
            (1, splits * skills),
        )

        def load(file: TensorFile) -> _Delta:
            a, b, logits = (file.floats(slot).astype(np.float64) for slot in slots)
            return _Delta(a, b, logits.reshape(splits, skills))

        return PlannedModule(module, self.rank, False, tuple(zip(slots, shapes, strict=True)), load)


def _read(config: Config) -> _Tuner:
    num_tasks = read_whole(config, "n_tasks", 1)
    if num_tasks != 1:
        raise UnsupportedAdapter(
            f"n_tasks is {num_tasks}: a request cannot name one of them; save one adapter per task, with its row of "
            "module_logits and n_tasks 1",
            param="n_tasks",
        )
    if config.get("poly_type", "poly") != "poly":
        raise UnsupportedAdapter("poly_type must be 'poly', PEFT's only kind", param="poly_type")
    return _Tuner(read_whole(config, "r", 8), read_whole(config, "n_skills", 4), read_whole(config, "n_splits", 1))


POLY = Served(
    title="Poly, MHR (one task)",
    served_as="low rank r: the skills' means by the router's weights",
    limits="several tasks in one file: save one adapter per task with `n_tasks=1`",
    rules=(
        *common_rules("exclude_modules", "init_weights"),
        used("r", "rank of every skill"),
        used("poly_type", 'must be "poly"'),
        used("n_tasks", "must be 1"),
        used("n_skills", "LoRAs that are mixed"),
        used("n_splits", "parts of inputs and outputs that are mixed apart"),
    ),
    parts=frozenset(_NAMES),
    read=_read,
    recorded=("r", "n_skills", "n_splits"),
)
