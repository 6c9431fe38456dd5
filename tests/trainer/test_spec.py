"""A job's hyper-parameters: what is not in the white list or beyond its cap is refused by name, the rest round-trips.

Owns the hostile values. Invariant: no accepted spec holds a path or an address.
"""

import json
from pathlib import Path

import pytest

from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json

HOSTILE: list[tuple[str, dict[str, Json]]] = [
    ("max_steps", {"max_steps": 10**9}),
    ("learning_rate", {"learning_rate": 1e30}),
    ("learning_rate", {"learning_rate": float("nan")}),
    ("learning_rate", {"learning_rate": float("inf")}),
    ("learning_rate", {"learning_rate": 10**400}),
    ("learning_rate", {"learning_rate": 0}),
    ("learning_rate", {"learning_rate": "1e-3"}),
    ("learning_rate_multiplier", {"learning_rate_multiplier": -1}),
    ("rank", {"rank": 4096}),
    ("rank", {"rank": 0}),
    ("rank", {"rank": True}),
    ("rank", {"rank": 8.0}),
    ("rank", {"rank": 10**5000}),
    ("batch_size", {"batch_size": 10**6}),
    ("max_length", {"max_length": 10**7}),
    ("n_epochs", {"n_epochs": 51}),
    ("seed", {"seed": -1}),
    ("resume_from_checkpoint", {"resume_from_checkpoint": "/etc"}),
    ("output_dir", {"output_dir": "/"}),
    ("report_to", {"report_to": "all"}),
    ("deepspeed", {"deepspeed": "/etc/passwd"}),
    ("dataset_script", {"dataset_script": "os"}),
    ("target_modules", {"target_modules": "(a+)+$"}),
    ("target_modules", {"target_modules": ["q_proj", "q_proj"]}),
    ("target_modules", {"target_modules": [["q_proj"]]}),
    ("family", {"family": "full"}),
    ("init", {"init": "__import__('os')"}),
    ("dtype", {"dtype": "float8"}),
    ("use_dora", {"use_dora": 1}),
    ("use_dora", {"use_dora": True, "init": "pissa"}),
    ("dtype", {"init": "pissa", "dtype": "bfloat16"}),
    ("packing", {"family": "prompt", "packing": True}),
    ("selection", {"family": "lora", "selection": "weight"}),
    ("rank", {"family": "ia3", "rank": 8}),
    ("ratio", {"family": "s2ft", "ratio": 0.5}),
    ("ratio", {"family": "s2ft", "ratio": 0.1, "channels": 4}),
    ("channels", {"family": "s2ft", "channels": [-1]}),
    ("target_modules", {"family": "s2ft", "target_modules": ["q_proj"]}),
    ("experts", {"family": "meteora"}),
    ("experts", {"family": "meteora", "experts": ["a"]}),
    ("experts", {"family": "meteora", "experts": ["a", "a"]}),
    ("experts", {"family": "meteora", "experts": ["a", "../../etc/passwd"]}),
    ("experts", {"family": "meteora", "experts": ["a", 7]}),
    ("top_k", {"family": "meteora", "experts": ["a", "b"], "top_k": 3}),
    ("learning_rate", {"learning_rate": 1e-3, "learning_rate_multiplier": 2}),
    ("experts", {"family": "meteora", "experts": ["a@1", "a@2"]}),
    ("early_stopping", {"early_stopping": 2}),
]


@pytest.mark.parametrize(("param", "given"), HOSTILE, ids=[f"{param}-{i}" for i, (param, _) in enumerate(HOSTILE)])
def test_a_hostile_value_is_refused_by_its_name(param: str, given: dict[str, Json]) -> None:
    with pytest.raises(InvalidJob) as refusal:
        TrainSpec.parse(given)
    assert refusal.value.param == param
    assert refusal.value.http_status == 400
    assert len(refusal.value.message) < 1000


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"family": "lora", "rank": 8, "alpha": 16, "target_modules": ["v_proj", "q_proj"], "use_rslora": True},
        {"family": "s2ft", "selection": "activation-small", "channels": [4, 0, 8], "disjoint_with": ["team/a@3"]},
        {"family": "meteora", "experts": ["a", "b", "c@sha256:" + "0" * 64], "top_k": 1},
        {"family": "prompt", "num_virtual_tokens": 4, "eval_every": 5, "early_stopping": 2},
    ],
)
def test_a_spec_survives_json(given: dict[str, Json]) -> None:
    spec = TrainSpec.parse(given)
    assert TrainSpec.parse(json.loads(json.dumps(spec.to_json()))) == spec
    resolved = spec.resolved(100)
    # a resolved learning rate replaces the multiplier it came from
    assert TrainSpec.parse(json.loads(json.dumps(resolved.to_json()))).resolved(100) == resolved


def test_auto_follows_the_size_of_the_data() -> None:
    auto = TrainSpec.parse({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"})
    small, large = auto.resolved(20), auto.resolved(50_000)
    assert (small.n_epochs, small.batch_size) == (25, 1)
    assert (large.n_epochs, large.batch_size) == (1, 32)
    assert small.learning_rate == large.learning_rate == 2e-4
    assert TrainSpec.parse({"n_epochs": 3, "learning_rate_multiplier": 0.5}).resolved(20).learning_rate == 1e-4


def test_a_spec_names_no_file(tmp_path: Path) -> None:
    strings = [value for value in TrainSpec().to_json().values() if isinstance(value, str)]
    assert not any("/" in value for value in strings)
