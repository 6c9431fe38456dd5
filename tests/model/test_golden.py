"""The real pretrained models: our greedy ids equal those that transformers gave."""

import json
from pathlib import Path

import pytest

from tests.model.paged_run import PagedRun, load

pytestmark = pytest.mark.shared_data


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260k-hf"])
def test_greedy_ids_equal_the_golden_ones(name: str, shared_data: Path) -> None:
    golden = json.loads((shared_data / "models" / "golden.json").read_text())["models"][name]["greedy"]
    decoder = load(shared_data / "models" / name)
    for case in golden:
        run = PagedRun(decoder)
        ids, chunk = [], case["prompt_ids"]
        for _ in case["greedy_ids"]:
            ids.append(int(run.step({0: chunk})[0][-1].argmax()))
            chunk = ids[-1:]
        assert ids == case["greedy_ids"]
