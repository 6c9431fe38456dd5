"""The bounds the pure engine works within, learnt at start-up and never changed.

Owns no policy. Invariant: no bound of the base's own path is zero, so that one sequence can always make progress.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine process may hold and do per step."""

    num_kv_blocks: int
    block_size: int
    # prompt plus output of one sequence, tokens
    max_model_len: int
    max_num_seqs: int
    # token budget of one step: decodes first, then prefill chunks
    max_step_tokens: int
    # sequences that may wait; beyond it a submit fails with 429
    max_waiting: int
    adapter_device_bytes: int
    num_adapter_slots: int
    eos_token_ids: tuple[int, ...]
    enable_prefix_cache: bool = True
    # of images in host memory; 0 bytes: no host tier, every load reads the disk
    adapter_host_bytes: int = 0
    max_host_images: int = 1024
    # the device is a CPU: an adapter in both tiers takes the same memory twice
    is_host_device_memory: bool = False
    # prompt tokens in a step in which others decode; None: as many as the step takes
    max_mixed_prefill_tokens: int | None = None
    # such a step may hold this part of all prompt tokens that are left, if that is more; None: it may not
    mixed_prefill_divisor: int | None = None
    # prompt plus output that one sequence can reach: the model's bound or the whole KV cache; asked for every token
    max_sequence_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_sequence_tokens", min(self.max_model_len, self.num_kv_blocks * self.block_size))
        counts = {
            "num_kv_blocks": self.num_kv_blocks,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_step_tokens": self.max_step_tokens,
            "max_waiting": self.max_waiting,
            "max_mixed_prefill_tokens": self.mixed_prefill_tokens,
            "mixed_prefill_divisor": 1 if self.mixed_prefill_divisor is None else self.mixed_prefill_divisor,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; the engine needs at least 1")

    @property
    def mixed_prefill_tokens(self) -> int:
        """Prompt tokens that a step with decodes may hold, however few are left."""
        return self.max_step_tokens if self.max_mixed_prefill_tokens is None else self.max_mixed_prefill_tokens
