"""PEFT's PROMPT_TUNING, P_TUNING, CPT and MULTITASK_PROMPT_TUNING: trained embeddings in front of every sequence.

Owns their keys and formulas. Invariant: what a prompt encoder computed is already in the file, but for the product of
the multitask kind: `P * (cols[task] rows[task])`.
"""

from dataclasses import dataclass, replace

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.peft_keys import KeyRule, harmless, prompt_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Array, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_PROMPT, _COLS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
# their models multiply embeddings and prompts alike, by a number that the dimensions do not say
_SCALED_PROMPTS = frozenset({"granite"})


@dataclass(frozen=True, slots=True)
class _Delta:
    """prompt [n, H]; of the task cols [n, k] and rows [k, H], None without tasks."""

    prompt: Float32
    cols: Float32 | None = None
    rows: Float32 | None = None

    def factors(self) -> Array:
        if self.cols is None or self.rows is None:
            return self.prompt
        return self.prompt.astype(np.float64) * (self.cols.astype(np.float64) @ self.rows.astype(np.float64))

    def apply(self) -> Float64:
        prompt = self.prompt.astype(np.float64)
        if self.cols is None or self.rows is None:
            return prompt
        total = np.zeros_like(prompt)
        for rank in range(self.cols.shape[1]):
            total += np.outer(self.cols[:, rank].astype(np.float64), self.rows[rank].astype(np.float64))
        return prompt * total


@dataclass(frozen=True, slots=True)
class _Tuner:
    """num_tasks 0: a kind without tasks; `task` None: none was chosen of several."""

    count: int
    rank: int = 0
    num_tasks: int = 0
    task: int | None = None

    def choose(self, task_id: int) -> "_Tuner":
        """Return the same with one task chosen."""
        return replace(self, task=task_id)

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return nothing: no linear layer changes."""
        return {}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def read_model(self, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
        """Return the prompt."""
        if base.model_type in _SCALED_PROMPTS:
            raise UnsupportedAdapter(
                f"this base, {base.model_type}, multiplies prompts as it does embeddings, which is not served: train a "
                "LoRA",
                param="peft_type",
            )
        prompt, *others = tensors.take_shared(_PROMPT, *((_COLS, _ROWS) if self.rank else ()))
        check_shape(prompt, (self.count, base.hidden_size))
        if not others:
            return ModelFactors(prompt=_Delta(file.floats(prompt)))
        if self.task is None and self.num_tasks > 1:
            raise UnsupportedAdapter(
                f"the file holds {self.num_tasks} tasks; say which one is served with the option "
                '{"task_id": ...} of the upload, from 0',
                param="task_id",
            )
        task, shapes = self.task or 0, ((self.count, self.rank), (self.rank, base.hidden_size))
        for slot, shape in zip(others, shapes, strict=True):
            check_shape(slot, (self.num_tasks, *shape))
        cols, rows = (file.floats(slot)[task] for slot in others)
        return ModelFactors(prompt=_Delta(file.floats(prompt), cols, rows))


def read_count(config: Config) -> int:
    """Return the number of virtual tokens of a causal model's prompt; raises UnsupportedAdapter."""
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UnsupportedAdapter(
            "num_transformer_submodules must be 1: adapters of causal language models are served",
            param="num_transformer_submodules",
        )
    if "num_virtual_tokens" not in config:
        raise UnsupportedAdapter("num_virtual_tokens is missing", param="num_virtual_tokens")
    return read_whole(config, "num_virtual_tokens", 1)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_count(config))


def _read_multitask(config: Config) -> _Tuner:
    return _Tuner(read_count(config), read_whole(config, "num_ranks", 1), read_whole(config, "num_tasks", 1))


def _served(title: str, limits: str, *rules: KeyRule) -> Served:
    return Served(
        title=title,
        served_as="embeddings in front of every sequence",
        limits=limits,
        rules=(*prompt_rules(), *rules),
        parts=frozenset(),
        shared=frozenset({_PROMPT}),
        read=_read,
        recorded=("num_virtual_tokens",),
        acts_on="prompt",
    )


_INIT_RULES = (
    training_only("prompt_tuning_init", "RANDOM", "TEXT", "SAMPLE_VOCAB"),
    training_only("prompt_tuning_init_text"),
    training_only("tokenizer_name_or_path"),
    training_only("tokenizer_kwargs"),
)
_LIMITS = "more than 4096 virtual tokens, or than the context holds; Granite, which multiplies prompts"
PROMPT_TUNING = _served("prompt tuning", _LIMITS, *_INIT_RULES)
P_TUNING = _served(
    "p-tuning",
    _LIMITS,
    training_only("encoder_reparameterization_type", "MLP", "LSTM"),
    harmless("encoder_hidden_size", "the encoder's answer is in the file"),
    training_only("encoder_num_layers", 2),
    training_only("encoder_dropout", 0.0),
)
CPT = _served(
    "CPT",
    _LIMITS,
    harmless("cpt_token_ids", "where the prompt began; its embeddings are in the file"),
    training_only("cpt_mask"),
    training_only("cpt_tokens_type_mask"),
    training_only("opt_weighted_loss_type", "none"),
    training_only("opt_loss_decay_factor", 1.0),
    training_only("opt_projection_epsilon", 0.1),
    training_only("opt_projection_format_epsilon", 0.1),
    training_only("tokenizer_name_or_path"),
)
_MULTITASK = _served(
    "multitask prompt tuning",
    'several tasks: say which one with the option {"task_id": ...} of the upload',
    *_INIT_RULES,
    training_only("prompt_tuning_init_state_dict_path"),
    training_only("prompt_tuning_init_task", 0),
    used("num_ranks", "rank of a task's product"),
    used("num_tasks", "tasks in the file"),
)
MULTITASK_PROMPT_TUNING = replace(
    _MULTITASK,
    served_as="embeddings in front of every sequence, those of one task",
    shared=frozenset({_PROMPT, _COLS, _ROWS}),
    read=_read_multitask,
    recorded=("num_virtual_tokens", "num_ranks", "num_tasks"),
)
