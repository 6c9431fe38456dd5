"""Which graph a step takes, and that a replay reads static memory alone: without a GPU, by running passes again."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from weakref import ref

import pytest

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.acting_sites import ActingSites
from serve.engine.cuda_graphs import (
    ALL_SITES,
    FAMILIES,
    NO_SITES,
    CudaRecorded,
    CudaRecorder,
    DecodeGraphs,
    GraphChoice,
    GraphKey,
    Recorded,
    RerunRecorder,
    decode_buckets,
    site_mask,
    sites_of_mask,
)
from serve.engine.device_forward import StepOutput
from serve.engine.device_parts import load_device_parts, prepare_capture
from serve.engine.device_timing import capture
from tests.engine.arena_adapters import Images
from tests.engine.device_cases import BLOCK_SIZE, Script, Talk, image, load, talk, use_one_split, write_model
from tests.engine.fake_graphs import FakeGraphs


def test_buckets_rise_to_the_largest_step() -> None:
    for size in (1, 3, 8, 63, 64, 65, 100, 256, 300):
        buckets = decode_buckets(size)
        assert list(buckets) == sorted(set(buckets)) and buckets[-1] == size
    assert decode_buckets(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert decode_buckets(130) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 130)


def test_a_mask_names_fused_sites_of_any_layer_and_the_forms_of_the_kernels() -> None:
    assert site_mask(ActingSites()) == NO_SITES
    assert site_mask(ActingSites(frozenset((3, name) for name in FUSED_SITES))) == ALL_SITES
    for mask in range(ALL_SITES + 1):
        for forms in (0, FAMILIES, FAMILIES | FAMILIES << 1, FAMILIES | FAMILIES << 7):
            sites = sites_of_mask(mask | forms, 3)
            assert site_mask(sites) == mask | forms and len(sites.fused) == 3 * mask.bit_count()
            assert sites.has_families == bool(forms) and len(sites.in_scaled) == 3 * (forms.bit_count() // 2)
    assert sites_of_mask(FAMILIES << 7, 1).in_scaled == {(0, "down_proj")}


def test_the_exact_family_is_taken_else_the_one_of_all_sites_else_none() -> None:
    choice = GraphChoice()
    assert choice.choose(8, 2) is None
    choice.add(GraphKey(8, ALL_SITES))
    choice.add(GraphKey(16, 2))
    assert choice.choose(8, 2) == GraphKey(8, ALL_SITES)
    assert choice.choose(8, NO_SITES) == GraphKey(8, ALL_SITES)
    choice.add(GraphKey(8, 2))
    assert choice.choose(8, 2) == GraphKey(8, 2)
    # a larger family than needed that is not all sites is never guessed
    assert choice.choose(8, 1) == GraphKey(8, ALL_SITES)
    # nor one whose kernels lack what the step's adapters are
    assert choice.choose(8, 2 | FAMILIES) is None
    choice.add(GraphKey(8, ALL_SITES | FAMILIES))
    assert choice.choose(8, 2 | FAMILIES) == GraphKey(8, ALL_SITES | FAMILIES)
    assert choice.choose(8, 2 | FAMILIES | FAMILIES << 7) is None


def test_missing_graphs_are_wanted_in_the_order_they_were_missed() -> None:
    choice = GraphChoice()
    choice.add(GraphKey(4, ALL_SITES))
    for mask in (3, 1, 3):
        choice.choose(4, mask)
    assert choice.next_wanted() == GraphKey(4, 3)
    choice.add(GraphKey(4, 3))
    choice.refuse(GraphKey(4, 1))
    assert choice.next_wanted() is None
    assert choice.choose(4, 1) == GraphKey(4, ALL_SITES) and choice.next_wanted() is None


@dataclass
class CountingRecorder:
    """Reruns, and counts; some captures fail."""

    failing: set[int] = field(default_factory=set)
    num_records: int = 0
    num_replays: int = 0

    def record(self, run: Callable[[], StepOutput]) -> Recorded:
        self.num_records += 1
        if self.num_records in self.failing:
            raise RuntimeError("out of memory")
        return _Counting(RerunRecorder().record(run), self)


@dataclass
class _Counting:
    inner: Recorded
    recorder: CountingRecorder

    @property
    def output(self) -> StepOutput:
        return self.inner.output

    def replay(self) -> None:
        self.recorder.num_replays += 1
        self.inner.replay()


def test_a_graph_that_cannot_be_captured_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    recorder = CountingRecorder(failing={2})
    graphs = DecodeGraphs(recorder, lambda _: lambda: StepOutput(None, None))  # type: ignore[arg-type]
    graphs.capture(GraphKey(4, ALL_SITES))
    assert graphs.capture_pending() is False
    assert graphs.find(4, 1) is not None and graphs.find(2, 1) is None
    assert graphs.capture_pending() is True and "could not be captured" in caplog.text
    assert graphs.capture_pending() is True and recorder.num_records == 3
    assert graphs.capture_pending() is False
    assert graphs.find(4, 1) is graphs.find(4, ALL_SITES) and graphs.find(2, 1) is not None


def test_all_captures_share_one_stream_and_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)

    def run() -> StepOutput:
        fakes.note()
        return StepOutput(None, None)  # type: ignore[arg-type]

    recorder = CudaRecorder()
    first, second = recorder.record(run), recorder.record(run)
    # memory of a pool belongs to the stream it was taken on; a pass is warm before it is captured
    once = [("stream 1", False, None)] * 2 + [("stream 1", True, "the pool")]
    assert fakes.runs == once * 2 and fakes.num_streams == 1
    assert fakes.current.name == "main"
    assert isinstance(first, CudaRecorded) and isinstance(second, CudaRecorded) and first.graph is not second.graph
    first.replay()
    assert first.graph.num_replays == 1  # type: ignore[attr-defined]


def test_a_failed_capture_leaves_the_main_stream_current(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)

    def run() -> StepOutput:
        if fakes.is_capturing:
            raise MemoryError
        return StepOutput(None, None)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="previous error"):
        CudaRecorder().record(run)
    assert fakes.current.name == "main"


def test_a_timed_pass_keeps_what_it_reads_and_takes_no_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)

    class Weights:
        def run(self) -> None:
            fakes.note()

    weights = Weights()
    alive = ref(weights)
    replay = capture(weights.run)
    del weights
    assert alive() is not None
    replay()
    assert fakes.runs == [("torch's own", False, None)] * 3 + [("torch's own", True, None)]
    assert fakes.num_streams == 0
    del replay
    assert alive() is None


def test_a_replay_is_right_for_other_rows_adapters_and_ranks_than_at_the_capture(tmp_path: Path) -> None:
    config = replace(write_model(tmp_path / "base"), max_num_seqs=4)
    images = {
        "a": image(1, {"q_proj": 2, "o_proj": 5, "gate_proj": 1, "down_proj": 7}),
        "b": image(2, {"v_proj": 16, "down_proj": 1}, biased="down_proj"),
        "c": image(3, {"o_proj": 3}),
    }
    parts = load_device_parts(config, "interpreter", Images(images).open, lambda _: None)
    executor, recorder = parts.executor, CountingRecorder()
    use_one_split(executor)

    def run() -> list[list[int]]:
        first = Script(executor, [talk(3, None, 1), talk(4, 0, 2, temperature=0.9), talk(2, 2, 3)])
        first.prefill_all()
        # three rows in a bucket of four, then one, then chained ones
        first.step((0, 1), (1, 1), (2, 1))
        first.step((2, 1))
        first.submit((1, 1), (2, 1))
        first.submit((2, 1), (1, 1))
        first.collect()
        first.collect()
        for index in range(3):
            executor.release_request(f"talk-{index}")
        return first.outputs

    def alone(slot: int) -> list[list[int]]:
        script = Script(executor, [Talk([7, 8, 9], slot, talk(1, None, 0).params)])
        script.prefill_all()
        script.decode_all(1)
        executor.release_request("talk-0")
        return script.outputs

    load(executor, "a", 0)
    load(executor, "c", 2)
    prepare = partial(prepare_capture, executor._forward, executor._buffers, BLOCK_SIZE)
    graphs = DecodeGraphs(recorder, prepare)
    expected = run()
    # captured with padding rows and no adapter at all
    for bucket in (1, 2, 4):
        graphs.capture(GraphKey(bucket, ALL_SITES))
    executor._graphs = graphs
    assert run() == expected and recorder.num_replays == 4
    executor._graphs = None
    load(executor, "b", 1)
    expected_alone = alone(1)
    executor._graphs = graphs
    assert alone(1) == expected_alone
    # the narrower families that these steps would have taken
    assert executor.capture_pending()
    assert run() == expected
    executor.close()
