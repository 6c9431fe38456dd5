"""Where an adapter came from: base, data, hyper-parameters, seed, code and how the loss fell.

Owns the fields of `provenance.json` and the identity of a job. Invariant: nothing in it depends on when, where or in
how many pieces the job ran, so equal jobs give equal bytes; and it holds no path.
"""

import hashlib
from collections.abc import Sequence

import accelerate
import peft
import torch
import transformers

from adapters_store.errors import StoreError
from adapters_store.manifest import MANIFEST_NAME
from adapters_store.strict_json import Json, canonical_json
from serve.trainer.checkpoints import file_digest
from serve.trainer.data import Data
from serve.trainer.progress import NamedAdapter, TrainingFailed, TrainingRun

PROVENANCE_NAME = "provenance.json"
_MAX_CURVE = 500


def job_facts(job: TrainingRun, data: Data, fingerprint: str) -> dict[str, Json]:
    """Return what determines the result; `job.spec` is resolved."""
    return {
        "version": 1,
        "base": {"name": job.base.name, "weights_fingerprint": fingerprint},
        "data": {
            "train_sha256": data.summary.sha256,
            "valid_sha256": data.valid_sha256,
            "num_examples": data.summary.num_examples,
            "num_train_rows": len(data.train),
            "num_valid_rows": len(data.valid),
            "num_cut": data.num_cut,
        },
        "parent": job.parent,
        "experts": _named(job.experts),
        "disjoint_with": _named(job.disjoint_with),
        "hyper_parameters": job.spec.to_json(),
        "seed": job.spec.seed,
        "code_version": job.code_version,
        "libraries": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "accelerate": accelerate.__version__,
        },
        "device": job.device.partition(":")[0],
        "num_threads": torch.get_num_threads(),
    }


def job_digest(facts: dict[str, Json]) -> str:
    """Return the job's identity: a resume point of another identity is not loaded."""
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def thinned(curve: Sequence[Json]) -> list[Json]:
    """Return at most 500 points of a curve, evenly spaced, first and last among them."""
    if len(curve) <= _MAX_CURVE:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (_MAX_CURVE - 1))] for i in range(_MAX_CURVE)]


def _named(adapters: Sequence[NamedAdapter]) -> list[Json]:
    """Return names with digests, which are the hashes of the manifests; raises TrainingFailed."""
    try:
        return [
            {"name": each.name, "digest": f"sha256:{file_digest(each.folder / MANIFEST_NAME)}"} for each in adapters
        ]
    except (OSError, StoreError) as error:
        raise TrainingFailed("bad_expert", "an adapter that the job names is not at hand") from error
