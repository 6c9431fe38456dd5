"""Bugs planted into the counters of service, one at a time, to prove that the measured gaps see them.

Owns one small wrong replacement per bug. Invariant: a plant changes who is charged or lifted, and nothing else.
"""

import pytest

from serve.engine import admission, fairness
from serve.engine.virtual_tokens import Level, Payer, ServedTokens
from serve.messages import Embed, Submit
from tests.engine.planted_bugs import Plant


def _counter_not_lifted(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Level[str], key: str) -> None:
        self._tokens.setdefault(key, 0.0)
        self._num_waiting[key] += 1

    patch.setattr(Level, "join", wrong)


def _charged_to_the_wrong_tenant(patch: pytest.MonkeyPatch) -> None:
    charge = ServedTokens.charge

    def wrong(self: ServedTokens, payer: Payer, *, num_input: int = 0, num_output: int = 0, num_loads: int = 0) -> None:
        payer = payer._replace(tenant="t0") if num_output else payer
        charge(self, payer, num_input=num_input, num_output=num_output, num_loads=num_loads)

    patch.setattr(ServedTokens, "charge", wrong)


def _adapters_compete_as_tenants(patch: pytest.MonkeyPatch) -> None:
    of = Payer.of

    def wrong(command: Submit | Embed) -> Payer:
        payer = of(command)
        return payer._replace(tenant=f"{payer.tenant} {payer.adapters}")

    patch.setattr(Payer, "of", wrong)


def _output_not_charged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("serve.engine.virtual_tokens.OUTPUT_PRICE", 0)


def _input_not_charged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("serve.engine.virtual_tokens.INPUT_PRICE", 0)


def _weights_ignored(patch: pytest.MonkeyPatch) -> None:
    of = Payer.of
    patch.setattr(Payer, "of", lambda command: of(command)._replace(weight=1.0))


def _requests_counted_instead_of_tokens(patch: pytest.MonkeyPatch) -> None:
    charge = ServedTokens.charge

    def wrong(self: ServedTokens, payer: Payer, *, num_input: int = 0, num_output: int = 0, num_loads: int = 0) -> None:
        charge(self, payer, num_input=min(num_input, 1), num_loads=num_loads)

    patch.setattr(ServedTokens, "charge", wrong)


def _most_served_adapter_first(patch: pytest.MonkeyPatch) -> None:
    of_adapters = ServedTokens.of_adapters
    patch.setattr(ServedTokens, "of_adapters", lambda self, payer: -of_adapters(self, payer))


FAIRNESS_PLANTS: dict[str, Plant] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _counter_not_lifted,
        _charged_to_the_wrong_tenant,
        _adapters_compete_as_tenants,
        _output_not_charged,
        _input_not_charged,
        _weights_ignored,
        _requests_counted_instead_of_tokens,
        _most_served_adapter_first,
    )
}


def _passed_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(admission, "MAX_PASSES", 10**9)


def _most_served_tenant_first(patch: pytest.MonkeyPatch) -> None:
    of_tenant = ServedTokens.of_tenant
    patch.setattr(ServedTokens, "of_tenant", lambda self, tenant: -of_tenant(self, tenant))


def _latest_arrival_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fairness, "_rank", lambda seq: (not seq.was_admitted, -seq.arrival_index))


WAIT_PLANTS: dict[str, Plant] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _passed_for_ever,
        _most_served_tenant_first,
        _latest_arrival_first,
    )
}
