"""Names with their owner, as the store keeps them, and quotas counted by owner, on a real store without HTTP."""

from pathlib import Path

import pytest

from adapters_store.errors import InvalidName, OwnerFull
from adapters_store.names import check_stored_name, owner_of, parse_selector
from adapters_store.quotas import OwnerQuota
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder


@pytest.mark.parametrize(
    "stored",
    [
        "/poet",
        "acme/",
        "Acme/poet",
        "a_b/poet",
        "a/b/poet",
        "../poet",
        "acme/../poet",
        "acme//poet",
        "acme/base",
        "acme/base:x",
        "*/poet",
        "-a/poet",
        "acme/poet.",
        "acme /poet",
        "acme/\n",
        f"{'x' * 64}/poet",
    ],
)
def test_names_that_nobody_can_have(stored: str) -> None:
    with pytest.raises(InvalidName):
        check_stored_name(stored, "base")


def test_names_with_and_without_an_owner() -> None:
    for stored, owner in (("poet", ""), ("acme/poet", "acme"), ("acme/poet:draft", "acme"), ("a-1/p.q_r-s", "a-1")):
        check_stored_name(stored, "base")
        assert owner_of(stored) == owner
    selector = parse_selector(f"{'x' * 63}/{'y' * 128}@3")
    assert selector is not None and selector.version == 3


def test_the_operator_publishes_for_a_tenant_and_bounds_are_each_owners(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter", lora_config(), lora_tensors())
    store = open_store(tmp_path / "store", served_name="base")
    try:
        store.quota = OwnerQuota(max_adapters=1)
        for name in ("poet", "acme/poet", "bob/poet"):
            assert store.put_dir(name, folder).name == name
        for name in ("clerk", "acme/clerk", "bob/clerk"):
            with pytest.raises(OwnerFull, match="the limit is 1"):
                store.put_dir(name, folder)
        assert [version.name for version in store.list()] == ["acme/poet", "bob/poet", "poet"]
        # not even an object or a staging folder is left of what was refused
        assert len(list((tmp_path / "store" / "objects").iterdir())) == 1
        assert not list((tmp_path / "store" / "staging").iterdir())
        store.delete("acme/poet")
        assert store.put_dir("acme/clerk", folder).version == 1
    finally:
        store.close()
