"""The launch plan as a table: what one layer launches, in which order, and what of it runs on the side stream.

Programs do not run here, launches are only written down. The table is printed in docs/kernels.md as well: change both.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.launch_config import LaunchConfigs
from serve.model.fused_decoder import FusedDecoder
from serve.model.fused_weights import read_fused_weights
from serve.model.spec import ModelSpec, read_spec
from serve.model.weight_source import RandomWeights
from tests.kernels.gpu.batches import random_image
from tests.kernels.gpu.launches import Launch, record_launches
from tests.model.fused_run import MAX_DECODES, MAX_STEP_TOKENS, Adapters, FusedRun
from tests.model.paged_run import CPU
from tests.model.tiny_models import BY_NAME, save

ALL_SITES = tuple(site for members in FUSED_SITES.values() for site in members)
TARGETS: dict[str, tuple[str, ...]] = {
    "no adapter": (),
    "LoRA on all sites": ALL_SITES,
    "o_proj only": ("o_proj",),
    "gate_proj, up_proj only": ("gate_proj", "up_proj"),
}
DECODE = {0: [5], 1: [6]}
PREFILL = {0: [5, 6, 7], 1: [8, 9]}

# launches per layer on the main stream, and beside it
BASE = {"gemm": 4, "qkv_sink": 1, "add_norm": 2, "swiglu_sink": 1}
ATTENTION = {"decode": {"paged_decode": 1, "combine": 1}, "prefill": {"paged_prefill": 1}}
SIDE = {
    "no adapter": {},
    "LoRA on all sites": {"shrink": 4, "expand": 2},
    "o_proj only": {"shrink": 1, "expand": 1},
    "gate_proj, up_proj only": {"shrink": 1},
}
SITES_WITH_WORK = {"LoRA on all sites": 4, "o_proj only": 1, "gate_proj, up_proj only": 1}
# one layer of a decode step with LoRA on all sites; what stands between fork and join runs beside the GEMM
ORDER = """
fork shrink | gemm join qkv_sink paged_decode combine
fork shrink expand | gemm join add_norm
fork shrink | gemm join swiglu_sink
fork shrink expand | gemm join add_norm
"""
GEMMS = {"mm", "addmm", "linear"}
VIEWS = {"slice", "view", "t", "squeeze", "unsqueeze", "alias", "detach", "_unsafe_view", "select"}


@dataclass
class Journal:
    """A `SideStream` that writes down forks and joins between the launches."""

    events: list[Any] = field(default_factory=list)

    @contextmanager
    def fork(self) -> Iterator[None]:
        self.events.append("fork")
        yield
        self.events.append("|")

    def join(self) -> None:
        self.events.append("join")


class TorchOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down torch's own ops; views launch nothing."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self._events.append("gemm" if name in GEMMS else name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    with torch.random.fork_rng():
        return read_spec(save(BY_NAME["llama3"].build(num_hidden_layers=3), tmp_path_factory.mktemp("llama3")))


def with_layers(spec: ModelSpec, num_layers: int) -> ModelSpec:
    return replace(spec, dims=replace(spec.dims, num_hidden_layers=num_layers), layers=spec.layers[:num_layers])


def run_step(
    spec: ModelSpec, targets: tuple[str, ...], tokens: dict[int, list[int]], *, num_resident: int = 2
) -> list[Launch | str]:
    """Launch one step in which sequence 0 has an adapter on these targets; everything that was issued, in order."""
    journal = Journal()
    decoder = FusedDecoder(
        spec,
        read_fused_weights(RandomWeights(spec, torch.float32, CPU, torch.Generator())),
        max_model_len=None,
        max_step_tokens=MAX_STEP_TOKENS,
        max_decodes=MAX_DECODES,
        side=journal,
        configs=LaunchConfigs({}),
    )
    ranks = {(layer, site): 8 for layer in range(spec.dims.num_hidden_layers) for site in targets}
    shapes = {site: spec.dims.site_shape(site) for site in ALL_SITES}
    image = random_image(shapes, ranks, torch.Generator().manual_seed(0))
    run = FusedRun(decoder, Adapters.build(spec, [image] * num_resident), (0, None) if targets else (None, None))
    inputs = run.inputs(tokens)
    with record_launches(executed=False) as launches, TorchOps(launches):
        journal.events = launches
        decoder.hidden(inputs, run.kv)
    return list(launches)


def names(events: list[Launch | str]) -> list[str]:
    return [event if isinstance(event, str) else event.kernel.strip("_").removesuffix("_kernel") for event in events]


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("case", TARGETS)
def test_a_layer_launches_what_the_plan_says(spec: ModelSpec, case: str, kind: str) -> None:
    tokens = {"decode": DECODE, "prefill": PREFILL}[kind]
    counts = [Counter(names(run_step(with_layers(spec, n), TARGETS[case], tokens))) for n in (1, 2)]
    per_layer = counts[1] - counts[0]
    forks = {} if case == "no adapter" else dict.fromkeys(("fork", "|", "join"), SITES_WITH_WORK[case])
    assert per_layer == {**BASE, **ATTENTION[kind], **SIDE[case], **forks}


def test_adapter_kernels_stand_beside_the_gemm_and_never_after_it(spec: ModelSpec) -> None:
    events = names(run_step(with_layers(spec, 1), ALL_SITES, DECODE))
    expected = ORDER.split()
    assert events[-len(expected) :] == expected


@pytest.mark.parametrize("tokens", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_a_step_without_adapters_launches_no_adapter_op(spec: ModelSpec, tokens: dict[int, list[int]]) -> None:
    events = run_step(with_layers(spec, 1), (), tokens)
    assert not {"fork", "join", "shrink", "expand"} & set(names(events))
    assert sinks_with_adapters(events) == []


@pytest.mark.parametrize(
    ("targets", "sinks"),
    [
        (("o_proj",), ["add_norm"]),
        (("down_proj",), ["add_norm"]),
        (("k_proj",), ["qkv_sink"]),
        (("up_proj",), ["swiglu_sink"]),
        (ALL_SITES, ["qkv_sink", "add_norm", "swiglu_sink", "add_norm"]),
    ],
)
def test_sinks_of_untargeted_sites_carry_no_adapter_code(
    spec: ModelSpec, targets: tuple[str, ...], sinks: list[str]
) -> None:
    assert sinks_with_adapters(run_step(with_layers(spec, 1), targets, DECODE)) == sinks


@pytest.mark.parametrize("tokens", [DECODE, PREFILL, {0: list(range(20))}], ids=["decode", "prefill", "grouped rows"])
def test_launches_and_grids_do_not_grow_with_resident_adapters(spec: ModelSpec, tokens: dict[int, list[int]]) -> None:
    def grids(num_resident: int) -> list[object]:
        events = run_step(with_layers(spec, 1), ALL_SITES, tokens, num_resident=num_resident)
        return [event if isinstance(event, str) else (event.kernel, event.grid) for event in events]

    assert grids(1) == grids(100) == grids(2000)


def sinks_with_adapters(events: list[Launch | str]) -> list[str]:
    return names([e for e in events if isinstance(e, Launch) and e.options.get("HAS_ADAPTERS") is True])
