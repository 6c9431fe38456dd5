"""What start-up learns and the rest of the engine must agree on: one value for limits, heartbeat and `Ready`.

Owns the start-up decisions that need the model's config but not its weights. Invariant: a config that cannot work is a
`StartError` before the weights are read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serve.config import EngineConfig
from serve.engine.sampling_plan import Grammars
from serve.errors import StartError
from serve.messages import Ready
from serve.model.spec import ModelSpec, read_spec

# unless asked: sequences at once and tokens of one step. A GPU reads the weights once for all of them, and launching a
# step of 512 tokens takes a large one's host as long as the step itself
_MAX_NUM_SEQS, _MAX_STEP_TOKENS = 64, 512
_CUDA_MAX_NUM_SEQS, _CUDA_MAX_STEP_TOKENS = 256, 2048
# a prompt token takes a CPU 2 ms of a 0.5 B base, a decode step 70: beside decodes 32 of them double the gap (2026-11)
_MIXED_PREFILL_TOKENS = 32
_MIXED_PREFILL_DIVISOR = 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The base as it will be served."""

    spec: ModelSpec
    dtype_name: str
    # prompt plus output of one sequence, by the model and the operator
    max_model_len: int
    # sequences running at once, and the token budget of one step
    max_num_seqs: int
    max_step_tokens: int
    # of these, prompt tokens beside decodes; None: no bound of their own
    max_mixed_prefill_tokens: int | None = None
    # or this part of those that are left; None: not even if that is more
    mixed_prefill_divisor: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return _DTYPES[self.dtype_name]


# the grammars of a base; None: it has no tokenizer, or nobody will send one
MakeGrammars = Callable[[ModelFacts], Grammars | None]


def no_grammars(model: ModelFacts) -> Grammars | None:
    """Serve without structured output, as benchmarks do: llguidance need not be installed."""
    return None


@dataclass(frozen=True, slots=True)
class StartFacts:
    """What a started executor can do."""

    model: ModelFacts
    # "cpu", "cuda" or "interpreter"
    device: str
    block_size: int
    num_kv_blocks: int
    # what the adapters' memory really holds, at most what the config allows
    adapter_device_bytes: int

    @property
    def max_model_len(self) -> int:
        """Prompt plus output of one sequence, at most what the KV cache holds."""
        return min(self.model.max_model_len, self.num_kv_blocks * self.block_size)

    def ready(self) -> Ready:
        """Say what start-up learnt."""
        spec = self.model.spec
        return Ready(
            base_fingerprint=spec.dims.weights_fingerprint,
            max_model_len=self.max_model_len,
            num_kv_blocks=self.num_kv_blocks,
            block_size=self.block_size,
            dtype=self.model.dtype_name,
            device=self.device,
            eos_token_ids=list(spec.eos_token_ids),
            vocab_size=spec.dims.vocab_size,
            hidden_size=spec.dims.hidden_size,
        )


def read_model_facts(config: EngineConfig, device_name: str) -> ModelFacts:
    """Read the model's config.

    Args:
        device_name: "cpu", "cuda" or "interpreter", which the sizes nobody asked for depend on.
    Raises:
        StartError: one line that names what is wrong and the way out.
    """
    spec = read_spec(config.model_dir)
    sizes = (_CUDA_MAX_NUM_SEQS, _CUDA_MAX_STEP_TOKENS) if device_name == "cuda" else (_MAX_NUM_SEQS, _MAX_STEP_TOKENS)
    mixed_prefill_tokens, mixed_prefill_divisor = _mixed_prefill(config, device_name)
    return ModelFacts(
        spec=spec,
        dtype_name=_dtype_name(config.dtype, spec.dtype, device_name),
        max_model_len=_max_model_len(config, spec),
        max_num_seqs=sizes[0] if config.max_num_seqs is None else config.max_num_seqs,
        max_step_tokens=sizes[1] if config.max_step_tokens is None else config.max_step_tokens,
        max_mixed_prefill_tokens=mixed_prefill_tokens,
        mixed_prefill_divisor=mixed_prefill_divisor,
    )


def _mixed_prefill(config: EngineConfig, device_name: str) -> tuple[int | None, int | None]:
    """What was asked for, exactly; otherwise a CPU, which computes token by token, keeps the gaps of decodes short."""
    asked = config.max_mixed_prefill_tokens
    if asked is not None or device_name != "cpu":
        return asked, None
    return _MIXED_PREFILL_TOKENS, _MIXED_PREFILL_DIVISOR


def choose_device(name: str, *, has_cuda: bool) -> str:
    """Return "cpu", "cuda" or "interpreter" for a config's `device`.

    Raises:
        StartError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if name == "cuda" and not has_cuda:
        raise StartError(
            "--device cuda: no CUDA device was found (torch.cuda.is_available() is false); use --device cpu, or check "
            "the driver and that torch is a CUDA build"
        )
    return name


def _dtype_name(asked: str, own: str, device_name: str) -> str:
    chosen = own if asked == "auto" else asked
    if device_name != "interpreter" or chosen != "bfloat16":
        return chosen
    if asked == "auto":
        return "float32"
    raise StartError(
        "--dtype bfloat16: --device interpreter multiplies it wrongly; use --dtype float32, or leave it to auto"
    )


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    limit = spec.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if not 1 <= config.max_model_len <= limit:
        raise StartError(
            f"--max-model-len {config.max_model_len}: the model has positions for 1 to {limit}; choose within"
        )
    return config.max_model_len
