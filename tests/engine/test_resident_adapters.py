"""A whole step of the device's executor launches the same grids however many adapters are resident."""

from dataclasses import replace
from pathlib import Path

from adapter_kernels.gpu.tables import RANK
from serve.config import EngineConfig
from serve.engine.device_parts import load_device_parts
from tests.engine.arena_adapters import Images
from tests.engine.device_cases import Script, image, load, talk, write_model
from tests.kernels.gpu.launches import record_launches
from tests.kernels.random_adapters import ALL_SITES

ADAPTER = image(1, dict.fromkeys(ALL_SITES, 4))
# of three sequences, tokens per step: decodes are of one token
STEPS = {
    "grouped rows": ((0, 14), (1, 6), (2, 3)),
    "a chunk and decodes": ((0, 1), (1, 1), (2, 2)),
    "decodes": ((0, 1), (1, 1), (2, 1)),
}


def launched(config: EngineConfig, num_resident: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Kernels and grids of the steps, programs not run; adapters 0 and 1 are used, all others only resident."""
    config = replace(config, num_adapter_slots=num_resident)
    with record_launches(executed=False) as launches:
        executor = load_device_parts(
            config, "interpreter", Images({"0": ADAPTER, "1": ADAPTER}).open, lambda _: None
        ).executor
        last_used = min(1, num_resident - 1)
        for slot in range(last_used + 1):
            load(executor, str(slot), slot)
        rows = executor._forward.tables.rows
        # the trial at the start needs two slots
        assert rows.shape[1] == max(num_resident, 2) and bool((rows[:, 0, RANK] == 4).all())
        rows[:, 2:] = rows[:, :1]
        script = Script(executor, [talk(14, 0, 1), talk(6, None, 2), talk(6, last_used, 3)])
        found = {}
        for name, counts in STEPS.items():
            launches.clear()
            script.submit(*counts)
            found[name] = [(launch.kernel, launch.grid) for launch in launches]
            script.collect()
        executor.close()
    return found


def test_grids_are_those_of_the_step(tmp_path: Path) -> None:
    config = write_model(tmp_path / "base")
    few, many = launched(config, 100), launched(config, 2000)
    assert few == many
    # one adapter: another split of the rows, the same kernels
    alone = launched(config, 1)
    for name, launches in many.items():
        assert [kernel for kernel, _ in launches] == [kernel for kernel, _ in alone[name]]
    assert alone["decodes"] == many["decodes"]
    assert ("_route_kernel", (3,)) in many["grouped rows"] and ("_route_kernel", (2,)) in alone["grouped rows"]
    assert {kernel for kernel, _ in many["decodes"]} >= {"_shrink_kernel", "_expand_kernel"}
