"""Are rows read one by one, whatever a file holds, and is what is wrong with them said of each?"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from jobs import config, run, write_jsonl

from graphengine.errors import InputError
from graphengine.jobs import lines, rows
from graphengine.jobs.inputs import find_inputs, fingerprint
from graphengine.jobs.row_format import RowFormat
from graphengine.jobs.rows import Row, RowSource
from graphengine.jobs.template import RowTemplate


def read(path: Path | str, **options: Any) -> list[Row]:
    return list(RowSource(find_inputs(str(path)), lambda _: True, **options))


def collect(path: Path, found: list[Row]) -> None:
    for row in RowSource(find_inputs(str(path)), lambda _: True):
        found.append(row)


def pack_gzip(data: bytes) -> bytes:
    return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])


def pack_zstd(data: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compress
    return compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


PACKED = {"": bytes, ".gz": pack_gzip, ".zst": pack_zstd}


@pytest.mark.parametrize("suffix", PACKED)
def test_plain_and_packed_files_of_several_frames_hold_the_same_rows(
    tmp_path: Path, suffix: str
) -> None:
    data = b"\xef\xbb\xbf" + b"".join(b'{"n": %d}\n\n  \r\n' % n for n in range(5000))
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](data))
    assert read(path) == [Row(n, {"n": n}) for n in range(5000)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.3, 0.999])
def test_packed_file_that_ends_too_soon_is_an_error_after_the_rows_before(
    tmp_path: Path, suffix: str, share: float
) -> None:
    data = b"".join(b'{"n": "%s"}\n' % os.urandom(40).hex().encode() for n in range(5000))
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(packed[: int(share * len(packed))])
    found: list[Row] = []
    with pytest.raises(InputError, match=r"in\.jsonl.*: cannot be read on"):
        collect(path, found)
    assert len(found) > 500
    assert all(row.data is not None for row in found)


BROKEN = {
    "broken JSON": (b'{"prompt": ', "broken JSON"),
    "no object": (b"[1, 2]", "is not a JSON object"),
    "null": (b"null", "None is not a JSON object"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', "broken JSON"),
    "NUL bytes": (b'{"prompt": "a\0b"}', "broken JSON"),
    "only NUL bytes": (b"\0\0\0", "broken JSON"),
    "half a surrogate pair": (rb'{"prompt": "\ud800"}', "broken JSON"),
    "not a number": (b'{"prompt": NaN}', "broken JSON"),
    "deep nesting": (b"[" * 100_000, "broken JSON"),
    "10 MB": (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', "longer than 8,388,608 bytes"),
}


@pytest.mark.parametrize(("line", "error"), BROKEN.values(), ids=BROKEN)
def test_broken_line_is_a_row_in_error_and_costs_no_other(
    tmp_path: Path, line: bytes, error: str
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"n": 0}, line, {"n": 2}])
    before, broken, after = read(path)
    assert (before, after) == (Row(0, {"n": 0}), Row(2, {"n": 2}))
    assert broken.index == 1
    assert broken.data is None
    assert error in broken.error


def test_long_line_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 60_000_000 + b"\n{}\n")
    tracemalloc.start()
    found = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row.data for row in found] == [None, {}]
    assert peak < 30_000_000


def test_line_of_the_limit_is_read_and_one_byte_more_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    path = write_jsonl(tmp_path / "in.jsonl", [b'"12345678"', b'"123456789"', b'"1"'])
    assert [("longer" in row.error) for row in read(path)] == [False, True, False]


def test_rows_that_are_not_wanted_are_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ({"n": n} for n in range(100)))
    parsed: list[int] = []
    parse = rows._parse
    monkeypatch.setattr(
        rows, "_parse", lambda index, line: parsed.append(index) or parse(index, line)
    )
    source = RowSource(find_inputs(str(path)), lambda index: index % 10 == 3)
    assert [row.index for row in source] == list(range(3, 100, 10)) == parsed
    assert source.is_exact
    assert source.estimate() == 100


def test_number_of_rows_is_estimated_from_the_bytes_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ({"n": 10_000 + n} for n in range(50_000)))
    source = RowSource(find_inputs(str(path)), lambda _: True)
    assert source.estimate() is None
    reader = iter(source)
    for _ in range(25_000):
        next(reader)
    assert not source.is_exact
    assert source.estimate() == pytest.approx(50_000, rel=0.05)


@given(st.lists(st.binary(max_size=60), max_size=30), st.sampled_from([b"\n", b"\r\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_bytes_give_a_row_for_each_line_that_is_not_blank(
    tmp_path: Path, parts: list[bytes], end: bytes
) -> None:
    path = tmp_path / "in.jsonl"
    data = end.join(parts)
    path.write_bytes(data)
    expected = [
        line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r\n")
    ]
    found = read(path)
    assert [row.index for row in found] == list(range(len(expected)))
    for row, line in zip(found, expected, strict=True):
        try:
            value = json.loads(line.strip(b" \t\r\n"))
        except (ValueError, RecursionError):
            value = None
        # orjson is stricter than json (NaN, lone surrogates, UTF-16), never laxer.
        assert row.data is None or row.data == value
        assert (row.data is None) == bool(row.error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["prompt", "messages", "prompt_token_ids", "id", "sampling", "kept", "x"])


@given(
    st.dictionaries(NAMES, JSON, max_size=5),
    st.sampled_from(
        [{}, {"prompt_column": "x"}, {"messages_column": "x"}, {"template": "{{ x }}{{ id[1] }}"}]
    ),
)
@settings(max_examples=400)
def test_any_object_becomes_a_task_and_a_record_of_one_schema(
    data: dict[str, Any], options: dict[str, Any]
) -> None:
    options = {"sampling_column": "sampling", "keep": (("kept", "kept"),), **options}
    format_ = RowFormat(config(Path("in.jsonl"), Path("out.jsonl"), **options), {"kept": "string"})
    task = format_.prepare(Row(3, data))
    assert bool(task.error) or bool(task.prompt)
    record = format_.record(task, rows_result())
    assert list(record) == [
        "id",
        "row_index",
        "kept",
        "text",
        "finish_reason",
        "num_prompt_tokens",
        "num_output_tokens",
        "error",
    ]
    assert record["kept"] is None or isinstance(record["kept"], str)
    stored = format_.read_back(json.loads(json.dumps(record)))
    assert (stored.index, stored.row_id) == (3, task.row_id)


def rows_result() -> Any:
    from graphengine.jobs.tasks import Result

    return Result("text", [1], "stop", 1, 1, "")


# --- Parquet


def test_parquet_is_read_by_row_groups_and_finished_groups_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"n": range(5000), "other": ["x"] * 5000}), path, row_group_size=1000)
    decoded: list[int] = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, *args: Any, **named: Any) -> Any:
        decoded.extend(named["row_groups"])
        return real(self, *args, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    source = RowSource(
        find_inputs(str(path)), lambda index: 2990 <= index < 3010, columns=frozenset({"n"})
    )
    assert list(source) == [Row(n, {"n": n}) for n in range(2990, 3010)]
    assert decoded == [2, 3]
    assert source.estimate() == 5000


def test_string_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    values = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({"prompt": broken}), path)
    before, row, after = read(path)
    assert (before.data, after.data) == ({"prompt": "good"}, {"prompt": "fine"})
    assert "not UTF-8" in row.error


@pytest.mark.parametrize("size", [0, 4, 100, -20])
def test_truncated_parquet_names_the_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"in\.parquet: no whole Parquet file"):
        read(path)


def test_parquet_with_a_broken_page_gives_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    values = [os.urandom(30).hex() for _ in range(4000)]
    pq.write_table(pa.table({"prompt": values}), path, row_group_size=1000, use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 5000] = bytes(5000)
    path.write_bytes(data)
    found: list[Row] = []
    with pytest.raises(InputError, match="cannot be read on after row 2000"):
        collect(path, found)
    assert [row.data for row in found] == [{"prompt": value} for value in values[:2000]]


def test_broken_footer_is_never_a_traceback(tmp_path: Path) -> None:
    """Some are to pyarrow what it has not implemented, which is no ValueError."""
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "n": [1, 2]}), path)
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    num_refused = 0
    for place in range(start, len(data) - 8):
        for flip in (1, 4, 0x3C):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            try:
                read(path)
            except InputError:
                num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize("options", [{}, {"template": "{{ k }}"}, {"id_column": "k"}])
@pytest.mark.parametrize("output", ["out", "out.jsonl"])
def test_two_columns_of_a_name_are_refused_where_it_is_used(
    tmp_path: Path, output: str, options: dict[str, Any]
) -> None:
    options = options or {"keep": (("k", "k"),)}
    path = tmp_path / "in.parquet"
    columns = [pa.array(["a"]), pa.array(["1"]), pa.array(["2"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["prompt", "k", "k"]), path)
    with pytest.raises(InputError, match=r"in\.parquet: has two columns 'k'; rename one"):
        run(path, tmp_path / output, **options)
    assert run(path, tmp_path / output).stats.num_failed == 0


def test_times_of_nanoseconds_are_text_where_python_has_none(tmp_path: Path) -> None:
    """In a process without pandas, with which pyarrow has them."""
    path = tmp_path / "in.parquet"
    times = [1, 1_000, None, 1_700_000_000_123_456_789]
    kinds = {"t": pa.timestamp("ns"), "z": pa.timestamp("ns", "UTC")}
    pq.write_table(pa.table({name: pa.array(times, kind) for name, kind in kinds.items()}), path)
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'pandas': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from graphengine.jobs.inputs import find_inputs\n"
        "from graphengine.jobs.rows import RowSource\n"
        "for row in RowSource(find_inputs(sys.argv[1]), lambda _: True):\n"
        "    print(row.error or [str(value) for value in row.data.values()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.splitlines() == [
        "['1970-01-01 00:00:00.000000001', '1970-01-01 00:00:00.000000001Z']",
        "['1970-01-01 00:00:00.000001', '1970-01-01 00:00:00.000001+00:00']",
        "['None', 'None']",
        "['2023-11-14 22:13:20.123456789', '2023-11-14 22:13:20.123456789Z']",
    ]


# --- which files


def test_directories_and_globs_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "_x.jsonl", ".y.jsonl", "sub/c.jsonl", "_job/d.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = json.dumps({"file": name}).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "notes.txt").write_text("not data")
    names = [row.data["file"] for row in read(tmp_path) if row.data]
    assert names == ["a.jsonl.gz", "b.jsonl", "sub/c.jsonl"]
    assert [row.data for row in read(f"{tmp_path}/?.jsonl")] == [{"file": "b.jsonl"}]
    assert [row.index for row in read(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("none.jsonl", "No such file or directory"),
        ("*.jsonl", "no input in this pattern"),
        ("empty", "no input in this directory"),
        ("file.csv", "not known by its name"),
        ("mixed", "holds JSONL and Parquet files"),
        ("pipe.jsonl", "not a regular file"),
    ],
)
def test_input_that_is_none_is_one_line(tmp_path: Path, name: str, error: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").touch()
    (tmp_path / "mixed" / "a.parquet").touch()
    (tmp_path / "file.csv").touch()
    if name == "pipe.jsonl":
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=error):
        find_inputs(str(tmp_path / name))


def test_fingerprint_tells_changed_files_and_not_where_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"n": 1}])
    first = fingerprint(find_inputs(str(path)))
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "in.jsonl"
    moved.write_bytes(path.read_bytes())
    assert fingerprint(find_inputs(str(moved))) == first
    write_jsonl(path, [{"n": 2}])
    assert fingerprint(find_inputs(str(path))) != first


def test_large_input_is_told_by_its_ends_and_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphengine.jobs import inputs

    monkeypatch.setattr(inputs, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(inputs, "_END_BYTES", 10)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 1000)
    os.utime(path, ns=(1, 1))
    first = fingerprint(find_inputs(str(path)))
    for place in (0, 500, 999):
        data = bytearray(b"x" * 1000)
        data[place] = 121
        path.write_bytes(data)  # which changes the time
        assert fingerprint(find_inputs(str(path))) != first


@pytest.mark.parametrize(
    "line", [b"[" * 1000 + b"]" * 1000, b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"]
)
def test_row_nested_too_deep_is_an_error_row(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line + b'\n{"a": 1}\n')
    deep, good = read(path)
    assert deep.data is None
    assert deep.error
    assert good.data == {"a": 1}


def test_value_out_of_range_costs_one_row(tmp_path: Path) -> None:
    days = pa.array([1, 3_000_000, 2], pa.int32()).cast(pa.date32())
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"d": days, "n": [0, 1, 2]}), path)
    found = read(path)
    assert [row.data is None for row in found] == [False, True, False]
    assert "out of range" in found[1].error


def test_template_reads_a_column_named_as_a_global_of_jinja() -> None:
    template = RowTemplate("{{ range }}")
    assert "range" in template.columns
    assert template.render({"range": "0+1="}) == "0+1="
