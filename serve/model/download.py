"""Find the base model's folder: a local one, or a Hugging Face repository that is downloaded once and cached.

Owns the decision path or repository; reads no weights and imports no torch. Invariant: only weights as safetensors and
the small text files are fetched, never pickles or code.
"""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from serve.errors import StartError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# copies of the weights in other layouts that some repositories carry
_SKIPPED = ["consolidated*", "original/*", "onnx/*", "*/*.safetensors"]


def resolve_model_dir(model: str) -> Path:
    """Return the local folder of a model, downloading it with a progress bar when `model` is a repository id.

    Args:
        model: path of a folder with `config.json`, or `owner/name` on the Hugging Face hub.
    Raises:
        StartError: neither; or the download failed; the message says which and what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartError(f"{model} has no config.json: not a Hugging Face model folder")
        return path
    if path.exists():
        raise StartError(f"{model} is a file; --model takes a folder with config.json, or a Hugging Face id")
    if not _REPO_ID.fullmatch(model):
        raise StartError(f"{model} does not exist; --model takes a folder with config.json, or a Hugging Face id")
    return _download(model)


def _download(repo_id: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=_FETCHED, ignore_patterns=_SKIPPED))
    except GatedRepoError as error:
        raise StartError(f"{repo_id} asks for a licence: accept it on its page, then set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise StartError(f"{repo_id} is neither a folder here nor a Hugging Face repository you may read") from error
    except LocalEntryNotFoundError as error:
        raise StartError(
            f"{repo_id} is no folder here, is not in the download cache, and the hub cannot be reached; "
            "check the path or the network"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise StartError(f"the download of {repo_id} failed: {type(error).__name__}; try again") from error
