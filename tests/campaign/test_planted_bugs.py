"""The campaign sees bugs: each one planted into the real server is caught by the very same check, and named rightly."""

import re
from pathlib import Path

import pytest

from tests.campaign.budgets import budget_options
from tests.campaign.campaign import Scale, run_campaign
from tests.campaign.planted_engine import ENGINE_PLANTS
from tests.campaign.planted_server import API_PLANTS
from tests.campaign.planting import PLANT_VARIABLE

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

_WRONG_TOKENS = r"tokens \[.*\], alone \["
# what the campaign must say: to be caught for another reason is not to be caught
COMPLAINTS = {
    "digest missing from the KV key": _WRONG_TOKENS,
    "pin released early": rf"{_WRONG_TOKENS}|status 500|engine was lost",
    "extent freed twice": _WRONG_TOKENS,
    "abort keeps the pin": r"chorale_adapter_pins is|chorale_adapters_resident",
    "abort keeps the blocks": r"chorale_kv_blocks_in_use is|status 500",
    "bytes not given back": r"bytes of adapters came into the device tier, 0.0 went",
    "block freed twice": rf"{_WRONG_TOKENS}|status 500|engine was lost",
    "version mixed up in flight": _WRONG_TOKENS,
    "deleted name still answers": r"not current",
    "replacement seen late": r"not current",
    "upload leaves its staging": r"num_staged was",
}


def _small(module: str) -> Scale:
    options = (*budget_options(num_host=12, num_device=6), "--max-num-seqs", "32")
    return Scale(
        num_adapters=24,
        num_requests=400,
        num_clients=32,
        num_warm_up=96,
        changes_every=40,
        server_options=options,
        # where no adapter can leave any more, whoever asks for another waits for ever
        answer_timeout_s=20.0,
        # what leaks never comes to rest
        rest_timeout_s=10.0,
        module=module,
    )


def test_every_plant_has_its_complaint() -> None:
    assert COMPLAINTS.keys() == ENGINE_PLANTS.keys() | API_PLANTS.keys()


def test_the_planted_server_without_a_bug_is_clean(tmp_path: Path) -> None:
    assert run_campaign(tmp_path, _small("tests.campaign.planted_server")).complaints == []


@pytest.mark.parametrize("plant", [*COMPLAINTS])
def test_a_planted_bug_is_caught(plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLANT_VARIABLE, plant)
    complaints = run_campaign(tmp_path, _small("tests.campaign.planted_server")).complaints
    assert any(re.search(COMPLAINTS[plant], complaint) for complaint in complaints), complaints[:10]
