"""Part `engine` of `make gpu-check`: the device's executor against the CPU's, token by token, on a small model.

Owns the scripts of steps; model, adapters and the step driver are the engine tests' own. Invariant: both executors get
the same plans, fp32 and greedy or seeded, so a single differing token is a fault.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from adapter_kernels.image import AdapterImage
from scripts.gpu_check_part import Place, main_of
from scripts.gpu_check_report import Measure, Unit
from serve.config import EngineConfig
from serve.engine.device_executor import DeviceExecutor
from serve.engine.device_parts import load_device_parts
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.model.spec import ModelSpec, read_spec
from tests.engine.arena_adapters import Images
from tests.engine.device_cases import Script, Talk, load, talk, use_one_split, write_model
from tests.kernels.gpu.batches import random_image
from tests.tiny_model import write_tiny_model

# slot -> (seed, ranks by site); the digest of slot n is "n"
ADAPTERS: dict[int, tuple[int, dict[str, int]]] = {
    0: (1, {"q_proj": 8, "k_proj": 3, "v_proj": 5, "o_proj": 16, "gate_proj": 1, "up_proj": 7, "down_proj": 4}),
    1: (2, {"q_proj": 3, "v_proj": 5, "down_proj": 2}),
    2: (3, {"o_proj": 4}),
    3: (4, {"q_proj": 16, "k_proj": 16, "gate_proj": 9, "up_proj": 2}),
}
# of no slot: loaded in the middle of a run into the slot of another
LATE_DIGEST, LATE = "late", (5, {"v_proj": 6, "up_proj": 6, "down_proj": 6})


@dataclass(frozen=True, slots=True)
class Executors:
    """The same model and adapters on both sides."""

    cpu: TorchExecutor
    device: DeviceExecutor

    def forget(self, num_talks: int) -> None:
        """Release the sequences of a script."""
        for executor in (self.cpu, self.device):
            for index in range(num_talks):
                executor.release_request(f"talk-{index}")


class Bench:
    """Builds the executors when the first unit asks for them."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @cached_property
    def executors(self) -> Executors:
        """Load model and adapters."""
        with tempfile.TemporaryDirectory() as folder:
            config = self._config(Path(folder))
            spec = read_spec(config.model_dir)
            images = Images({str(slot): _image(spec, *adapter) for slot, adapter in ADAPTERS.items()})
            images.images[LATE_DIGEST] = _image(spec, *LATE)
            name = "interpreter" if self._place.is_tiny else "cuda"
            parts = load_device_parts(config, name, images.open, lambda _: None)
            found = Executors(TorchExecutor(load_parts(config), images.open), parts.executor)
        if self._place.is_tiny:
            use_one_split(found.device)
        for slot in ADAPTERS:
            load(found.cpu, str(slot), slot)
            load(found.device, str(slot), slot)
        return found

    def _config(self, folder: Path) -> EngineConfig:
        config = write_model(folder / "smallest")
        if self._place.is_tiny:
            return config
        # tensor cores want heads of at least 16
        small = dataclasses.replace(config, model_dir=write_tiny_model(folder / "small"), max_model_len=48)
        return dataclasses.replace(small, adapter_device_bytes=4 << 20)


def units(place: Place) -> list[Unit]:
    """One unit per property."""
    bench = Bench(place)

    def unit(name: str, count: Callable[[Executors], int]) -> Unit:
        def run() -> list[Measure]:
            found = count(bench.executors)
            cause = "" if found == 0 else "wrong tokens: run tests/engine/test_device_executor.py, then part kernels"
            return [Measure(name, found, "tokens differ", target=0.0, cause=cause)]

        return Unit(name, run)

    return [
        unit("mixed steps equal the CPU's", _mixed),
        unit("each adapter's row alone and in company", _alone),
        unit("graphs replayed with more, fewer and other adapters", _changing),
        unit("steps submitted ahead of their tokens", _ahead),
        unit("a slot reused in mid-flight", _reused),
    ]


def mixed_talks() -> list[Talk]:
    """Base and adapters, greedy and sampled."""
    return [
        talk(9, None, 1),
        talk(5, 0, 2, temperature=0.8, top_p=0.9),
        talk(13, 1, 3),
        talk(4, 2, 4, repetition_penalty=1.3, temperature=0.5, top_k=9),
        talk(7, 3, 5, temperature=1.1, min_tokens=3),
    ]


def run_mixed(script: Script) -> list[list[int]]:
    """Chunks beside decodes, prompts that begin late, decodes alone."""
    script.step((0, 9), (2, 6))
    script.step((0, 1), (1, 5), (2, 7), (3, 4))
    script.step((3, 1), (0, 1), (4, 7), (2, 1), (1, 1))
    script.decode_all(2)
    return script.outputs


