"""Random configs and random damage to tensors: an upload is taken or refused with a 4xx, nothing else ever happens."""

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store.canonical import check_adapter
from adapters_store.convert.lora import LORA, LoraTuner
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.convert.peft_config import read_config
from adapters_store.errors import AdapterRefused, ConversionFailed
from tests.store.folders import TINY, lora_config, lora_tensors, safetensors_bytes, write_folder

OPTIONS = ConvertOptions(TINY, "float16", 16)
GOOD = safetensors_bytes(lora_tensors(TINY, sites=("k_proj", "o_proj"), bias=True))
CONFIG = lora_config(target_modules=["k_proj", "o_proj"], lora_bias=True)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
words = st.sampled_from(
    ["q_proj", "k_proj", "layers", "^a", "a.b", "(a+)+$", "all-linear", "LORA", "none", "pissa", "\ud800"]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=800, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([rule.key for rule in LORA.rules]), values, min_size=1, max_size=3))
def test_a_random_value_of_any_known_key_is_read_or_refused(changes: dict[str, object]) -> None:
    try:
        config = read_config(json.dumps(lora_config(**changes)).encode(), model_type="llama")
    except AdapterRefused as refusal:
        assert len(refusal.message) < 400 and refusal.message.isprintable()
        assert json.dumps(refusal.body()).isascii()
    else:
        assert isinstance(config.tuner, LoraTuner)
        assert config.tuner.rank >= 1 and config.tuner.scaling_of("model.layers.0.self_attn.q_proj") > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Return a source folder with a good config, and an empty target."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "adapter_config.json").write_text(json.dumps(CONFIG))
    yield source, target


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**32))
def test_random_damage_to_a_file_is_refused_or_gives_a_valid_adapter(folders: tuple[Path, Path], seed: int) -> None:
    source, target = folders
    (source / "adapter_model.safetensors").write_bytes(damaged(GOOD, random.Random(seed)))
    try:
        convert_peft(source, target, OPTIONS)
        check_adapter(target, TINY, "float16", 16)
    except AdapterRefused as refusal:
        assert refusal.http_status == 400
    except ConversionFailed:
        pytest.fail("the self-test must not depend on the values of an upload")
    finally:
        shutil.rmtree(target)
        target.mkdir()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("exponent", [-148, -134, -127, -75, -26, -15, 0, 60, 100])
def test_values_of_any_magnitude_are_converted_faithfully_or_refused(exponent: int, dtype: str, tmp_path: Path) -> None:
    tensors = lora_tensors(TINY, sites=("k_proj", "o_proj"), bias=True)
    for name, (kind, shape, raw) in tensors.items():
        values = np.frombuffer(raw, "<f4").astype(np.float64) * 2.0**exponent
        tensors[name] = (kind, shape, values.astype("<f4").tobytes())
    for number, alpha in enumerate((1e-6, 1.0, 1e6)):
        folder = write_folder(tmp_path / str(number), CONFIG | {"lora_alpha": alpha}, tensors)
        target = tmp_path / f"target{number}"
        target.mkdir()
        # NonFiniteValues or AdapterWithoutEffect; never a ConversionFailed, which would be our own fault
        with contextlib.suppress(AdapterRefused):
            convert_peft(folder, target, ConvertOptions(TINY, dtype, 16))
            check_adapter(target, TINY, dtype, 16)


def damaged(raw: bytes, choose: random.Random) -> bytes:
    """Apply one to three random edits, most of them in the header."""
    bytes_now = bytearray(raw)
    for _ in range(choose.randint(1, 3)):
        header_end = 8 + int.from_bytes(raw[:8], "little")
        position = choose.randrange(header_end if choose.random() < 0.6 else len(bytes_now))
        match choose.randrange(4):
            case 0:
                bytes_now[position] = choose.randrange(256)
            case 1:
                bytes_now[position] ^= 1 << choose.randrange(8)
            case 2:
                # keeps the length: the edit reaches the checks behind the header
                bytes_now[position : position + 4] = choose.randbytes(len(bytes_now[position : position + 4]))
            case _:
                start = choose.randrange(len(bytes_now))
                bytes_now[position:position] = bytes_now[start : start + choose.randrange(9)]
    return bytes(bytes_now)
