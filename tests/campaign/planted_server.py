"""`chorale` with one bug: `python -m tests.campaign.planted_server serve ...`; the environment names it.

Owns the plants of the API's side, and that the engine process is the planted one. Invariant: a plant changes one
decision and leaves the rest as it is.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from adapters_store.canary import StickyId
from adapters_store.store import AdapterRef, AdapterStore
from adapters_store.upload import Upload
from serve.api.target import Acts, Target
from serve.cli import serve_command
from serve.cli.app import app
from serve.cli.server import run_server
from tests.campaign.planting import chosen_plant, put


def _version_mixed_up_in_flight() -> None:
    acts_on = Target.acts_on
    # what the last request of this name ran on: refreshed behind the answer
    digests: dict[str, str] = {}

    def wrong(self: Target, prompt_ids: list[int]) -> Acts:
        acts = acts_on(self, prompt_ids)
        if acts.adapter_digest is None or "@" in self.model:
            return acts
        stale = digests.get(self.model, acts.adapter_digest)
        digests[self.model] = acts.adapter_digest
        return Acts(stale)

    put(Target, "acts_on", wrong)


def _deleted_name_still_answers() -> None:
    resolve = AdapterStore.resolve
    known: dict[str, AdapterRef] = {}

    def wrong(self: AdapterStore, model: str, sticky: StickyId | None = None) -> AdapterRef | None:
        found = resolve(self, model, sticky)
        if found is not None:
            known[model] = found
        return known.get(model)

    put(AdapterStore, "resolve", wrong)


def _replacement_seen_late() -> None:
    resolve = AdapterStore.resolve
    known: dict[str, AdapterRef] = {}

    def wrong(self: AdapterStore, model: str, sticky: StickyId | None = None) -> AdapterRef | None:
        before, now = known.get(model), resolve(self, model, sticky)
        if now is not None:
            known[model] = now
        return before if before is not None and now is not None else now

    put(AdapterStore, "resolve", wrong)


def _upload_leaves_its_staging() -> None:
    put(Upload, "close", lambda self: None)


API_PLANTS: Mapping[str, Callable[[], None]] = MappingProxyType(
    {
        "version mixed up in flight": _version_mixed_up_in_flight,
        "deleted name still answers": _deleted_name_still_answers,
        "replacement seen late": _replacement_seen_late,
        "upload leaves its staging": _upload_leaves_its_staging,
    }
)

if __name__ == "__main__":
    API_PLANTS.get(chosen_plant(), lambda: None)()
    put(serve_command, "run_server", partial(run_server, worker_module="tests.campaign.planted_engine"))
    app()
