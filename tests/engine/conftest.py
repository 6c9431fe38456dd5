"""The two ways an engine is driven: one step at a time, and with a second step submitted behind the first."""

import pytest

from tests.engine.bench import EngineBench


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def both_modes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test once with each kind of executor in its benches."""
    monkeypatch.setattr(EngineBench, "is_async", request.param)
