"""From `--model` to a folder: local paths, ids, and each way it can fail, without a network."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from serve.errors import StartError
from serve.model.download import resolve_model_dir


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_dir(str(tmp_path)) == tmp_path


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"has no config\.json"):
        resolve_model_dir(str(tmp_path))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(StartError, match="is a file"):
        resolve_model_dir(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["./missing", "/no/such/folder", "a/b/c", "missing", "../x/y", ""])
def test_what_is_neither_folder_nor_id_is_refused_without_a_request(model: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"does not exist|has no config"):
        resolve_model_dir(model)


def test_an_id_downloads_safetensors_and_text_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def snapshot(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model_dir("someone/tiny-model") == tmp_path
    assert asked["repo_id"] == "someone/tiny-model"
    assert "*.safetensors" in str(asked["allow"]) and "*.bin" not in str(asked["allow"])


@pytest.mark.parametrize(
    ("error", "text"),
    [(LocalEntryNotFoundError("offline"), "cannot be reached"), (OSError("disk full"), "download .* failed")],
)
def test_a_failed_download_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def snapshot(repo_id: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(StartError, match=text) as caught:
        resolve_model_dir("someone/tiny-model")
    assert "someone/tiny-model" in str(caught.value) and "\n" not in str(caught.value)
