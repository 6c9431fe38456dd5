"""Checkpoints of whole models over HTTP: `format` and `options` reach the converter, wrong ones are refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters_store.convert.dispatch import convert
from tests.api_guard.whole_api import WholeApi, adapter_files, whole_api
from tests.store.folders import TINY
from tests.store.tiny_checkpoints import S2ft, TinyBase, meteora_checkpoint, mixture, s2ft_checkpoint, write_checkpoint

OPTIONS = {"top_k": 2, "temperature": 1.0, "rank": 2, "alpha": 4, "experts": ["a", "b"]}
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """Return a base on disk."""
    return TinyBase.write(tmp_path_factory.mktemp("base"), TINY)


@pytest.fixture(scope="module")
def api(base: TinyBase, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeApi]:
    """Serve one API whose store has the base's weights at hand."""
    store_dir = tmp_path_factory.mktemp("store")
    with whole_api(model_dir, store_dir, base=base.dims, base_dir=base.folder, convert=convert) as running:
        yield running
        assert running.num_staged == 0


@pytest.fixture(scope="module")
def s2ft(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return an S2FT checkpoint's file."""
    weights, _ = s2ft_checkpoint(base, S2ft(up=[[3], []], down=[[9, 1], [22]]))
    return (write_checkpoint(tmp_path_factory.mktemp("s2ft"), weights) / MODEL).read_bytes()


@pytest.fixture(scope="module")
def meteora(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a MeteoRA checkpoint's file."""
    weights = meteora_checkpoint(base, mixture(TINY, (2, 2)))
    return (write_checkpoint(tmp_path_factory.mktemp("meteora"), weights) / MODEL).read_bytes()


def upload(api: WholeApi, name: str, files: dict[str, bytes], **fields: str) -> httpx.Response:
    """Send a form with these text fields."""
    parts = [("files", (filename, data)) for filename, data in files.items()]
    return api.http.post("/v1/adapters", data={"name": name, **fields}, files=parts)


@pytest.mark.parametrize("source_format", [None, "auto", "s2ft"])
def test_an_s2ft_checkpoint_is_published(source_format: str | None, api: WholeApi, s2ft: bytes) -> None:
    fields = {} if source_format is None else {"format": source_format}
    answer = upload(api, "slices", {MODEL: s2ft}, **fields)
    assert answer.status_code == 201, answer.text
    card = answer.json()
    assert (card["family"], card["rank"], card["base"]["base_dependent"]) == ("s2ft", 0, True)
    assert card["report"]["applied"] == ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    assert api.http.get("/v1/adapters/slices").json()["digest"] == card["digest"]


@pytest.mark.parametrize("source_format", ["auto", "meteora"])
def test_a_meteora_checkpoint_is_published_with_its_options(source_format: str, api: WholeApi, meteora: bytes) -> None:
    answer = upload(api, "mix", {MODEL: meteora}, format=source_format, options=json.dumps(OPTIONS))
    assert answer.status_code == 201, answer.text
    assert (answer.json()["family"], answer.json()["rank"]) == ("meteora", 4)


@pytest.mark.parametrize("source_format", ["peft", "auto", ""])
def test_a_peft_folder_may_say_so(source_format: str, api: WholeApi) -> None:
    assert upload(api, "poet", adapter_files(), format=source_format, options="{}").status_code == 201


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"format": "gguf"}, "invalid_option", "format"),
        ({"format": "x" * 65}, None, "format"),
        ({"options": "[]"}, "invalid_option", "options"),
        ({"options": "{"}, "invalid_option", "options"),
        ({"options": '{"top_k": NaN}'}, "invalid_option", "options"),
        ({"options": '{"top_k": 1, "top_k": 2}'}, "invalid_option", "options"),
        ({"options": "[" * 10_000}, "invalid_option", "options"),
        ({"options": " " * (33 << 10)}, None, "options"),
        ({"options": "{}"}, "invalid_option", "options.top_k"),
        ({"options": json.dumps(OPTIONS | {"top_k": 9})}, "invalid_gate", None),
        ({"options": json.dumps(OPTIONS | {"path": "/etc"})}, "invalid_option", "options"),
        ({"format": "s2ft"}, "unsupported_adapter", None),
        ({"format": "peft"}, "corrupt_adapter", "files"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(
    fields: dict[str, str], code: str | None, param: str | None, api: WholeApi, meteora: bytes
) -> None:
    answer = upload(api, "wrong", {MODEL: meteora}, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    assert str(api.store_dir) not in error["message"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({MODEL: b"x", "adapter_config.json": b"{}"}, "does not belong"),
        ({MODEL: b"x", "model-00001-of-00001.safetensors": b"x"}, "more than once"),
        ({"model-00001-of-00002.safetensors": b"x"}, "another number"),
        ({"model-1-of-2.safetensors": b"x"}, "say which with format"),
        ({"model/1.safetensors": b"x"}, "is not taken"),
        ({"config.json": b"{}"}, "lacks the file"),
        ({"pytorch_model.bin": b"x"}, "safe_serialization=True"),
        ({MODEL: b"PK\x03\x04 a zip"}, "header"),
    ],
)
def test_files_that_make_no_whole_checkpoint_are_refused(files: dict[str, bytes], message: str, api: WholeApi) -> None:
    answer = upload(api, "wrong", files)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
