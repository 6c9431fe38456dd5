"""The audit log under tampering, torn writes and several writers; the finder has to catch every planted change."""

import json
import os
import random
import threading
from pathlib import Path

import pytest

from serve.errors import Unavailable
from serve.tenants.audit import AuditEvent, AuditLog, digest_of, verify

NUM_RECORDS = 10_000


def write_log(path: Path, count: int) -> list[bytes]:
    log = AuditLog(path, clock=lambda: 1000.0)
    for number in range(count):
        log.append(AuditEvent.UPLOAD, tenant="acme", key_id="k1", subject=f"adapter-{number}")
    return path.read_bytes().splitlines(keepends=True)


def long_log(count: int) -> list[bytes]:
    """Return a log without the cost of syncing each record, by the definition of a record."""
    lines, previous = [], "0" * 64
    for number in range(1, count + 1):
        record: dict[str, str | int] = {
            "number": number,
            "time": 1000 + number // 7,
            "event": "upload" if number % 3 else "delete",
            "tenant": f"t{number % 11}",
            "key": "k",
            "subject": f"adapter-{number % 100}",
            "detail": "",
            "previous": previous,
        }
        record["digest"] = previous = digest_of(record)
        lines.append(json.dumps(record).encode() + b"\n")
    return lines


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return long_log(NUM_RECORDS)


def test_a_written_log_is_whole_and_is_what_the_definition_says(tmp_path: Path) -> None:
    written = write_log(tmp_path / "audit.jsonl", 20)
    assert verify(written) is None
    assert json.loads(written[3])["subject"] == "adapter-3" and json.loads(written[3])["number"] == 4
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_long_log_is_whole(lines: list[bytes]) -> None:
    assert verify(lines) is None
    assert verify(lines, head=json.loads(lines[-1])["digest"]) is None


def tampered(lines: list[bytes], chosen: random.Random) -> tuple[int, list[bytes]]:
    """Change one record in one of the ways there are; return the first line that is wrong, and the log around it."""
    index = chosen.randrange(len(lines) - 1)
    record = json.loads(lines[index])
    kind = chosen.choice(["flip", "field", "resigned", "removed", "swapped", "doubled", "moved", "spaced", "key"])
    result = list(lines)
    if kind == "flip":
        damaged = bytearray(lines[index])
        damaged[chosen.randrange(len(damaged) - 1)] ^= 1 << chosen.randrange(7)
        result[index] = bytes(damaged)
    elif kind == "field":
        field = chosen.choice(["time", "event", "tenant", "key", "subject", "detail"])
        record[field] = 7 if field == "time" else f"{record[field]}x"
        result[index] = json.dumps(record).encode() + b"\n"
    elif kind == "resigned":
        # the forger computes the record's own digest anew; the next record still names the old one
        record["subject"] = "forged"
        record["digest"] = digest_of(record)
        result[index] = json.dumps(record).encode() + b"\n"
        return index + 2, result
    elif kind == "removed":
        del result[index]
    elif kind == "swapped":
        result[index], result[index + 1] = result[index + 1], result[index]
    elif kind == "doubled":
        result.insert(index, result[index])
        return index + 2, result
    elif kind == "moved":
        target = chosen.choice([place for place in range(len(lines)) if abs(place - index) > 1])
        result.insert(target, result.pop(index))
        return min(index, target) + 1, result
    elif kind == "spaced":
        result[index] = lines[index].replace(b": ", b":", 1)
    else:
        record["extra"] = "x"
        result[index] = json.dumps(record).encode() + b"\n"
    return index + 1, result


def test_every_tampering_is_found_where_it_is(lines: list[bytes]) -> None:
    chosen = random.Random(1)
    # a chain's beginning is a chain
    for _ in range(400):
        expected, changed = tampered(lines[:40], chosen)
        broken = verify(changed)
        assert broken is not None and broken.line == expected, broken


def test_any_one_record_of_ten_thousand_altered_removed_or_moved_is_found(lines: list[bytes]) -> None:
    chosen = random.Random(2)
    for _ in range(6):
        expected, changed = tampered(lines, chosen)
        broken = verify(changed)
        assert broken is not None and broken.line == expected


@pytest.mark.slow
def test_each_record_of_a_log_altered_removed_and_swapped_is_found(lines: list[bytes]) -> None:
    whole = lines[:600]
    for index in range(len(whole) - 1):
        record = json.loads(whole[index]) | {"subject": "forged"}
        forged = json.dumps(record | {"digest": digest_of(record)}).encode() + b"\n"
        altered = [*whole[:index], forged, *whole[index + 1 :]]
        removed = [*whole[:index], *whole[index + 1 :]]
        swapped = [*whole[:index], whole[index + 1], whole[index], *whole[index + 2 :]]
        assert [broken.line - index if (broken := verify(log)) else None for log in (altered, removed, swapped)] == [
            2,
            1,
            1,
        ]


def test_a_cut_end_is_found_with_the_head_alone(lines: list[bytes]) -> None:
    head = json.loads(lines[99])["digest"]
    assert verify(lines[:100], head=head) is None
    assert verify(lines[:99]) is None
    broken = verify(lines[:99], head=head)
    assert broken is not None and broken.reason == "the end is missing"
    assert verify([], head=head) is not None


def test_half_a_record_of_a_writer_that_died_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written = write_log(path, 3)
    path.write_bytes(b"".join(written) + written[0][:50])
    AuditLog(path, clock=lambda: 1.0).append(AuditEvent.DELETE, tenant="a", key_id="k", subject="s")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 and verify(lines) is None
    path.write_bytes(written[0][:50])
    assert len(write_log(path, 2)) == 2


def test_a_damaged_last_record_stops_the_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for damage in (b"{}\n", b"null\n", b"\xff\n", b'{"number": 1}\n'):
        path.write_bytes(damage)
        with pytest.raises(Unavailable) as caught:
            write_log(path, 1)
        assert caught.value.code == "audit_unavailable" and path.read_bytes() == damage


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    before = write_log(path, 2)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:20]))
    with pytest.raises(Unavailable):
        write_log(path, 1)
    monkeypatch.undo()
    assert path.read_bytes() == b"".join(before)
    assert verify(write_log(path, 1)) is None


def test_several_writers_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    threads = [threading.Thread(target=write_log, args=(path, 25)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 100 and verify(lines) is None


def test_hostile_names_stay_in_their_line_and_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, clock=lambda: 1.0)
    for subject in ("a\nb", "\x1b[31m", "x" * 10_000, "\u2028", "\ud800"):
        log.append(AuditEvent.DENIED, tenant="a", key_id="k", subject=subject)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5 and verify(lines) is None and max(map(len, lines)) < 1000
