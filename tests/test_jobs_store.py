"""Is a finished row kept whole, once, and through whatever ends the process or fills the disk?"""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from graphengine.errors import ModelError, OutputError
from graphengine.jobs import journal, store
from graphengine.jobs.journal import Journal, read_lines, replacing
from graphengine.jobs.manifest import model_fingerprint, open_manifest
from graphengine.jobs.row_set import IdTable, RowSet
from graphengine.jobs.store import JsonlStore, ParquetStore, kept_type, parquet_schema


def record(index: int, *, error: str = "", **kept: Any) -> dict[str, Any]:
    return {
        "id": f"row-{index}",
        "row_index": index,
        **kept,
        "text": "é" * (index % 5),
        "finish_reason": "error" if error else "stop",
        "num_prompt_tokens": 3,
        "num_output_tokens": 2,
        "error": error,
    }


def check(found: dict[str, Any]) -> int:
    index = found["row_index"]
    assert isinstance(index, int)
    return index


def write(path: Path, indices: range) -> None:
    file = Journal(path)
    for index in indices:
        file.append(record(index))
    file.flush()
    file.close()


def indices(path: Path) -> list[int]:
    return [found["row_index"] for found in read_lines(path, check)]


@pytest.mark.parametrize("order", range(5))
def test_cut_anywhere_a_journal_keeps_its_whole_lines(tmp_path: Path, order: int) -> None:
    whole = tmp_path / "whole"
    write(whole, range(20))
    data = whole.read_bytes()
    rng = random.Random(order)
    for cut in rng.sample(range(len(data)), 60):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        num_whole = data[:cut].count(b"\n")
        assert indices(path) == list(range(num_whole))
        assert path.read_bytes() == b"".join(data.splitlines(keepends=True)[:num_whole])
        write(path, range(num_whole, 20))
        assert path.read_bytes() == data


@pytest.mark.parametrize("torn", [b"\0" * 500, b"\0" * 500 + b"\n", b'{"row_index": 1}\n', b"[]\n"])
def test_end_that_a_lost_power_supply_left_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(5))
    data = path.read_bytes()
    path.write_bytes(data + torn)
    found = [row["row_index"] for row in read_lines(path, lambda row: row["error"])]
    assert found == list(range(5))
    assert path.read_bytes() == data


def test_broken_line_within_is_nobodys_crash_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(5))
    data = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*data[:2], b"edited by hand\n", *data[2:]]))
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"out\.jsonl:3: not a line of this job"):
        indices(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("room", range(0, 600, 37))
def test_full_disk_keeps_the_lines_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(3))
    before = path.read_bytes()
    file = Journal(path)
    real = file._file

    class Full:
        """Takes `room` bytes, as many at once as it likes, then none."""

        def __init__(self) -> None:
            self.left = room

        def write(self, data: memoryview) -> int:
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = min(self.left, len(data), 50)
            self.left -= taken
            return real.write(data[:taken]) or 0

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(file, "_file", Full())
    for index in range(3, 20):
        file.append(record(index))
    with pytest.raises(OutputError, match=r"No space left on device; .* make room"):
        file.flush()
    data = path.read_bytes()
    assert data.startswith(before)
    assert data.endswith(b"\n")
    num_rows = data.count(b"\n")
    assert indices(path) == list(range(num_rows))
    assert len(before) + room - len(data) < 160, "a line that fits was given up"


def test_file_takes_its_name_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match="No space"):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_what_was_written_is_synced_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    now = 0.0
    monkeypatch.setattr(journal.os, "fsync", synced.append)
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    file = Journal(tmp_path / "out.jsonl")
    synced.clear()
    for second in range(20):
        now = float(second)
        file.append(record(second))
        file.flush()
    assert len(synced) == 3  # every five seconds
    file.close()


# --- Parquet


def parquet_store(folder: Path, **options: Any) -> ParquetStore:
    folder.mkdir(exist_ok=True)
    (folder / "_job").mkdir(exist_ok=True)
    named = {"schema": parquet_schema({"n": "int64"}, token_ids=False), "part_rows": 10, **options}
    return ParquetStore(folder, folder / "_job", check, **named)


def fill(made: ParquetStore, rows: range) -> None:
    for index in rows:
        made.append(record(index, n=index))
        made.flush()


