"""Documents from real files, good and bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from tailkd.data import corpus
from tailkd.data.corpus import BadRecords, Source
from tailkd.errors import Refusal


def read(source: Source) -> tuple[list[str], BadRecords]:
    bad = BadRecords()
    return [document.text for document in source.documents(bad)], bad


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    texts = ["first text", "zweiter Text äöü", "third\nwith a line"]
    rows = [{"body": text, "n": n} for n, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "text", "text/*.txt"):
        assert read(Source(path=str(tmp_path / name), text="body")) == (texts, BadRecords()), name
    assert len(read(Source(path=str(tmp_path), text="body"))[0]) == 12


def test_ids_are_stable_and_hashes_are_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": "one"}\n')
    documents = list(Source(path=str(path)).documents(BadRecords()))
    assert [d.id for d in documents] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert documents[0].hash == documents[2].hash != documents[1].hash


BAD = {
    "null": (b'{"text": null}', "field 'text' is not text but null"),
    "int": (b'{"text": 5}', "field 'text' is not text but int"),
    "list": (b'{"text": ["a"]}', "field 'text' is not text but list"),
    "missing key": (b'{"body": "a", "n": 1}', "no field 'text'; it has 'body', 'n'"),
    "invalid UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800"}', "lone surrogate"),
    "cut off": (b'{"text": "a', "not JSON (the line is cut off)"),
    "NUL": (b'{"text": "a\\u0000b"}', "NUL character"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "duplicate key"),
    "not an object": (b'["text"]', "not an object"),
    "blank": (b'{"text": " \\n "}', "empty text"),
    "NaN": (b'{"text": NaN}', "field 'text' is not text but float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_counted_and_named(name: str, tmp_path: Path) -> None:
    line, reason = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line)
    texts, bad = read(Source(path=str(path)))
    assert texts == ["good"]
    assert bad.total == 1
    assert bad.named == [f"{path}:2: {reason}"]


def test_bom_crlf_and_long_records_are_good(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = "x" * 10_000_000
    path.write_bytes(b'\xef\xbb\xbf{"text": "bom"}\r\n{"text": "crlf"}\r\n' + json.dumps({"text": long}).encode())
    assert read(Source(path=str(path))) == (["bom", "crlf", long], BadRecords())


def test_only_the_first_bad_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * 50)
    bad = read(Source(path=str(tmp_path / "a.jsonl")))[1]
    assert bad.counts == {"no field 'text'": 50}
    assert len(bad.named) == corpus.NAMED


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no file at"):
        read(Source(path=str(tmp_path / "nothing.jsonl")))
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(Refusal, match="not a readable parquet file"):
        read(Source(path=str(tmp_path / "a.parquet")))


def test_hub_data_sets_go_through_datasets(tmp_path: Path) -> None:
    """The real loader, on a data set folder instead of a hub id."""
    (tmp_path / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert read(Source(hub=str(tmp_path), text="body"))[0] == ["one", "two"]
    with pytest.raises(Refusal, match=r"data set 'nobody/nothing' \(config None, split 'train'\) could not be read"):
        read(Source(hub="nobody/nothing"))


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    first = Source(path=str(path)).fingerprint()
    assert Source(path=str(path)).fingerprint() == first
    assert Source(path=str(path), text="body").fingerprint() != first
    path.write_text('{"text": "two"}\n')
    assert Source(path=str(path)).fingerprint() != first
