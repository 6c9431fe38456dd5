"""Data files from strangers: every bad line is named with its number, nothing is read at once, nothing runs long.

Owns the hostile lines. Invariant: a file is refused as a whole, with at most ten lines named and the rest counted.
"""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from adapters_store.jobs.jsonl import DataLimits, examples, scan
from adapters_store.jobs.refusals import InvalidData

GOOD = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Ho"}]}'
PLAIN = b'{"prompt":"Hi","completion":"Ho"}'


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(end.join(lines) + end)
    return path


def chat(**answer: object) -> bytes:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", **answer}]
    return json.dumps({"messages": messages}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'"text"', "one JSON object"),
        (b"{", "not valid JSON"),
        (b'{"prompt":"\xff","completion":"x"}', "UTF-8"),
        (b'{"prompt":NaN,"completion":"x"}', "NaN is not a JSON number"),
        (b'{"prompt":1e999,"completion":"x"}', "out of range"),
        (b'{"prompt":"a","prompt":"b","completion":"x"}', "appears twice"),
        (b'{"prompt":"a","completion":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b'{"prompt":"a","completion":' + b"[" * 100_000, "nested deeper"),
        (b'{"prompt":"a","completion":"\\ud800"}', "surrogate"),
        (b'{"prompt":"a"}', "completion must be a string"),
        (b'{"prompt":"a","completion":""}', "nothing to learn"),
        (b'{"prompt":"a","completion":"b","image":"http://x"}', "unknown key"),
        (b'{"messages":[]}', "a list of 1"),
        (b'{"messages":{"role":"user"}}', "a list of 1"),
        (b'{"messages":[{"role":"user","content":"x"}]}', "nothing to learn"),
        (b'{"messages":[{"role":"wizard","content":"x"}]}', "role is 'wizard'"),
        (b'{"messages":[{"role":"assistant","content":7}]}', "must be a string"),
        (chat(weight=0), "nothing to learn"),
        (chat(weight=0.5), "must be 0 or 1"),
        (chat(weight=True), "must be 0 or 1"),
        (chat(path="/etc/passwd"), "unknown key 'path'"),
        (chat(task=""), "name of an expert"),
        (chat(content=[]), "1 to"),
        (chat(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]), "of type text"),
        (chat(tool_calls={"x": "\ud800"}), "must be a list|surrogate"),
        (gzip.compress(GOOD, mtime=0)[:20], "UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=reason) as refusal:
        scan(write(tmp_path / "x.jsonl", GOOD, b"", line))
    assert [number for number, _ in refusal.value.errors] == [3]
    assert refusal.value.total == 1
    assert refusal.value.http_status == 400
    assert str(tmp_path) not in refusal.value.message


def test_ten_bad_lines_are_named_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"25 bad lines.*and 15 more") as refusal:
        scan(write(tmp_path / "x.jsonl", GOOD, *[b"{"] * 25))
    assert [number for number, _ in refusal.value.errors] == list(range(2, 12))


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="is a completion example; the lines before are chat"):
        scan(write(tmp_path / "x.jsonl", GOOD, PLAIN))


def test_a_file_without_examples_and_one_with_too_many_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="0 examples"):
        scan(write(tmp_path / "x.jsonl", b"", b"  "))
    with pytest.raises(InvalidData, match="more than 3 examples"):
        scan(write(tmp_path / "x.jsonl", *[GOOD] * 4), DataLimits(max_examples=3))
    with pytest.raises(InvalidData, match="larger than 100 bytes"):
        scan(write(tmp_path / "x.jsonl", *[GOOD] * 4), DataLimits(max_bytes=100))


def test_carriage_returns_end_lines_and_line_separators_do_not(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl", GOOD, '{"messages":[{"role":"assistant","content":"a\u2028b"}]}'.encode(), end=b"\r\n"
    )
    summary = scan(path)
    assert (summary.num_examples, summary.kind) == (2, "chat")
    assert summary.num_bytes == path.stat().st_size
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [example.messages[-1].fields["content"] for example in examples(path)] == ["Ho", "a\u2028b"]


def test_one_huge_line_costs_no_more_memory_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n" + b'{"prompt":"')
        for _ in range(64):
            file.write(b"a" * (1 << 20))
        file.write(b'","completion":"x"}\n' + GOOD)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidData, match="line 2: is longer than 1048576 bytes") as refusal:
            scan(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refusal.value.total == 1
    assert peak < 12 << 20


def test_labels_of_tasks_are_counted(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a", "task": "one"}, {"type": "text", "text": "b", "task": "two"}]
    path = write(tmp_path / "x.jsonl", GOOD, chat(task="two"), chat(content=parts))
    summary = scan(path)
    assert (summary.tasks, summary.num_labelled) == (("two", "one"), 2)
