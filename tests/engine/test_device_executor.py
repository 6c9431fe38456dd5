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
from serve.engine.plan import AsyncExecutor, RowResult
from serve.engine.sampling_plan import BitMask
from serve.messages import Grammar, TokenLogprobs
from tests.engine.arena_adapters import Images, small_image
from tests.engine.device_cases import EOS, VOCAB, Script, Talk, load, talk, write_model

TOLERANCE = 2e-4
# slot -> image; 1 has sites of attention and MLP, 3 acts at one site alone
SLOTS = {0: small_image(13, num_sites=14), 1: small_image(5, num_sites=6), 3: small_image(8, num_sites=1)}


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
    images = Images({str(slot): image for slot, image in SLOTS.items()})
    grammars = EvenTokens()
    parts = load_device_parts(config, "interpreter", images.open, lambda _: grammars)
    assert parts.facts.ready().device == "interpreter" and parts.facts.num_kv_blocks == config.num_kv_blocks
    found = Both(TorchExecutor(load_parts(config), images.open), parts.executor, grammars)
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
        talk(5, 0, 2, temperature=0.8, top_p=0.9),
        talk(13, 1, 3, num_logprobs=3),
        talk(1, 3, 4, repetition_penalty=1.3, temperature=0.5, top_k=9),
        talk(7, 0, 5, temperature=1.1, min_tokens=3, logit_bias=((EOS, 6.0),)),
    ]


def run_mixed(executor: DeviceExecutor | TorchExecutor) -> list[Talk]:
    """Chunks beside decodes, prompts that begin late, decodes alone."""
    script = Script(executor, mixed_talks(), block_order=np.random.default_rng(0).permutation(60).tolist())
    script.step((0, 9), (2, 6))
    script.step((0, 1), (1, 5), (2, 5), (3, 1))
    script.step((3, 1), (0, 1), (4, 3), (2, 2), (1, 1))
    script.step((4, 4), (1, 1))
    script.decode_all(3)
    script.step((1, 1))
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
    together = run_mixed(both.device)
    for index, alone in enumerate(mixed_talks()):
        both.device.release_request("talk-0")
        script = Script(both.device, [alone])
        script.prefill_all()
        script.decode_all(len(together[index].output) - 1)
        assert script.outputs[0] == together[index].output, f"talk {index}"


def test_chained_rows_run_ahead_of_their_tokens(both: Both) -> None:
    def talks() -> list[Talk]:
        return [talk(6, 1, 7), talk(4, None, 8, temperature=0.9, min_tokens=3), talk(3, 0, 9, top_k=5, temperature=1.0)]

    plain = Script(both.device, talks())
    plain.step((0, 6), (1, 4))
    plain.step((0, 1), (1, 1), (2, 3))
    plain.decode_all(3)

    assert isinstance(both.device, AsyncExecutor) and not both.device.is_async
    ahead = Script(both.device, talks())
    ahead.submit((0, 6), (1, 4))
    # a chunk beside chained decodes, whose order in the logits changes
    ahead.submit((2, 3), (1, 1), (0, 1))
    for _ in range(3):
        ahead.collect()
        ahead.submit((0, 1), (2, 1), (1, 1))
    ahead.collect()
    ahead.collect()
    assert ahead.outputs == plain.outputs


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
    script.decode_all(4)
    written = script.outputs[0]
    assert all(token % 2 == 0 for token in written) and any(token % 2 for token in script.outputs[1])
    assert both.grammars.accepted == {"talk-0": written}
    both.device.release_request("talk-0")
    assert both.grammars.accepted == {}


@pytest.mark.parametrize("is_decode", [True, False])
def test_a_broken_sequence_fails_alone_and_its_blocks_can_be_zeroed(both: Both, is_decode: bool) -> None:
    def run(*, broken: int | None) -> tuple[Script, list[RowResult]]:
        script = Script(both.device, [talk(9, None, 1), talk(9, 0, 2), talk(9, 1, 3)])
        script.step((0, 5), (1, 5), (2, 5))
        if broken is not None:
            both.device._forward.kv.v[0][script.tables[broken][0], 1] = float("nan")
        script.step((0, 4), (1, 4), (2, 2))
        if is_decode:
            script.step((0, 1), (1, 1), (2, 1))
        else:
            script.step((0, 1), (1, 1), (2, 2))
        last = [each.results[-1] for each in script.talks]
        if broken is not None:
            both.device.zero_blocks(script.tables[broken])
            assert torch.isfinite(torch.cat([cache.view(-1) for cache in both.device._forward.kv.v])).all()
        return script, last

    _, clean = run(broken=None)
    for broken in range(3):
        found = run(broken=broken)[1]
        for index, result in enumerate(found):
            assert result.is_finite == (index != broken)
            assert result.token_id == (None if index == broken else clean[index].token_id)


def test_an_adapter_leaves_and_another_takes_its_slot(both: Both) -> None:
    wanted = run_mixed(both.device)
    both.device.drop("1", 1)
    load(both.device, "3", 1)
    both.device.drop("3", 1)
    load(both.device, "1", 1)
    for index in range(5):
        both.device.release_request(f"talk-{index}")
    check_same(run_mixed(both.device), wanted)


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
