"""What a registry remembers of a version beyond its name and digest, also in a file from before it knew of it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from adapters_store.manifest import Report
from adapters_store.registry import AdapterVersion, NewVersion
from adapters_store.registry_sqlite import SqliteRegistry
from adapters_store.strict_json import Json

PROOF: dict[str, Json] = {"agrees": True, "max_error": 1e-6, "prompts": [[1, 2], [3]]}
NEW = NewVersion(
    name="fr",
    digest="a" * 64,
    family="lora",
    rank=4,
    num_bytes=100,
    created=1,
    base={"model_type": "llama"},
    report=Report(applied=("layers.0.mlp.up_proj",), ignored=(), missing=()),
    dtype="float32",
    num_virtual_tokens=8,
    invocation_tokens=(5, 7),
    proof=PROOF,
)


def test_proof_and_tokens_come_back_after_a_restart(tmp_path: Path) -> None:
    with closing(SqliteRegistry(tmp_path / "registry.sqlite")) as registry:
        published = registry.publish(NEW)
    with closing(SqliteRegistry(tmp_path / "registry.sqlite")) as registry:
        assert registry.current("fr") == published == registry.versions("fr")[0]
    assert (published.num_virtual_tokens, published.invocation_tokens, published.proof) == (8, (5, 7), PROOF)
    assert published.report == NEW.report


def test_versions_of_an_older_registry_have_no_proof_and_say_why(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with closing(SqliteRegistry(path)) as registry:
        registry.publish(NEW)
    _forget_newer_facts(path)
    with closing(SqliteRegistry(path)) as registry:
        version = registry.current("fr")
        assert isinstance(version, AdapterVersion)
        assert (version.num_virtual_tokens, version.invocation_tokens, version.proof) == (0, (), None)
        assert "before adapters were probed" in version.not_probed
        assert version.report.refused == () and version.digest == NEW.digest
        assert registry.publish(NEW).version == 2


def _forget_newer_facts(path: Path) -> None:
    """Write the row as the server did before it probed adapters."""
    with closing(sqlite3.connect(path)) as db:
        facts = json.loads(db.execute("SELECT facts FROM versions").fetchone()[0])
        for key in ("num_virtual_tokens", "invocation_tokens", "proof", "not_probed"):
            del facts[key]
        del facts["report"]["refused"]
        db.execute("UPDATE versions SET facts = ?", (json.dumps(facts),))
        db.commit()
