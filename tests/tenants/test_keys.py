"""The text of keys and what is kept of them: strangers' text, mistyped keys, the hash, scopes and tenants."""

import hashlib
import hmac
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import InvalidValue
from serve.tenants.keys import KeyRecord, key_text, mac_of, matches, mint, parse_key
from serve.tenants.principal import Scope, check_tenant, local_principal, parse_scopes

PEPPER = b"p" * 32
# the same in every process that collects these tests
SECRET = "0f1e2d3c4b5a6978" * 4
KEY = key_text("0123456789abcdef", SECRET)
RECORD = KeyRecord("0123456789abcdef", "acme", frozenset({Scope.INFER}), mac_of(SECRET, PEPPER), created=1000)
HEX = st.text("0123456789abcdef", min_size=0, max_size=80)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pk_",
        KEY[:-1],
        KEY + "0",
        KEY + "\n",
        f" {KEY}",
        KEY.upper(),
        KEY.replace("pk_", "sk_"),
        KEY.replace("_", "-"),
        KEY.replace("_", "__"),
        KEY + "\0",
        "pk_" + "0" * 16 + "_" + "0" * 72,
        "' OR '1'='1",
        "𝟶" * 92,
    ],
    ids=itertools.count(),
)
def test_what_is_no_key_is_not_read(text: str) -> None:
    assert parse_key(text) is None


@given(st.text(max_size=120))
def test_strangers_text_is_never_a_key_and_never_an_error(text: str) -> None:
    assert parse_key(text) is None or key_text(*_halves(text)) == text


@given(key_id=st.text("0123456789abcdef", min_size=16, max_size=16), secret=st.binary(min_size=32, max_size=32))
def test_a_key_is_read_back(key_id: str, secret: bytes) -> None:
    parsed = parse_key(key_text(key_id, secret.hex()))
    assert parsed is not None and (parsed.key_id, parsed.secret) == (key_id, secret.hex())


@settings(max_examples=200)
@given(position=st.integers(3, len(KEY) - 1), digit=st.sampled_from("0123456789abcdef_"))
def test_one_wrong_character_is_always_seen(position: int, digit: str) -> None:
    mistyped = KEY[:position] + digit + KEY[position + 1 :]
    assert (parse_key(mistyped) is None) is (mistyped != KEY)


@given(st.integers(3, len(KEY) - 2))
def test_two_swapped_characters_are_always_seen(position: int) -> None:
    swapped = KEY[:position] + KEY[position + 1] + KEY[position] + KEY[position + 2 :]
    assert (parse_key(swapped) is None) is (swapped != KEY)


def test_the_secret_is_256_bits_and_only_its_hmac_is_kept() -> None:
    text, record = mint("acme", frozenset({Scope.INFER}), PEPPER, now=1000, expires=None)
    _, key_id, rest = text.split("_")
    secret = rest[:64]
    assert len(bytes.fromhex(secret)) == 32 and record.key_id == key_id
    assert record.mac == hmac.new(PEPPER, secret.encode(), hashlib.sha256).digest()
    assert secret not in repr(record) and secret not in repr(record.mac.hex())


def test_two_keys_are_never_the_same() -> None:
    made = {mint("acme", frozenset({Scope.INFER}), PEPPER, now=0, expires=None)[0] for _ in range(100)}
    assert len(made) == 100


def test_a_secret_matches_its_own_record_and_pepper_alone() -> None:
    parsed = parse_key(KEY)
    assert parsed is not None
    other, _ = mint("acme", frozenset({Scope.INFER}), PEPPER, now=0, expires=None)
    wrong = parse_key(other)
    assert wrong is not None
    assert matches(RECORD, parsed.secret, PEPPER)
    assert not matches(RECORD, wrong.secret, PEPPER)
    assert not matches(RECORD, parsed.secret, b"q" * 32)
    assert not matches(None, parsed.secret, PEPPER)


def test_an_unknown_id_costs_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    matches(RECORD, "0" * 64, PEPPER)
    matches(None, "0" * 64, PEPPER)
    assert len(compared) == 2 and len({len(side) for pair in compared for side in pair}) == 1


@pytest.mark.parametrize("name", ["", "Acme", "-a", "a-", "a_b", "a/b", "a b", "a\n", "x" * 64, "..", "ä", "*"])
def test_names_that_no_tenant_has(name: str) -> None:
    with pytest.raises(InvalidValue, match="tenant name"):
        check_tenant(name)


def test_names_that_a_tenant_may_have() -> None:
    assert [check_tenant(name) for name in ("a", "acme", "team-7", "x" * 63)]


def test_scopes_are_known_by_name_or_refused() -> None:
    assert parse_scopes(["infer", "adapters:read"]) == {Scope.INFER, Scope.ADAPTERS_READ}
    for names in ([], ["infer", "root"], ["INFER"], [""]):
        with pytest.raises(InvalidValue) as caught:
            parse_scopes(names)
        assert "adapters:write" in caught.value.message


def test_admin_may_all_and_others_what_they_hold() -> None:
    admin = local_principal()
    assert all(admin.may(frozenset({scope})) for scope in Scope)
    reader = RECORD.principal()
    assert reader.may(frozenset({Scope.INFER, Scope.TRAIN})) and not reader.may(frozenset({Scope.TRAIN}))
    assert not reader.may(frozenset())


def _halves(text: str) -> tuple[str, str]:
    parsed = parse_key(text)
    assert parsed is not None
    return parsed.key_id, parsed.secret
