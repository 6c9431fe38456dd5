"""The admission gate: what must not be served is refused with a code of its own, and its nearest neighbour is taken.

One table, run through the store with its real converters, and once over HTTP. Of the list in docs/adapters.md only the
scaling that a converter gets wrong is elsewhere: it takes a running engine (`tests/probe/test_live_probe.py`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from adapters_store.convert.dispatch import convert
from adapters_store.errors import AdapterRefused
from adapters_store.store import AdapterStore
from tests.api_guard.whole_api import WholeApi, whole_api
from tests.store.folders import Tensors, float32, lora_config, lora_tensors, open_store, write_folder
from tests.store.tiny_checkpoints import GQA, TinyBase
from tests.tiny_model import write_tiny_model

FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

Array = npt.NDArray[np.float32]
Config = dict[str, object]
Folder = Callable[[Config, Tensors], None]


@dataclass(frozen=True)
class Case:
    """One change that is refused, the nearest one that is taken, and what the refusal must name."""

    code: str
    wrong: Folder
    right: Folder
    named: tuple[str, ...]
    way_out: str


def config(**values: object) -> Folder:
    def change(found: Config, tensors: Tensors) -> None:
        found.update(values)

    return change


def tensor(name: str, value: Callable[[Array], Array]) -> Folder:
    def change(found: Config, tensors: Tensors) -> None:
        _, shape, raw = tensors[name]
        tensors[name] = float32(value(np.frombuffer(raw, "<f4").reshape(shape).copy()))

    return change


def every_b(factor: float) -> Folder:
    def change(found: Config, tensors: Tensors) -> None:
        for name in [name for name in tensors if "lora_B" in name]:
            tensor(name, lambda values: values * factor)(found, tensors)

    return change


def one(value: float) -> Folder:
    def put(values: Array) -> Array:
        values[0, 0] = value
        return values

    return tensor(FIRST_B, put)


def swap(found: Config, tensors: Tensors) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def without_layer(layer: int, **values: object) -> Folder:
    def change(found: Config, tensors: Tensors) -> None:
        found.update(values)
        for name in [name for name in tensors if f".layers.{layer}." in name]:
            del tensors[name]

    return change


def other_width(found: Config, tensors: Tensors) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensor(name, lambda values: np.tile(values, 2))(found, tensors)


def nothing(found: Config, tensors: Tensors) -> None:
    """The folder as it is."""


CASES = {
    "targets that match nothing": Case(
        "no_target",
        config(target_modules=["query"]),
        config(target_modules=["q_proj", "down_proj", "query"]),
        ("query",),
        "target_modules",
    ),
    "an all-zero B": Case("adapter_no_effect", every_b(0), every_b(2.0**-20), ("zero",), "before training"),
    "NaN": Case("non_finite", one(float("nan")), one(3.0), ("layers.0.self_attn.q_proj",), "NaN"),
    "infinity": Case("non_finite", one(float("inf")), one(-3.0), ("layers.0.self_attn.q_proj",), "infinity"),
    "fp16 overflow": Case("overflow", one(40_000.0), one(32_000.0), ("layers.0.self_attn.q_proj", "65504"), "dtype"),
    "another base": Case("wrong_base", other_width, nothing, ("32",), "base"),
    "swapped A and B": Case("swapped_factors", swap, nothing, ("lora_A",), "lora_B"),
    "a missing layer": Case(
        "missing_layers", without_layer(1), without_layer(1, layers_to_transform=[0]), ("layers.1",), "config"
    ),
    "an unconverted PiSSA": Case(
        "unconverted_init",
        config(init_lora_weights="pissa"),
        config(init_lora_weights=True),
        ("pissa",),
        "path_initial_model_for_weight_conversion",
    ),
    "repeated layers": Case(
        "layer_replication",
        config(layer_replication=[[0, 2], [1, 2]]),
        config(layer_replication=None),
        ("layer",),
        "model",
    ),
    "an unknown field": Case(
        "unknown_field", config(lora_flavour=1), config(lora_dropout=0.5), ("lora_flavour",), "remove it"
    ),
}
# NaN and infinity are one kind of wrong
SHARED_CODES = {"non_finite"}


def folder_with(change: Folder, folder: Path) -> Path:
    found = lora_config(target_modules=["q_proj", "down_proj"])
    tensors = lora_tensors(sites=("q_proj", "down_proj"))
    change(found, tensors)
    return write_folder(folder, found, tensors)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    """Return a float16 store with its real converters."""
    root = tmp_path_factory.mktemp("gate")
    base = TinyBase.write(root / "base", GQA)
    store = open_store(root / "store", base.dims, image_dtype="float16", base_dir=base.folder, convert=convert)
    yield store
    store.close()


@pytest.mark.parametrize("what", CASES)
def test_the_gate_refuses_with_a_code_and_takes_the_nearest_neighbour(
    what: str, gate: AdapterStore, tmp_path: Path
) -> None:
    case = CASES[what]
    with pytest.raises(AdapterRefused) as refusal:
        gate.put_dir("a", folder_with(case.wrong, tmp_path / "wrong"))
    error = refusal.value
    assert (error.code, error.http_status) == (case.code, 400), error.message
    for word in (*case.named, case.way_out):
        assert word in error.message, error.message
    assert error.message.isprintable() and len(error.message) < 400 and str(tmp_path) not in error.message
    assert gate.put_dir("a", folder_with(case.right, tmp_path / "right")).report.applied


def test_every_reason_has_a_code_of_its_own() -> None:
    codes = [case.code for case in CASES.values()]
    assert {code for code in codes if codes.count(code) > 1} == SHARED_CODES


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeApi]:
    """Return the whole API over a float16 store with its real converters."""
    root = tmp_path_factory.mktemp("api")
    base = TinyBase.write(root / "base", GQA)
    options: dict[str, object] = {"image_dtype": "float16", "convert": convert, "base_dir": base.folder}
    with whole_api(write_tiny_model(root / "tiny"), root / "store", base=base.dims, **options) as running:  # type: ignore[arg-type]
        yield running


def test_over_http_every_refusal_is_the_same_and_harms_nobody(api: WholeApi, tmp_path: Path) -> None:
    for number, (what, case) in enumerate(CASES.items()):
        for kind, change in (("wrong", case.wrong), ("right", case.right)):
            folder = folder_with(change, tmp_path / f"{number}{kind}")
            files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            answer = api.http.post("/v1/adapters", data={"name": "a"}, files=files)
            if kind == "right":
                assert answer.status_code == 201, f"{what}: {answer.text}"
                continue
            error = json.loads(answer.text)["error"]
            assert (answer.status_code, error["code"]) == (400, case.code), f"{what}: {answer.text}"
            assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert api.num_staged == 0
    assert len(api.http.get("/v1/adapters/a/versions").json()["data"]) == len(CASES)