def test_parts_are_read_back_by_pandas_and_pyarrow_with_one_schema(tmp_path: Path) -> None:
    made = parquet_store(tmp_path / "out")
    assert list(made.scan()) == []
    fill(made, range(25))
    made.append(record(25, error="bad", n=None))
    made.close()
    names = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert names == ["_job", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    frame = pandas.read_parquet(tmp_path / "out")
    assert frame["row_index"].tolist() == list(range(26))
    assert frame["error"].tolist() == [""] * 25 + ["bad"]
    table = pyarrow.dataset.dataset(tmp_path / "out").to_table()
    schema = parquet_schema({"n": "int64"}, token_ids=False)
    assert table.schema.equals(schema)
    assert table.to_pylist() == [
        *(record(index, n=index) for index in range(25)),
        record(25, error="bad", n=None),
    ]
    for path in (tmp_path / "out").glob("*.parquet"):
        assert pq.ParquetFile(path).schema_arrow.equals(schema)
        assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_output_without_rows_is_a_part_with_the_schema(tmp_path: Path) -> None:
    made = parquet_store(tmp_path / "out")
    list(made.scan())
    made.close()
    assert pandas.read_parquet(tmp_path / "out").columns.tolist()[:3] == ["id", "row_index", "n"]


@pytest.mark.parametrize("moment", ["before the part", "in the part", "before the journal goes"])
def test_crash_while_a_part_is_made_loses_no_row_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    made = parquet_store(tmp_path / "out")
    list(made.scan())
    fill(made, range(9))

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before the part":
            patch.setattr(made, "_write", crash)
        elif moment == "in the part":
            patch.setattr(journal.os, "fsync", crash)
        else:
            patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            fill(made, range(9, 10))
    (tmp_path / "out" / ".part-00000.parquet.part").write_bytes(b"half")  # as SIGKILL leaves it
    again = parquet_store(tmp_path / "out")
    assert sorted(row["row_index"] for row in again.scan()) == list(range(10))
    fill(again, range(10, 12))
    again.close()
    assert pandas.read_parquet(tmp_path / "out")["row_index"].tolist() == list(range(12))
    assert not list((tmp_path / "out" / "_job").iterdir()), "a journal is left"


def test_journal_becomes_a_part_by_its_size_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PART_BYTES", 500)
    made = parquet_store(tmp_path / "out", part_rows=1000)
    list(made.scan())
    fill(made, range(20))
    made.close()
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_are_replaced_where_they_stand_in_parts_and_journal(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "out"

    def make() -> Any:
        return (
            parquet_store(folder) if kind == "parquet" else JsonlStore(tmp_path / "o.jsonl", check)
        )

    made = make()
    list(made.scan())
    for index in range(25):
        made.append(record(index, n=index, error="bad" if index % 6 == 0 else ""))
        made.flush()
    if kind == "jsonl":
        made.close()
    again = make()
    list(again.scan())
    new = {index: record(index, n=-index) for index in (6, 24)}
    again.replace(new, check)
    again = make()
    rows = list(again.scan())
    assert [row["row_index"] for row in rows] == list(range(25))
    failed = [row["row_index"] for row in rows if row["error"]]
    assert failed == [0, 12, 18]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pa.int32(), "int32"),
        (pa.uint64(), "uint64"),
        (pa.float32(), "float"),
        (pa.float64(), "double"),
        (pa.bool_(), "bool"),
        (pa.large_string(), "string"),
        (pa.list_(pa.int32()), "string"),
        (pa.timestamp("us"), "string"),
    ],
)
def test_kept_column_has_its_type_if_it_is_a_plain_one(kind: pa.DataType, name: str) -> None:
    assert kept_type(kind) == name
    assert parquet_schema({"n": name}, token_ids=True).field("n").nullable


# --- tables


def test_row_set_is_a_set() -> None:
    rng = random.Random(0)
    ours, theirs = RowSet(), set()
    for _ in range(3000):
        index = rng.randrange(5000) << 4  # over ten pieces
        assert (index in ours) == (index in theirs)
        if index in theirs and rng.random() < 0.5:
            ours.remove(index)
            theirs.remove(index)
        else:
            assert ours.add(index) == (index not in theirs)
            theirs.add(index)
        assert len(ours) == len(theirs)
    assert ours.add(10**15), "far from all others, and small"
    assert ours.largest == 10**15


