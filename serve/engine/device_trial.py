"""The largest steps that serving may bring, run once at start: kernels are compiled and memory is seen.

Owns the rows of those steps; measures nothing itself. Invariant: K/V goes to block 0 alone, so any cache will do, and
nothing of a trial is left in the executor.
"""

from dataclasses import replace

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.route_forms import LARGEST_OF_FORM
from serve.engine.device_batch import StepBounds
from serve.engine.plan import Executor, LoadResult, Row, SampleSpec, StepPlan
from serve.messages import SamplingParams

# prompt positions whose log-probabilities are asked for: a few groups of rows, all are alike
_NUM_TARGETS = 64
_NUM_LOGPROBS = 20
# of `RanklessAdapters`
TRIAL_SLOTS = (0, 1)
# what acts on the rows of a step: nothing, an adapter, an adapter with a weight
_ACTING: tuple[tuple[int | None, tuple[tuple[int, float], ...]], ...] = (
    (None, ()),
    *((slot, ()) for slot in TRIAL_SLOTS),
    *((None, ((slot, 0.5),)) for slot in TRIAL_SLOTS),
)


class RanklessAdapters:
    """Adapters for a trial, that act at every site with rank 0: every adapter op is launched and adds nothing.

    Slot 0 is a LoRA; slot 1 is of the other families, and scales the inputs of `in_scaled`.
    """

    def __init__(self, num_layers: int, site_names: tuple[str, ...], in_scaled: tuple[str, ...] = ()) -> None:
        layers = range(num_layers)
        every = frozenset((layer, name) for layer in layers for name in site_names)
        scaled = frozenset((layer, name) for layer in layers for name in in_scaled)
        self._sites = (ActingSites(every), ActingSites(every, has_families=True, in_scaled=scaled))

    def start_load(self, digest: str, slot: int) -> None:
        """Nothing can be loaded during a trial."""
        raise NotImplementedError("no adapter is loaded during a trial")

    def poll(self) -> list[LoadResult]:
        """Nothing was loaded."""
        return []

    def drop(self, slot: int) -> None:
        """Nothing is held."""

    def sites(self, slot: int) -> ActingSites:
        """Every site."""
        return self._sites[slot]

    def close(self) -> None:
        """Nothing runs."""


def run_trial(executor: Executor, bounds: StepBounds, max_model_len: int) -> None:
    """Run a step of chunks and one of decodes, each as large as can be: bare, with an adapter, composed.

    And one of chunks for each smaller form of the route: its kernels are compiled for their rows per block.
    """
    budgets = {min(largest, bounds.max_step_tokens): None for largest in (*LARGEST_OF_FORM, bounds.max_step_tokens)}
    for adapter_slot, composed in _ACTING:
        chunks = [_chunks(budget, bounds, max_model_len) for budget in reversed(budgets)]
        for bare in (*chunks, _decodes(bounds)):
            rows = [replace(row, adapter_slot=adapter_slot, composed=composed) for row in bare]
            executor.execute(StepPlan(rows, dict.fromkeys((slot for row in rows for slot in row.slots), "")))
            for row in rows:
                executor.release_request(row.request_id)


def _chunks(budget: int, bounds: StepBounds, max_model_len: int) -> list[Row]:
    rows: list[Row] = []
    while budget and len(rows) < bounds.max_num_seqs:
        length = min(budget, max_model_len)
        budget -= length
        targets = [0] * min(length - 1, _NUM_TARGETS) if not rows else None
        rows.append(
            Row(
                request_id=f"trial-{len(rows)}",
                token_ids=[0] * length,
                start=0,
                block_table=[0] * bounds.max_blocks_per_seq,
                adapter_slot=None,
                sample=_spec(len(rows)),
                num_prompt_logprobs=None if targets is None else _NUM_LOGPROBS,
                prompt_targets=targets,
            )
        )
    return rows


def _decodes(bounds: StepBounds) -> list[Row]:
    return [
        Row(f"trial-{i}", [0], 0, [0] * bounds.max_blocks_per_seq, None, _spec(i)) for i in range(bounds.max_decodes)
    ]


def _spec(seed: int) -> SampleSpec:
    # draws over the whole sorted vocabulary take the most memory
    params = SamplingParams(
        max_tokens=1, seed=seed, temperature=0.9, top_p=0.9, repetition_penalty=1.1, num_logprobs=_NUM_LOGPROBS
    )
    return SampleSpec(params, [0], [])