def count_differences(found: list[list[int]], wanted: list[list[int]]) -> int:
    """Number of places where two sets of outputs differ, missing tokens included."""
    return sum(
        abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))
        for a, b in zip(found, wanted, strict=True)
    )


def _mixed(both: Executors) -> int:
    found, wanted = (run_mixed(Script(executor, mixed_talks())) for executor in (both.device, both.cpu))
    both.forget(5)
    return count_differences(found, wanted)


def _alone(both: Executors) -> int:
    together = run_mixed(Script(both.device, mixed_talks()))
    both.forget(5)
    differences = 0
    for index, expected in enumerate(together):
        script = Script(both.device, [mixed_talks()[index]])
        script.prefill_all()
        script.decode_all(len(expected) - 1)
        differences += count_differences(script.outputs, [expected])
        both.forget(1)
    return differences


def _changing(both: Executors) -> int:
    # who decodes together: none with adapter, one, all, others, one again
    rounds = [(0,), (0, 1), (0, 1, 2, 3, 4), (3, 4), (2,), (0, 4)]

    def run(executor: DeviceExecutor | TorchExecutor) -> list[list[int]]:
        script = Script(executor, mixed_talks())
        script.prefill_all()
        for members in rounds:
            script.step(*((index, 1) for index in members))
        return script.outputs

    found, wanted = run(both.device), run(both.cpu)
    both.forget(5)
    return count_differences(found, wanted)


def _ahead(both: Executors) -> int:
    def talks() -> list[Talk]:
        return [talk(6, 1, 7), talk(4, None, 8, temperature=0.9), talk(3, 0, 9, top_k=5, temperature=1.0)]

    ahead = Script(both.device, talks())
    ahead.submit((0, 6), (1, 4), (2, 3))
    ahead.submit((2, 1), (1, 1), (0, 1))
    for _ in range(3):
        ahead.collect()
        ahead.submit((0, 1), (2, 1), (1, 1))
    ahead.collect()
    ahead.collect()
    plain = Script(both.cpu, talks())
    plain.prefill_all()
    plain.decode_all(4)
    both.forget(3)
    return count_differences(ahead.outputs, plain.outputs)


def _reused(both: Executors) -> int:
    """Slot 1 is dropped and loaded with another adapter while steps of others, and of its last user, are in flight."""

    def talks() -> list[Talk]:
        return [talk(6, 0, 11), talk(5, 1, 12), talk(4, 1, 13)]

    ahead = Script(both.device, talks())
    ahead.submit((0, 6), (1, 5))
    ahead.submit((0, 1), (1, 1))
    # talk 1 ends here; what it submitted still reads the slot's bytes
    both.device.drop("1", 1)
    both.device.start_load(LATE_DIGEST, 1)
    ahead.collect()
    ahead.submit((0, 1))
    ahead.collect()
    ahead.collect()
    _finish_load(both.device)
    ahead.step((0, 1), (2, 4))
    ahead.step((0, 1), (2, 1))

    plain = Script(both.cpu, talks())
    plain.step((0, 6), (1, 5))
    plain.step((0, 1), (1, 1))
    both.cpu.drop("1", 1)
    load(both.cpu, LATE_DIGEST, 1)
    plain.step((0, 1))
    plain.step((0, 1), (2, 4))
    plain.step((0, 1), (2, 1))
    for executor in (both.cpu, both.device):
        executor.drop(LATE_DIGEST, 1)
        load(executor, "1", 1)
    both.forget(3)
    return count_differences(ahead.outputs, plain.outputs)


def _finish_load(executor: DeviceExecutor) -> None:
    results = executor.poll_loads()
    while not results:
        results = executor.poll_loads()
    if results[0].error is not None:
        raise RuntimeError(results[0].error)


def _image(spec: ModelSpec, seed: int, ranks: dict[str, int]) -> AdapterImage:
    generator = torch.Generator().manual_seed(seed)
    shapes = {site: spec.dims.site_shape(site) for site in ADAPTERS[0][1]}
    places = {(layer, site): rank for layer in range(spec.dims.num_hidden_layers) for site, rank in ranks.items()}
    image = random_image(shapes, places, generator)
    # gaps between tensors are NaN there, to show reads outside; a load refuses what is not finite
    return dataclasses.replace(image, data=torch.nan_to_num(image.data.view(torch.float32)).view(torch.uint8))


if __name__ == "__main__":
    main_of("engine", units)
