"""vLLM's two endpoints, as controllers call them; a path is read only where the operator allows it."""

import shutil
from pathlib import Path

import pytest

from tests.api_guard.whole_api import BASE, WholeApi, whole_api
from tests.store.folders import lora_config, lora_tensors, write_folder


@pytest.fixture(name="roots")
def _roots(api: WholeApi) -> Path:
    """Return the folder that the operator allows, emptied."""
    folder = api.store_dir.parent / "roots"
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


@pytest.fixture(name="good")
def _good(roots: Path) -> Path:
    return write_folder(roots / "good", lora_config(), lora_tensors())


def load(api: WholeApi, **body: object) -> tuple[int, str]:
    answer = api.http.post("/v1/load_lora_adapter", json=body)
    return answer.status_code, answer.text


def test_loading_and_unloading_answer_in_vllms_words(api: WholeApi, good: Path) -> None:
    assert load(api, lora_name="x", lora_path=str(good)) == (200, "Success: LoRA adapter 'x' added successfully.")
    (version,) = api.store.list()
    assert version.name == "x" and api.engine.loaded == [version.digest]
    answer = api.http.post("/v1/unload_lora_adapter", json={"lora_name": "x", "lora_int_id": 7})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'x' removed successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    assert api.store.list() == [] and api.engine.unloaded == [version.digest]


def test_a_loaded_name_is_replaced_only_when_asked(api: WholeApi, good: Path) -> None:
    assert load(api, lora_name="x", lora_path=str(good))[0] == 200
    status, text = load(api, lora_name="x", lora_path=str(good))
    assert status == 400 and "already been loaded" in text and '"InvalidUserInput"' in text
    assert load(api, lora_name="x", lora_path=str(good), load_inplace=True)[0] == 200
    assert api.store.get("x").version >= 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "x"},
        {"lora_path": "/x"},
        {"lora_name": "", "lora_path": "/x"},
        {"lora_name": BASE, "lora_path": "/x"},
    ],
    ids=str,
)
def test_missing_fields_and_the_bases_name_are_vllms_invalid_user_input(body: dict[str, str], api: WholeApi) -> None:
    answer = api.http.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "InvalidUserInput"


def test_what_is_not_there_is_404(api: WholeApi, roots: Path) -> None:
    assert load(api, lora_name="x", lora_path=str(roots / "none"))[0] == 404
    for name in ("none", BASE, f"{BASE}:x"):
        assert api.http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 404
    assert api.http.post("/v1/unload_lora_adapter", json={}).status_code == 400


def test_paths_outside_the_roots_are_refused_whether_or_not_they_exist(api: WholeApi, roots: Path, good: Path) -> None:
    outside = write_folder(roots.parent / "outside", lora_config(), lora_tensors())
    (roots / "link").symlink_to(outside)
    (roots / "up").symlink_to("..")
    answers = {
        load(api, lora_name="x", lora_path=path)
        for path in (
            *("/", "/etc", "/etc/passwd", "/nowhere/at/all", "relative", "~", ".", ".."),
            str(outside),
            str(roots / ".." / "outside"),
            str(roots / "link"),
            str(roots / "up" / "outside"),
            f"{roots}-sibling",
            f"file://{good}",
            "https://example.org/adapter",
        )
    }
    # one answer for all: nobody learns what lies where
    ((status, text),) = answers
    assert status == 403 and '"adapter_forbidden"' in text and str(roots) not in text
    assert api.store.list() == []


def test_odd_paths_do_not_break_anything(api: WholeApi, roots: Path) -> None:
    for path in ("a\0b", "x" * 4000, str(roots / ("y" * 300))):
        assert load(api, lora_name="x", lora_path=path)[0] in (400, 403, 404)
    assert load(api, lora_name="x", lora_path="x" * 5000)[0] == 400


def test_a_folder_of_links_or_pickles_is_refused(api: WholeApi, roots: Path, good: Path) -> None:
    linked = roots / "linked"
    linked.mkdir()
    for file in good.iterdir():
        (linked / file.name).symlink_to(file)
    assert load(api, lora_name="x", lora_path=str(linked))[0] == 400
    pickled = roots / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text("{}", encoding="utf-8")
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert load(api, lora_name="x", lora_path=str(pickled))[0] == 400
    assert load(api, lora_name="../x", lora_path=str(good))[0] == 400


def test_without_roots_no_path_is_taken_and_the_answer_says_what_to_do(model_dir: Path, tmp_path: Path) -> None:
    good = write_folder(tmp_path / "good", lora_config(), lora_tensors())
    with whole_api(model_dir, tmp_path / "store") as api:
        status, text = load(api, lora_name="x", lora_path=str(good))
        assert status == 403 and "POST /v1/adapters" in text
        assert api.num_staged == 0
