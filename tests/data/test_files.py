"""Files of every kind as they are published, and bad ones with the message a user sees."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from tailkd.data import files
from tailkd.data.corpus import Source
from tailkd.data.files import BadRecords, Hashes
from tailkd.errors import Refusal


def read(path: Path | str, text: str = "text") -> tuple[list[str], BadRecords]:
    bad = BadRecords()
    return [document.text for document in Source(path=str(path), text=text).documents(bad)], bad


def ids(path: Path, text: str = "text") -> list[str]:
    return [document.id for document in Source(path=str(path), text=text).documents(BadRecords())]


# ----- as they are published


def test_regmix_is_a_folder_of_jsonl_per_domain(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for domain in ("pile_cc", "arxiv", "github"):
            lines = [json.dumps({"text": f"{split} {domain} {n}"}) for n in range(2)]
            (tmp_path / split / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    expected = [f"train {domain} {n}" for domain in ("arxiv", "github", "pile_cc") for n in range(2)]
    assert read(tmp_path / "train") == (expected, BadRecords())
    assert read(tmp_path / "train" / "arxiv.jsonl")[0] == expected[:2]
    assert read(tmp_path / "valid" / "*.jsonl")[0][0] == "valid arxiv 0"


def test_openwebmath_is_parquet_of_which_one_column_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"url": f"https://a/{n}", "text": f"text {n}", "date": "2020-01-01", "metadata": json.dumps({"n": n})}
        for n in range(3000)
    ]
    (tmp_path / "data").mkdir()
    for number in range(2):
        half = rows[1500 * number : 1500 * (number + 1)]
        parquet.write_table(arrow.Table.from_pylist(half), tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    asked: list[Any] = []
    plain = parquet.ParquetFile.iter_batches

    def noted(self: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return plain(self, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    assert read(tmp_path / "data") == ([row["text"] for row in rows], BadRecords())
    assert asked == [["text"], ["text"]]
    assert ids(tmp_path / "data")[1500:1502] == [
        f"{tmp_path / 'data' / 'train-00001-of-00002.parquet'}:{n}" for n in (0, 1)
    ]


def test_orca_math_is_parquet_of_questions_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(3)]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert read(path, "question")[0] == [row["question"] for row in rows]
    assert read(path, "answer")[0] == [row["answer"] for row in rows]
    bad = read(path)[1]
    assert bad.named[0] == f"{path}:0: no field 'text'; it has 'question', 'answer'"


CAMEL = {
    "role_1": "Mathematician_RoleType.ASSISTANT",
    "topic;": "Algebra",
    "sub_topic": "Linear equations",
    "message_1": "Solve {} x = 1.",
    "message_2": "x = 1 / {}.",
}


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_camel_is_an_object_a_file_in_a_zip_or_a_folder(tmp_path: Path, zipped: bool, indent: int | None) -> None:
    objects = {
        f"math/{n:03}_001_001.json": json.dumps({k: v.format(n) for k, v in CAMEL.items()}, indent=indent)
        for n in (2, 1, 3)
    }
    if zipped:
        with zipfile.ZipFile(tmp_path / "math.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in objects.items():
                archive.writestr(name, content)
            archive.writestr("__MACOSX/math/._001_001_001.json", "resource fork")
            archive.writestr("math/README", "not data")
    else:
        (tmp_path / "math").mkdir()
        for name, content in objects.items():
            (tmp_path / name).write_text(content)
    path = tmp_path / ("math.zip" if zipped else "math")
    assert read(path, "message_2") == ([f"x = 1 / {n}." for n in (1, 2, 3)], BadRecords())
    assert read(path, "topic;")[0] == ["Algebra"] * 3
    first = f"{path}!math/001_001_001.json" if zipped else str(path / "001_001_001.json")
    assert ids(path, "message_1")[0] == first + ("" if indent else ":1")


# ----- JSON


@pytest.mark.parametrize("packed", [False, True])
def test_a_json_file_is_lines_an_object_or_a_list(tmp_path: Path, packed: bool) -> None:
    rows = [{"text": "one"}, {"text": "zwei\nüber Zeilen"}]
    contents = {
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "list": json.dumps(rows),
        "printed": json.dumps(rows, indent=1) + "\n",
        "bom": "\ufeff" + json.dumps(rows),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.json{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
        assert read(path) == ([row["text"] for row in rows], BadRecords()), name
    path = tmp_path / "object.json"
    path.write_text(json.dumps(rows[1], indent=2))
    assert read(path)[0] == [rows[1]["text"]]
    assert ids(path) == [str(path)]
    assert ids(tmp_path / f"list.json{'.gz' if packed else ''}")[1].endswith("[1]")


BAD = {
    "cut list": (b'[{"text": "a"},\n {"text": "b"}', "a.json: not JSON"),
    "cut object": (b'{\n "text": "a",\n', "a.json: not JSON"),
    "cut line": (b'{"text": "a', "a.json: not JSON (the line is cut off)"),
    "a number": (b"5", "a.json:1: not an object"),
    "numbers": (b"[5]", "a.json[0]: not an object"),
    "not UTF-8": (b'[{"text": "\xff"}]', "a.json: not UTF-8"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "a.json:1: duplicate key"),
    "null": (b'[{"text": null}]', "a.json[0]: field 'text' is not text but null"),
    "deep": (b"[" * 100_000, "a.json: not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_files_are_named(tmp_path: Path, name: str) -> None:
    content, expected = BAD[name]
    (tmp_path / "a.json").write_bytes(content)
    texts, bad = read(tmp_path / "a.json")
    assert not texts
    assert bad.named[0].removeprefix(f"{tmp_path}/").startswith(expected)


def test_bad_records_in_a_zip_are_named_by_file_and_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.jsonl", '{"text": "good"}\nnonsense\n')
        archive.writestr("c.txt", b"\xff")
    texts, bad = read(tmp_path / "a.zip")
    assert texts == ["good"]
    assert bad.named == [f"{tmp_path}/a.zip!b.jsonl:2: not JSON", f"{tmp_path}/a.zip!c.txt: not UTF-8"]


def test_archives_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    with pytest.raises(Refusal, match=r"a.zip is not a readable zip file \(File is not a zip file\); fetch or pack"):
        read(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("picture.png", b"")
    with pytest.raises(Refusal, match=r"b.zip holds no file of .jsonl, .ndjson, .json, .txt"):
        read(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("a.json", json.dumps({"text": "a" * 1000}))
    content = bytearray((tmp_path / "c.zip").read_bytes())
    content[500] ^= 1
    (tmp_path / "c.zip").write_bytes(content)
    with pytest.raises(Refusal, match=r"c.zip is not a readable zip file \(Bad CRC-32"):
        read(tmp_path / "c.zip")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(Refusal, match=r"d.jsonl.gz is not a readable gz file \(Compressed file ended"):
        read(tmp_path / "d.jsonl.gz")
    parquet.write_table(arrow.Table.from_pylist([{"text": "a"}] * 3000), tmp_path / "e.parquet")
    (tmp_path / "e.parquet").write_bytes((tmp_path / "e.parquet").read_bytes()[:-9])
    with pytest.raises(Refusal, match=r"e.parquet is not a readable parquet file"):
        read(tmp_path / "e.parquet")


# ----- hashes


def test_hashes_of_large_files_are_remembered_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 10)
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1.0)
    small, large, store = tmp_path / "small.txt", tmp_path / "large.txt", tmp_path / "store"
    small.write_text("small")
    large.write_text("larger than that")
    read_again: list[str] = []
    plain = files.file_hash

    def noted(path: Path) -> str:
        read_again.append(path.name)
        return plain(path)

    monkeypatch.setattr(files, "file_hash", noted)
    first = Hashes(store).of([small, large])
    assert first == [plain(small), plain(large)]
    assert Hashes(store).of([small, large]) == first
    assert sorted(read_again) == ["large.txt", "small.txt", "small.txt"]
    stamp = large.stat()
    large.write_text("larger than thai")
    os.utime(large, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert Hashes(store).of([large]) == [plain(large)] != first[1:]
    (store / "hashes.json").write_text("nonsense")
    assert Hashes(store).of([large]) == [plain(large)]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 1)
    (tmp_path / "a.txt").write_text("text")
    Hashes(tmp_path / "store").of([tmp_path / "a.txt"])
    assert not (tmp_path / "store").exists()
