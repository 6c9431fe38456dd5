"""Every family on the device path beside LoRA and base, loaded and served as the CPU serves them: the same tokens.

Through the loader, the tables, the fused decoder and the executor, on Triton's interpreter.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from adapter_kernels.image import AdapterImage
from serve.engine.device_executor import DeviceExecutor
from serve.engine.device_parts import load_device_parts
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Executor
from tests.engine.arena_adapters import Images
from tests.engine.device_cases import Script, Talk, load, talk, use_one_split, write_model
from tests.kernels.gpu.family_cases import family_images, family_ops
from tests.kernels.gpu.launches import record_launches
from tests.kernels.random_adapters import Ops, random_adapter

MAX_RANK = 32


@dataclass(frozen=True)
class Both:
    """The same model and adapters on both executors; slot i holds the i-th family."""

    cpu: TorchExecutor
    device: DeviceExecutor
    images: Images = field(repr=False)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    config = write_model(tmp_path_factory.mktemp("families") / "base")
    config = dataclasses.replace(config, max_adapter_rank=MAX_RANK, adapter_device_bytes=1 << 20)
    images = Images({str(slot): image for slot, image in enumerate(family_images())})
    found = Both(
        TorchExecutor(load_parts(config), images.open),
        load_device_parts(config, "interpreter", images.open).executor,
        images,
    )
    use_one_split(found.device)
    for slot in range(len(images.images)):
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


def run_all(executor: Executor) -> list[Talk]:
    """Each family and the base: chunks beside decodes with blocks of 16 rows, then decodes of a row each."""
    slots = [*range(len(family_ops())), None]
    script = Script(executor, [talk(2 if index < 4 else 4, slot, index) for index, slot in enumerate(slots)])
    script.step(*((index, 2) for index in range(4)))
    script.step(*((index, 1) for index in range(4)), *((index, 4) for index in range(4, 8)))
    script.decode_all(1)
    return script.talks


def test_all_families_in_one_batch_get_the_tokens_of_the_cpu(both: Both) -> None:
    found, wanted = run_all(both.device), run_all(both.cpu)
    assert [each.output for each in found] == [each.output for each in wanted]
    assert all(result.is_finite for each in found for result in each.results)
    for index in range(8):
        both.cpu.release_request(f"talk-{index}")
    bare = Script(both.cpu, [Talk(each.prompt, None, each.params) for each in found])
    bare.prefill_all()
    bare.decode_all(1)
    moved = [mine.output[:2] != theirs.output for mine, theirs in zip(found, bare.talks, strict=True)]
    assert sum(moved) >= 5 and not moved[7], "the adapters hardly change a token"


def test_compositions_of_all_families_get_the_tokens_of_the_cpu(both: Both) -> None:
    def run(executor: Executor) -> list[list[int]]:
        script = Script(executor, [talk(1, slot, index, composed) for index, (slot, composed) in enumerate(acting)])
        script.prefill_all()
        return script.outputs

    lora, meteora, s2ft, dora, ia3, everything = map(
        list(family_ops()).index, ("lora", "meteora", "s2ft", "dora", "ia3", "everything")
    )
    acting: list[tuple[int | None, tuple[tuple[int, float], ...]]] = [
        (None, ((meteora, 0.5), (dora, -0.75), (ia3, 2.0))),
        (lora, ()),
        (None, ((s2ft, 1.5), (everything, 0.5), (lora, -1.0))),
    ]
    found = run(both.device)
    assert found == run(both.cpu)
    for index in range(3):
        both.cpu.release_request(f"talk-{index}")
    acting = [(slot, ()) for slot, _ in acting]
    assert [mine != theirs for mine, theirs in zip(found, run(both.cpu), strict=True)] == [True, False, True]


def adapter_launches(both: Both, talks: list[Talk]) -> list[str]:
    """Run a step, and name what it launches for adapters."""
    script = Script(both.device, talks)
    with record_launches(executed=False) as launches:
        script.prefill_all()
    for index in range(len(talks)):
        both.device.release_request(f"talk-{index}")
    names = [launch.kernel.strip("_").removesuffix("_kernel") for launch in launches]
    return [name for name in names if name in ("shrink", "expand", "scale_input", "compose")]


def test_a_composition_costs_a_shrink_and_a_compose_at_each_site_however_many_adapters_it_has(both: Both) -> None:
    lora, unequal, ia3 = map(list(family_ops()).index, ("lora", "meteora-unequal", "ia3"))
    own, several = ((lora, 0.5),), ((lora, 0.5), (unequal, -1.0))
    composed = ["shrink", "compose"] * 4
    assert adapter_launches(both, [talk(1, None, 0, own)]) == composed
    assert adapter_launches(both, [talk(1, None, 0, own), talk(1, None, 1, several), talk(1, None, 2)]) == composed
    # beside a single adapter: each site's own launches first
    mixed = ["shrink", *composed[:2], "shrink", "expand", *composed[:2]] * 2
    assert adapter_launches(both, [talk(1, lora, 0), talk(1, None, 1, several)]) == mixed
    scaled = [*composed[:6], "shrink", "scale_input", "compose"]
    assert adapter_launches(both, [talk(1, None, 0, ((lora, 0.5), (ia3, 1.5)))]) == scaled


def test_launches_are_those_of_lora_and_one_more_for_a_scaled_input(both: Both) -> None:
    def launched(*slots: int | None) -> list[str]:
        return adapter_launches(both, [talk(1, slot, index) for index, slot in enumerate(slots)])

    names = list(family_ops())
    every_site = ["shrink", "shrink", "expand", "shrink", "shrink", "expand"]
    assert launched(names.index("lora")) == every_site
    assert launched(names.index("meteora"), None) == every_site
    assert launched(names.index("meteora"), names.index("s2ft"), names.index("lora")) == every_site
    mixed = launched(*range(len(names)), None)
    assert [name for name in mixed if name != "scale_input"] == every_site
    # k and v of one adapter, o, and down of another
    assert mixed.count("scale_input") == 4
    assert launched(None) == []


def test_a_step_of_loras_is_compiled_without_the_other_families(both: Both) -> None:
    def flags(slot: int) -> set[object]:
        script = Script(both.device, [talk(1, slot, 0)])
        with record_launches(executed=False) as launches:
            script.prefill_all()
        both.device.release_request("talk-0")
        return {launch.options["HAS_FAMILIES"] for launch in launches if launch.options.get("HAS_ADAPTERS")}

    names = list(family_ops())
    assert flags(names.index("lora")) == {False} and flags(names.index("dora")) == {True}


def refusal(executor: DeviceExecutor, images: Images, image: AdapterImage) -> str:
    images.images["refused"] = image
    with pytest.raises(AssertionError) as caught:
        load(executor, "refused", 7)
    return str(caught.value)


def test_what_the_bridge_has_no_room_for_is_refused_at_its_load(both: Both) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = dict.fromkeys(["up_proj"], (600, 16))
    image = random_adapter({(0, "up_proj"): Ops(rows=513)}, generator, shapes=wide)
    message = refusal(both.device, both.images, image)
    assert "needs 513 coefficients" in message and "--max-rank to 513" in message and "--device cpu" in message
