"""The device executor through Triton's interpreter against the CPU's: the same tokens for the same plans.

The model is one of a few kilobytes; what is compared is everything a row can ask for, alone and mixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from serve.engine.device_executor import DeviceExecutor
from serve.engine.device_parts import load_device_parts
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import AsyncExecutor
from serve.engine.sampling_plan import BitMask
from serve.messages import Grammar, TokenLogprobs
from tests.engine.arena_adapters import Images
from tests.engine.device_cases import EOS, VOCAB, Script, Talk, image, load, talk, use_one_split, write_model
from tests.kernels.random_adapters import ALL_SITES

TOLERANCE = 2e-4
# slot -> image: all sites at mixed ranks, some of attention and MLP, one alone
SLOTS = {
    0: image(1, {site: 1 + 3 * i % 8 for i, site in enumerate(ALL_SITES)}, biased="k_proj"),
    1: image(2, {"q_proj": 3, "v_proj": 5, "down_proj": 2}),
    3: image(3, {"o_proj": 4}, biased="o_proj"),
}


class EvenTokens:
    """A grammar that allows even tokens only, and notes what it was told."""

    def __init__(self) -> None:
        self.accepted: dict[str, list[int]] = {}

    def start(self, request_id: str, grammar: Grammar) -> None:
        assert request_id not in self.accepted
        self.accepted[request_id] = []

    def mask(self, request_id: str) -> BitMask:
        bits = np.zeros((VOCAB + 31) // 32 * 32, dtype=np.uint8)
        bits[:VOCAB:2] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, request_id: str, token_id: int) -> None:
        self.accepted[request_id].append(token_id)

    def release(self, request_id: str) -> None:
        del self.accepted[request_id]


@dataclass(frozen=True)
class Both:
    """The same model and adapters on both executors."""

    cpu: TorchExecutor
    device: DeviceExecutor
    grammars: EvenTokens


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    config = write_model(tmp_path_factory.mktemp("device") / "base")
    too_large = image(4, {"o_proj": config.max_adapter_rank + 1})
    images = Images({**{str(slot): each for slot, each in SLOTS.items()}, "too large": too_large})
    grammars = EvenTokens()
    parts = load_device_parts(config, "interpreter", images.open, lambda _: grammars)
    assert parts.facts.ready().device == "interpreter" and parts.facts.num_kv_blocks == config.num_kv_blocks
    found = Both(TorchExecutor(load_parts(config), images.open), parts.executor, grammars)
    use_one_split(found.device)
    for slot in SLOTS:
        load(found.cpu, str(slot), slot)
        load(found.device, str(slot), slot)
    yield found
    found.cpu.close()
    found.device.close()


@pytest.fixture(autouse=True)
def _forget(both: Both) -> Iterator[None]:
    yield
    for index in range(8):
        both.cpu.release_request(f"talk-{index}")
        both.device.release_request(f"talk-{index}")


def mixed_talks() -> list[Talk]:
    return [
        talk(9, None, 1),
        talk(5, 0, 2, temperature=0.8, top_p=0.9, min_tokens=3, logit_bias=((EOS, 6.0),)),
        talk(13, 1, 3, num_logprobs=3),
        talk(1, 3, 4, repetition_penalty=1.3, temperature=0.5, top_k=9),
    ]


def run_mixed(executor: DeviceExecutor | TorchExecutor) -> list[Talk]:
    """Chunks beside decodes, prompts that begin late, decodes alone."""
    script = Script(executor, mixed_talks(), block_order=np.random.default_rng(0).permutation(48).tolist())
    script.step((0, 9), (2, 6))
    script.step((0, 1), (1, 5), (2, 5), (3, 1))
    script.step((3, 1), (0, 1), (2, 2), (1, 1))
    script.decode_all(2)
    return script.talks


def check_same(found: list[Talk], wanted: list[Talk]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.output == theirs.output
        assert [result.is_finite for result in mine.results] == [result.is_finite for result in theirs.results]
        for a, b in zip(mine.results, theirs.results, strict=True):
            check_logprobs([a.logprobs], [b.logprobs])
            check_logprobs(a.prompt_logprobs, b.prompt_logprobs)
            assert (a.hidden_sum is None) == (b.hidden_sum is None)
            assert a.hidden_sum is None or a.hidden_sum == pytest.approx(b.hidden_sum, abs=1e-3)


def check_logprobs(
    found: "list[TokenLogprobs] | list[TokenLogprobs | None] | None",
    wanted: "list[TokenLogprobs] | list[TokenLogprobs | None] | None",
) -> None:
    assert (found is None) == (wanted is None)
    for a, b in zip(found or [], wanted or [], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.token_id, a.top_ids) == (b.token_id, b.top_ids)
            assert [a.logprob, *a.top_logprobs] == pytest.approx([b.logprob, *b.top_logprobs], abs=TOLERANCE)


def test_mixed_steps_give_the_tokens_of_the_cpu(both: Both) -> None:
    found = run_mixed(both.device)
    check_same(found, run_mixed(both.cpu))
    assert len({tuple(each.output) for each in found}) == len(found), "the sequences are too alike to tell apart"


def test_a_sequence_alone_writes_what_it_wrote_in_company(both: Both) -> None:
    together = run_mixed(both.cpu)
    for index in (1, 2):
        script = Script(both.device, [mixed_talks()[index]])
        script.prefill_all()
        script.decode_all(len(together[index].output) - 1)
        assert script.outputs[0] == together[index].output, f"talk {index}"
        both.device.release_request("talk-0")


def test_chained_rows_run_ahead_of_their_tokens(both: Both) -> None:
    def talks() -> list[Talk]:
        return [talk(6, 1, 7), talk(4, None, 8, temperature=0.9, min_tokens=3), talk(3, 0, 9, top_k=5, temperature=1.0)]

    plain = Script(both.device, talks())
    plain.step((0, 6), (1, 4))
    plain.step((0, 1), (1, 1), (2, 3))
    plain.decode_all(1)

    assert isinstance(both.device, AsyncExecutor) and not both.device.is_async
    ahead = Script(both.device, talks())
    ahead.submit((0, 6), (1, 4))
    # a chunk beside chained decodes, whose order in the logits changes
    ahead.submit((2, 3), (1, 1), (0, 1))
    ahead.collect()
    ahead.submit((0, 1), (2, 1), (1, 1))
    ahead.collect()
    ahead.collect()
    assert ahead.outputs == plain.outputs


def composed_talks() -> list[Talk]:
    """Compositions that share adapters, beside a single adapter and the base."""
    return [
        talk(6, None, 1, ((0, 0.75), (1, -0.5), (3, 1.5)), num_logprobs=3),
        talk(5, 1, 2),
        talk(1, None, 3, ((1, 2.0),), temperature=0.7, top_p=0.9),
        talk(3, None, 4),
        talk(4, None, 5, ((0, 1.0), (1, 1.0))),
    ]


def run_composed(executor: DeviceExecutor | TorchExecutor) -> list[Talk]:
    """Chunks beside decodes: pairs in blocks, then each for itself."""
    script = Script(executor, composed_talks())
    script.step((0, 6), (1, 5), (2, 1), (3, 3))
    script.step((4, 4), (0, 1), (2, 1), (3, 1))
    return script.talks


def test_compositions_give_the_tokens_of_the_cpu(both: Both) -> None:
    found, wanted = run_composed(both.device), run_composed(both.cpu)
    check_same(found, wanted)
    for index in range(5):
        both.cpu.release_request(f"talk-{index}")
    bare = Script(both.cpu, composed_talks())
    for each in bare.talks:
        each.composed = ()
    bare.prefill_all()
    moved = [mine.output[0] != theirs.output[0] for mine, theirs in zip(found, bare.talks, strict=True)]
    assert moved == [True, False, True, False, True], "what acts must show, and must not where nothing acts"


def test_composed_rows_run_ahead_of_their_tokens_and_leave_others_their_bits(both: Both) -> None:
    def talks() -> list[Talk]:
        composed = talk(4, None, 1, ((0, 1.25), (3, -0.75)))
        return [composed, talk(3, 1, 2, num_logprobs=2), talk(2, None, 3, num_logprobs=2)]

    plain = Script(both.cpu, talks())
    plain.prefill_all()
    plain.decode_all(2)
    ahead = Script(both.device, talks())
    ahead.submit((0, 4), (1, 3), (2, 2))
    ahead.submit((1, 1), (0, 1), (2, 1))
    ahead.collect()
    ahead.submit((0, 1), (2, 1), (1, 1))
    ahead.collect()
    ahead.collect()
    assert ahead.outputs == plain.outputs
    for index in range(3):
        both.device.release_request(f"talk-{index}")
    without = Script(both.device, talks())
    without.talks[0].composed = ()
    without.prefill_all()
    for mine, theirs in zip(ahead.talks[1:], without.talks[1:], strict=True):
        assert mine.results[0].logprobs == theirs.results[0].logprobs


def test_prompt_logprobs_and_embeddings(both: Both) -> None:
    def run(executor: DeviceExecutor | TorchExecutor) -> list[Talk]:
        talks = [
            talk(40, 0, 11, num_prompt_logprobs=4, num_logprobs=2),
            Talk([5, 6, 7, 8, 9], 1, None, embed="mean"),
            Talk([9, 2, 3], None, None, embed="last"),
            talk(2, None, 12, num_prompt_logprobs=0),
        ]
        script = Script(executor, talks)
        script.step((0, 33), (1, 4), (2, 3), (3, 1))
        script.step((0, 7), (1, 1), (3, 1))
        return script.talks

    check_same(run(both.device), run(both.cpu))


def test_a_grammar_holds_and_learns_every_token(both: Both) -> None:
    grammar = Grammar("regex", "unused")
    script = Script(both.device, [talk(4, 0, 1, grammar=grammar), talk(4, 0, 1)])
    script.prefill_all()
    script.decode_all(2)
    written = script.outputs[0]
    assert all(token % 2 == 0 for token in written) and any(token % 2 for token in script.outputs[1])
    # the newest one is told when the next is asked for
    assert both.grammars.accepted == {"talk-0": written[:-1]}
    both.device.release_request("talk-0")
    assert both.grammars.accepted == {}


def test_a_grammar_learns_nothing_of_a_result_that_is_not_used(both: Both) -> None:
    script = Script(both.device, [talk(4, 0, 1, grammar=Grammar("regex", "unused"))])
    script.prefill_all()
    plan = script._plan([(0, 1)])
    # as when the step before it was lost: it is run again, alone
    unused = both.device.execute(plan)
    script._apply(plan, both.device.execute(plan))
    script.decode_all(1)
    assert script.outputs[0][1] == unused[0].token_id
    assert both.grammars.accepted == {"talk-0": script.outputs[0][:-1]}
    both.device.release_request("talk-0")


def run_broken(executor: DeviceExecutor, broken: int | None) -> list[Talk]:
    """Decodes and a chunk, over a cache in which one sequence's values are not finite."""
    script = Script(executor, [talk(6, None, 1), talk(6, 0, 2), talk(8, 1, 3)])
    script.step((0, 6), (1, 6), (2, 5))
    values = executor._forward.kv.v[0]
    if broken is not None:
        values[script.tables[broken][0], 1] = float("nan")
    script.step((0, 1), (1, 1), (2, 2))
    if broken != 2:
        # decodes alone: what is not finite shows in the logits
        script.step((0, 1), (1, 1))
    if broken is not None:
        executor.zero_blocks(script.tables[broken])
        assert torch.isfinite(values).all()
    return script.talks