def test_id_table_knows_the_first_row_of_each_id() -> None:
    rng = random.Random(0)
    table, first = IdTable(), {}
    for index in rng.sample(range(100_000), 20_000):
        name = f"id-{rng.randrange(5000)}"
        first[name] = min(index, first.get(name, index))
        assert table.first_row(name, index) == first[name]


# --- manifest


def manifest(folder: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "config": {"engine.seed": 0, "template": None},
        "model": {"config.json": "abc", "model.safetensors": "def"},
        "input": [{"name": "in.jsonl", "num_bytes": 3, "sha256": "x"}],
        "format": "rows",
        "has_rows": True,
    }
    return open_manifest(folder, **{**given, **changes})


def test_manifest_goes_on_under_the_same_and_names_every_difference(tmp_path: Path) -> None:
    first = manifest(tmp_path, has_rows=False)
    assert manifest(tmp_path) == first
    for changes, difference in (
        ({"config": {"engine.seed": 1, "template": None}}, "config.engine.seed was 0, now 1"),
        ({"config": {"engine.seed": 0}}, ""),
        (
            {"config": {"engine.seed": 0, "template": None, "new": 1}},
            "config.new was null, now 1",
        ),
        ({"model": {"config.json": "abc"}}, 'model.model.safetensors was "def", now null'),
        (
            {"input": [{"name": "in.jsonl", "num_bytes": 4, "sha256": "x"}]},
            "input.0.num_bytes was 3, now 4",
        ),
        ({"input": []}, "input had 1 files, now 0"),
        ({"format": "openai"}, 'format was "rows", now "openai"'),
    ):
        if difference:
            with pytest.raises(OutputError) as caught:
                manifest(tmp_path, **changes)
            assert difference in str(caught.value)
            assert "\n" not in str(caught.value)
    assert manifest(tmp_path) == first


@pytest.mark.parametrize("tuning", [None, "off"])
def test_job_that_is_older_than_a_name_of_the_config_goes_on(
    tmp_path: Path, tuning: str | None
) -> None:
    first = manifest(tmp_path, has_rows=False)
    config = {"engine.seed": 0, "template": None, "engine.tuning": tuning}
    assert manifest(tmp_path, config=config) == first


@pytest.mark.parametrize(("begun", "now"), [(None, "off"), ("off", None)])
def test_job_begun_with_tuning_off_is_not_gone_on_with_otherwise(
    tmp_path: Path, begun: str | None, now: str | None
) -> None:
    config = {"engine.seed": 0, "engine.tuning": begun}
    manifest(tmp_path, config=config, has_rows=False)
    assert manifest(tmp_path, config=config)["config"] == config
    with pytest.raises(OutputError, match=r"config\.engine\.tuning was"):
        manifest(tmp_path, config={**config, "engine.tuning": now})


def test_job_without_rows_may_begin_anew(tmp_path: Path) -> None:
    manifest(tmp_path, has_rows=False)
    changed = {"engine.seed": 5, "template": None}
    assert manifest(tmp_path, config=changed, has_rows=False)["config"] == changed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}', "[" * 100_000])
def test_manifest_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match=r"manifest\.json: "):
        manifest(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_model_is_told_by_its_values_and_not_by_its_place(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    header = json.dumps({"w": [0, 1]}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(5_000_000)
    (model / "model.safetensors").write_bytes(data)

    def told(path: Path = model) -> dict[str, Any]:
        return model_fingerprint(path, tokenizer=None, with_weights=True)

    first = told()
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in model.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert told(moved) == first
    for place in (10, len(header) + 8, len(data) // 2 + 1000, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        (moved / "model.safetensors").write_bytes(changed)
        assert told(moved) != first, place
    other = model_fingerprint(model, tokenizer=moved, with_weights=True)
    assert other != first
    # Once a traceback, though an engine reads none of them.
    (model / "extra.json").symlink_to("nowhere")
    (model / "other.safetensors").symlink_to("nowhere")
    (model / "onnx.json").mkdir()
    assert told() == first


@pytest.mark.parametrize("name", ["extra.json", "other.safetensors"])
def test_model_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes(bytes(9))

    def refuse(*given: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match=rf"{name} cannot be read \(Permission denied\); a job"):
        model_fingerprint(tmp_path, tokenizer=None, with_weights=True)
