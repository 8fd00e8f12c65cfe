"""Does a row become the request its columns ask for, and a record with a constant schema?"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pytest
from jobs import config

from graphengine.errors import ConfigError, RequestError
from graphengine.intake import derived_seed
from graphengine.jobs.config import COLUMNS, JobConfig, parse_keep
from graphengine.jobs.row_format import RowFormat
from graphengine.jobs.rows import Row
from graphengine.jobs.shard import Shard, parse_shard
from graphengine.jobs.tasks import Result, Task
from graphengine.jobs.template import MAX_CHARS, RowTemplate

RESULT = Result("text", [5, 2], "stop", 4, 2, "")


def job(**options: Any) -> JobConfig:
    return config(Path("in.jsonl"), Path("out.jsonl"), **options)


def prepare(data: dict[str, Any], index: int = 3, **options: Any) -> Task:
    return RowFormat(job(**options), None).prepare(Row(index, data))


CHAT = [{"role": "user", "content": "hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("h", "i")]}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("data", "options", "prompt"),
    [
        ({"prompt": "hi"}, {}, "hi"),
        ({"messages": CHAT}, {}, {"messages": CHAT}),
        ({"prompt_token_ids": [1, 2]}, {}, {"prompt_token_ids": [1, 2]}),
        ({"prompt": None, "messages": CHAT}, {}, {"messages": CHAT}),  # as Parquet has it
        ({"q": "hi", "prompt": "no"}, {"prompt_column": "q"}, "hi"),
        ({"c": CHAT}, {"messages_column": "c"}, {"messages": CHAT}),
        ({"messages": PARTS}, {}, {"messages": CHAT}),
        ({"c": PARTS}, {"messages_column": "c"}, {"messages": CHAT}),
        (
            {"c": [{"role": "user", "content": "hi", "name": None}]},
            {"messages_column": "c"},
            {"messages": CHAT},
        ),
        ({"a": 1, "b": "x"}, {"template": "{{ a }}-{{ b }}"}, "1-x"),
    ],
)
def test_prompt_comes_from_the_column_asked_for(
    data: dict[str, Any], options: dict[str, Any], prompt: object
) -> None:
    task = prepare(data, **options)
    assert (task.error, task.prompt) == ("", prompt)


BAD_ROWS = {
    "missing column": ({"a": 1}, {"prompt_column": "q"}, "has no column 'q'; it has 'a'"),
    "null": ({"prompt": None}, {}, "prompt is None; give a string"),
    "wrong type": ({"prompt": 5}, {}, "prompt is 5; give a string"),
    "empty": ({"prompt": ""}, {}, "prompt is empty"),
    "no prompt": ({}, {}, "has no prompt; expected"),
    "two prompts": ({"prompt": "a", "messages": CHAT}, {}, "both prompt and messages"),
    "chat without role": ({"messages": [{"content": "x"}]}, {}, "role and content"),
    "image": ({"messages": IMAGE}, {}, "give text parts alone"),
    "image in a column": ({"c": IMAGE}, {"messages_column": "c"}, "give text parts alone"),
    "null chat": ({"m": None}, {"messages_column": "m"}, "messages is None"),
    "token ids": ({"prompt_token_ids": [1, -2]}, {}, "holds -2"),
    "id of a wrong type": ({"prompt": "a", "id": [1]}, {}, "id is [1]"),
    "null id": ({"prompt": "a", "k": None}, {"id_column": "k"}, "has no 'k', the column of ids"),
    "no id": ({"prompt": "a"}, {"id_column": "k"}, "has no 'k', the column of ids"),
    "undefined in template": ({"a": 1}, {"template": "{{ b }}"}, "'b' is undefined"),
    "template divides": ({"a": 0}, {"template": "{{ 1 / a }}"}, "division by zero"),
    "template gives nothing": ({"a": ""}, {"template": "{{ a }}"}, "prompt is empty"),
    "unknown parameter": (
        {"prompt": "a", "s": {"heat": 1}},
        {"sampling_column": "s"},
        "s sets 'heat'; choose from temperature",
    ),
    "parameter out of range": (
        {"prompt": "a", "s": {"top_p": 2}},
        {"sampling_column": "s"},
        "top_p is 2; give a number in (0, 1]",
    ),
    "parameters of a wrong type": (
        {"prompt": "a", "s": [1]},
        {"sampling_column": "s"},
        "s is [1]; give an object",
    ),
    "broken parameters": ({"prompt": "a", "s": "{"}, {"sampling_column": "s"}, "broken JSON"),
}


@pytest.mark.parametrize(("data", "options", "error"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_row_that_is_no_request_says_why(
    data: dict[str, Any], options: dict[str, Any], error: str
) -> None:
    assert error in prepare(data, **options).error


def test_row_sets_its_own_sampling_and_seeds_come_from_its_index() -> None:
    options = {"sampling_column": "s", "engine": {"seed": 9}}
    given: list[Any] = [{"temperature": 0.5, "top_p": None}, '{"temperature": 0.5}', None]
    for value, expected in zip(given, (0.5, 0.5, None), strict=True):
        task = prepare({"prompt": "a", "s": value}, **options)
        assert task.error == ""
        assert task.params.get("temperature") == expected
        assert task.params["seed"] == derived_seed(9, 3)
    assert prepare({"prompt": "a", "s": {"seed": 5}}, **options).params["seed"] == 5
    # As LLM.generate derives them for a whole input.
    assert len({prepare({"prompt": "a"}, index).params["seed"] for index in range(1000)}) == 1000


def test_record_has_the_same_columns_for_good_rows_and_bad_ones() -> None:
    format_ = RowFormat(
        job(keep=parse_keep(["a,text=source"]), token_ids=True, prompt_column="text"), None
    )
    good = format_.prepare(Row(0, {"text": "hi", "a": [1]}))
    bad = format_.prepare(Row(1, None, "broken JSON"))
    records = [
        format_.record(good, RESULT),
        format_.record(bad, Result.failed(bad.error)),
    ]
    assert records[0] == {
        "id": "0",
        "row_index": 0,
        "a": [1],
        "source": "hi",
        "text": "text",
        "token_ids": [5, 2],
        "finish_reason": "stop",
        "num_prompt_tokens": 4,
        "num_output_tokens": 2,
        "error": "",
    }
    assert records[1] | {"error": ""} == {
        "id": "1",
        "row_index": 1,
        "a": None,
        "source": None,
        "text": "",
        "token_ids": [],
        "finish_reason": "error",
        "num_prompt_tokens": 0,
        "num_output_tokens": 0,
        "error": "",
    }
    assert [list(record) for record in records] == [list(records[0])] * 2
    assert [format_.read_back(record).is_failed for record in records] == [False, True]


def test_kept_values_are_json_whatever_parquet_had() -> None:
    values = {
        "time": datetime.datetime(2026, 1, 2, 3),
        "price": decimal.Decimal("1.50"),
        "bytes": b"\x00\xff",
        "list": [{"a": 1}],
        "text": "plain",
        "number": 5,
    }
    keep = tuple((name, f"k_{name}") for name in values)
    row = Row(0, {"prompt": "a", **values})
    in_jsonl = RowFormat(job(keep=keep), None).prepare(row)
    assert in_jsonl.error == ""
    assert in_jsonl.extra == {
        "k_time": "2026-01-02T03:00:00",
        "k_price": "1.50",
        "k_bytes": "00ff",
        "k_list": [{"a": 1}],
        "k_text": "plain",
        "k_number": 5,
    }
    types = dict.fromkeys(values, "string") | {"number": "int64"}
    in_parquet = RowFormat(job(keep=keep), types).prepare(row)
    assert in_parquet.extra["k_list"] == '[{"a":1}]'
    assert in_parquet.extra["k_number"] == 5
    assert in_parquet.extra["k_text"] == "plain"
    assert in_parquet.extra["k_price"] == "1.50"
    assert in_parquet.extra["k_bytes"] == "00ff"


def test_messages_of_parquet_may_hold_what_json_has_not() -> None:
    message = {"role": "user", "content": "a", "at": datetime.datetime(2026, 1, 2), "raw": b"\x01"}
    for options in ({}, {"messages_column": "messages"}):
        task = RowFormat(job(**options), None).prepare(Row(0, {"messages": [message]}))
        assert task.error == ""
        assert json.dumps(task.prompt)


# --- templates


def test_a_row_is_never_a_template() -> None:
    row = {"a": "{{ b }}{% for x in range(9) %}", "b": "secret"}
    assert RowTemplate("{{ a }}").render(row) == row["a"]


HOSTILE = {
    "attributes": ("{{ a.__class__.__mro__ }}", {"a": 1}),
    "globals": ("{{ a.render.__globals__ }}", {"a": "x"}),
    "mutation": ("{{ a.append(1) }}", {"a": []}),
    "long text": ("{{ a * n }}", {"a": "x", "n": 10**10}),
    "long text, turned": ("{{ n * a }}", {"a": "x", "n": 10**10}),
    "long list": ("{{ a * n }}", {"a": [1], "n": 10**10}),
    "large power": ("{{ n ** n }}", {"n": 10**8}),
    "long range": ("{% for x in range(n) %}{{ x }}{% endfor %}", {"n": 10**9}),
    "many parts": ("{% for x in a %}{{ b }}{% endfor %}", {"a": [1] * 100, "b": "x" * 10**6}),
}


@pytest.mark.parametrize(("template", "row"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_row_is_refused_at_once(template: str, row: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="template"):
        RowTemplate(template).render(row)


def test_template_may_use_what_is_harmless() -> None:
    template = RowTemplate("{{ '-' * 3 }}{{ n * 2 }}{% if c is defined %}{{ c }}{% endif %}")
    assert template.render({"n": 4}) == "---8"
    assert template.columns == {"n", "c"}
    assert len(RowTemplate("{{ a }}").render({"a": "x" * MAX_CHARS})) == MAX_CHARS


def test_template_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="--template cannot be used: unexpected"):
        RowTemplate("{{ a")


@pytest.mark.parametrize(
    "text",
    [
        "{% for x in a %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "1" * 5000 + " }}",
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
        "{{ " + "[" * 150 + "]" * 150 + " }}",
    ],
    ids=["25 loops", "5,000 digits", "3,000 brackets", "150 lists"],
)
def test_template_that_python_cannot_compile_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--template cannot be used: .+; see Jinja") as caught:
        RowTemplate(text)
    assert "\n" not in str(caught.value)


# --- config


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"template": "a", "prompt_column": "b"}, "--template and --prompt-column each make"),
        ({"order": "random"}, "--order is 'random'; choose one of completion, input"),
        ({"workers": 0}, "--workers is 0"),
        ({"workers": 100_000}, "--workers is 100000; give 1 to 256, each a process"),
        ({"part_rows": 0}, "--part-rows is 0"),
        ({"keep": (("text", "text"),)}, "the output has a column of that name; write text=NEW"),
        ({"keep": (("a", "b"), ("c", "b"))}, "the output has a column of that name"),
        ({"keep": (("", "b"),)}, "give NAME or NAME=NEW"),
    ],
)
def test_config_that_cannot_be_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        job(**options)


NO_TEXT = "a\udcff"  # as Python has the bytes a, 0xff of a command line
NOT_UTF_8: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("MODEL", {"engine": {"model": NO_TEXT}}),
    "tokenizer": ("--tokenizer", {"engine": {"tokenizer": NO_TEXT}}),
    "tuning": ("--tuning", {"engine": {"tuning": NO_TEXT}}),
    "trace": ("--trace", {"engine": {"trace": NO_TEXT}}),
    "output": ("--output", {"output": NO_TEXT}),
    "template": ("--template", {"template": NO_TEXT}),
    "prompt column": ("--prompt-column", {"prompt_column": NO_TEXT}),
    "messages column": ("--messages-column", {"messages_column": NO_TEXT}),
    "id column": ("--id-column", {"id_column": NO_TEXT}),
    "sampling column": ("--sampling-column", {"sampling_column": NO_TEXT}),
    "column to keep": ("--keep-columns", {"keep": (("a", "b"), (NO_TEXT, "x"))}),
    "its new name": ("--keep-columns", {"keep": (("a", "b"), ("x", NO_TEXT))}),
}


@pytest.mark.parametrize(("option", "options"), NOT_UTF_8.values(), ids=NOT_UTF_8)
def test_bytes_that_are_no_text_are_refused_before_a_row_is_read(
    option: str, options: dict[str, Any]
) -> None:
    """Columns and templates once made each row an error, and paths were a traceback."""
    made = job()
    changes = dict(options)
    if "engine" in changes:
        changes["engine"] = dataclasses.replace(made.engine, **changes["engine"])
    with pytest.raises(RequestError, match=rf"^{option} holds .*\\udcff"):
        dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_column": "q"},
        {"messages_column": "q"},
        {"template": "{{q}}"},
        {"sampling": {"stop": ("x",)}},
    ],
)
def test_without_a_tokenizer_no_option_may_ask_for_text(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer; leave out --skip-tokenizer-init"):
        job(engine={"skip_tokenizer_init": True}, **options)


def test_every_column_of_the_output_is_reserved() -> None:
    record = RowFormat(job(token_ids=True), None).record(Task(0, "0"), RESULT)
    assert set(record) == set(COLUMNS)


def test_meaning_holds_what_decides_a_row_and_nothing_else() -> None:
    base = job().meaning()
    for options in (
        {"workers": 3},
        {"retry_errors": True},
        {"part_rows": 5},
        {"engine": {"max_num_seqs": 9, "block_size": 8}},
        {"engine": {"tuning": "elsewhere"}},
    ):
        assert job(**options).meaning() == base, options
    for options in (
        {"engine": {"seed": 1}},
        {"engine": {"dtype": "bfloat16"}},
        {"engine": {"max_model_len": 9}},
        {"engine": {"tuning": "off"}},
        {"engine": {"attention": "flash"}},
        {"sampling": {"temperature": 1.0}},
        {"sampling": {"stop": ("a",)}},
        {"template": "a"},
        {"prompt_column": "a"},
        {"messages_column": "a"},
        {"id_column": "a"},
        {"sampling_column": "a"},
        {"keep": (("a", "a"),)},
        {"token_ids": True},
        {"order": "input"},
        {"shard": Shard(0, 2)},
    ):
        assert job(**options).meaning() != base, options
    # An option added to a job is either in its meaning or named here as one that is not.
    others = {"engine", "sampling", "input", "output", "keep", "retry_errors", "workers"}
    names = {field.name for field in dataclasses.fields(JobConfig)} - others - {"part_rows"}
    assert names <= set(base)


# --- shards


def test_shards_divide_the_rows() -> None:
    shards = [Shard(index, 3) for index in range(3)]
    for total in range(20):
        found = [[row for row in range(total) if row in shard] for shard in shards]
        assert sorted(row for rows in found for row in rows) == list(range(total))
        assert [len(rows) for rows in found] == [shard.num_rows(total) for shard in shards]


def test_each_shard_has_its_own_output() -> None:
    assert Shard().output("out.jsonl") == "out.jsonl"
    assert Shard(2, 8).output("a/out.jsonl") == "a/out-00002-of-00008.jsonl"
    assert Shard(2, 8).output("a/out") == "a/out/shard-00002-of-00008"


ARRAY = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        (None, ARRAY, Shard(0, 1)),
        ("1/4", {}, Shard(1, 4)),
        ("slurm", ARRAY, Shard(2, 4)),
        (
            "slurm",
            {**ARRAY, "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_ID": "5"},
            Shard(2, 4),
        ),
        (
            "slurm",
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"},
            Shard(1, 8),
        ),
        (
            "slurm",
            {**ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
            Shard(5, 8),
        ),
    ],
)
def test_shard_is_read_from_the_option_or_slurm(
    text: str | None, environment: dict[str, str], shard: Shard
) -> None:
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "error"),
    [
        ("4/4", {}, "--shard is '4/4'; give i/n"),
        ("x", {}, "--shard is 'x'; give i/n"),
        ("slurm", {}, "neither SLURM_ARRAY_TASK_ID nor SLURM_PROCID is set"),
        ("slurm", {**ARRAY, "SLURM_ARRAY_TASK_ID": "9"}, "task 9 is not one of 4"),
        ("slurm", {**ARRAY, "SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID is 'x'"),
        ("slurm", {"SLURM_PROCID": "3"}, "task 3 of 1"),
        ("slurm", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "start it with srun"),
    ],
)
def test_shard_that_is_none_is_one_line(text: str, environment: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse_shard(text, environment)