def test_a_broken_sequence_fails_alone_and_its_blocks_can_be_zeroed(both: Both) -> None:
    clean = run_broken(both.device, None)
    for broken in (1, 2):
        for index, each in enumerate(run_broken(both.device, broken)):
            assert [result.is_finite for result in each.results[1:]] == [index != broken] * len(each.results[1:])
            assert each.output[1:] == ([] if index == broken else clean[index].output[1 : len(each.output)])


def test_an_adapter_leaves_and_another_takes_its_slot(both: Both) -> None:
    def run(slot: int) -> list[int]:
        script = Script(both.device, [talk(6, slot, 1)])
        script.prefill_all()
        both.device.release_request("talk-0")
        return [result.token_id or 0 for result in script.talks[0].results]

    first, other = run(1), run(3)
    both.device.drop("1", 1)
    load(both.device, "3", 1)
    assert run(1) == other != first
    both.device.drop("3", 1)
    load(both.device, "1", 1)
    assert run(1) == first


def test_an_adapter_beyond_the_largest_rank_is_refused_at_its_load(both: Both) -> None:
    with pytest.raises(AssertionError, match="has rank 17; this server accepts up to 16"):
        load(both.device, "too large", 5)


def test_at_most_two_steps_are_in_flight(both: Both) -> None:
    script = Script(both.device, [talk(4, None, 1)])
    script.submit((0, 4))
    script.submit((0, 1))
    with pytest.raises(AssertionError, match="in flight"):
        script.submit((0, 1))
    with pytest.raises(AssertionError, match="in flight"):
        both.device.capture_pending()
    script.collect()
    script.collect()
    assert both.device.capture_pending() is False
