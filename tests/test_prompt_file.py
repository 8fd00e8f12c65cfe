"""Does a prompt file become the right requests, and does a broken one say where it is broken?"""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Callable, Sized
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphengine.errors import InputError
from graphengine.prompt_file import (
    UntilBroken,
    check_prompts,
    count_requests,
    open_prompts,
    read_requests,
)
from graphengine.request import Request


def write(tmp_path: Path, data: bytes | str, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def prompts_of(path: Path | str) -> list[object]:
    return [request.prompt for request in read_requests(path)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("no line end", ["no line end"]),
        ("crlf\r\nlast\r\n", ["crlf", "last"]),
        (b"\xef\xbb\xbfmark\n", ["mark"]),
        ("  spaces stay  \n", ["  spaces stay  "]),
        ("a\u2028b\x85c\x0cd\n", ["a\u2028b\x85c\x0cd"]),  # only "\n" ends a line
        ("Grüße, 世界 🌍\n", ["Grüße, 世界 🌍"]),
        ('{"a": 1} is a prompt\n', ['{"a": 1} is a prompt']),  # .txt is text
    ],
)
def test_text_lines_are_prompts(tmp_path: Path, data: bytes | str, expected: list[str]) -> None:
    assert prompts_of(write(tmp_path, data)) == expected


def test_jsonl_takes_each_kind_of_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": []}]
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    entries = [
        {"prompt": "one\ntwo", "id": "a", "answer": "extra keys are ignored"},
        {"messages": messages, "id": 7},
        {"messages": [{"role": "user", "content": parts}]},
        {"prompt_token_ids": [0, 5, 3]},
    ]
    path = write(tmp_path, "\n\n".join(map(json.dumps, entries)) + "\n\n", "in.jsonl")
    assert list(read_requests(path)) == [
        Request("one\ntwo", request_id="a"),
        Request({"messages": messages}, request_id="7"),
        Request({"messages": messages[:1]}),
        Request({"prompt_token_ids": [0, 5, 3]}),
    ]
    assert count_requests(path) == 4


@pytest.mark.parametrize("name", ["in.jsonl", "in.NDJSON", "in.json", "in", "in.dat"])
def test_jsonl_is_known_by_name_or_first_character(tmp_path: Path, name: str) -> None:
    assert prompts_of(write(tmp_path, '\ufeff\n {"prompt": "x"}\n', name)) == ["x"]


def test_unknown_name_without_brace_is_text(tmp_path: Path) -> None:
    assert prompts_of(write(tmp_path, "hello\n{}\n", "in")) == ["hello", "{}"]


TEXT_ERRORS = {
    "empty line": ("one\n\ntwo\n", 2, "empty line"),
    "blank line": ("one\n \t\r\n", 2, "empty line"),
    "latin-1": (b"one\ntwo\ncaf\xe9\n", 3, "byte 4 is not UTF-8"),
    "cut character": ("one\ncafé".encode()[:-1], 2, "not UTF-8"),
    "nul": (b"one\na\0b\n", 2, "NUL"),
    "utf-16": ("one\n".encode("utf-16"), 1, "UTF-16"),
}


@pytest.mark.parametrize(("data", "line", "what"), TEXT_ERRORS.values(), ids=TEXT_ERRORS)
def test_broken_text_line_is_named(tmp_path: Path, data: bytes | str, line: int, what: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(InputError) as caught:
        count_requests(path)
    assert f"{path}:{line}: " in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


JSONL_ERRORS = {
    "broken": ('{"prompt": "x"', "broken JSON"),
    "pretty-printed": ("{", "broken JSON"),
    "huge number": ('{"prompt_token_ids": [' + "9" * 5000 + "]}", "broken JSON"),
    "deep": ("[" * 200_000, "broken JSON"),
    "raw control character": ('{"prompt": "a\tb"}', "control character"),
    "list": ('["x"]', "not a JSON object"),
    "string": ('"x"', "not a JSON object"),
    "no key": ('{"text": "x"}', "no prompt"),
    "two keys": ('{"prompt": "x", "messages": []}', "both prompt and messages"),
    "prompt is a number": ('{"prompt": 5}', "prompt is 5"),
    "prompt is null": ('{"prompt": null}', "prompt is None"),
    "prompt is empty": ('{"prompt": ""}', "prompt is empty"),
    "half a surrogate pair": ('{"prompt": "a\\ud800"}', "half of a surrogate pair (\\ud800)"),
    "surrogate in a message": (
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        "half of a surrogate pair",
    ),
    "messages is a string": ('{"messages": "hi"}', "messages is 'hi'"),
    "messages is empty": ('{"messages": []}', "messages is []"),
    "message is a string": ('{"messages": ["hi"]}', "messages holds 'hi'"),
    "message without role": ('{"messages": [{"content": "hi"}]}', "messages holds"),
    "message without content": ('{"messages": [{"role": "user"}]}', "content of a 'user' message"),
    "content is a number": ('{"messages": [{"role": "user", "content": 5}]}', "message is 5"),
    "content has an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
        "holds {'type': 'image_url', 'image_url': {}}; give text parts alone",
    ),
    "ids is a string": ('{"prompt_token_ids": "12"}', "prompt_token_ids is '12'"),
    "ids is empty": ('{"prompt_token_ids": []}', "prompt_token_ids is []"),
    "id is a float": ('{"prompt_token_ids": [1.0]}', "holds 1.0"),
    "id is a bool": ('{"prompt_token_ids": [true]}', "holds True"),
    "id is negative": ('{"prompt_token_ids": [-1]}', "holds -1"),
    "request id is null": ('{"prompt": "x", "id": null}', "id is None"),
    "request id is empty": ('{"prompt": "x", "id": ""}', "id is ''"),
    "request id is a list": ('{"prompt": "x", "id": []}', "id is []"),
    "sampling parameter": ('{"prompt": "x", "max_tokens": 5}', "'max_tokens' cannot be set"),
}


@pytest.mark.parametrize(("line", "what"), JSONL_ERRORS.values(), ids=JSONL_ERRORS)
def test_broken_jsonl_line_is_named(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path, f'{{"prompt": "fine"}}\n{line}\n', "in.jsonl")
    with pytest.raises(InputError) as caught:
        count_requests(path)
    assert f"{path}:2: " in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "data"),
    [("in.txt", ""), ("in.jsonl", ""), ("in.jsonl", "\ufeff\n\n"), ("in", " \n")],
)
def test_file_without_prompts_is_an_error(tmp_path: Path, name: str, data: str) -> None:
    with pytest.raises(InputError, match="holds no prompt"):
        count_requests(write(tmp_path, data, name))


def test_missing_file_and_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        count_requests(tmp_path / "none.txt")
    with pytest.raises(InputError, match="directory"):
        count_requests(tmp_path)
    with pytest.raises(InputError, match="directory"):
        list(read_requests(tmp_path))


def test_standard_input_is_read_as_it_comes(give_stdin: Callable[[str | int], None]) -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb"), open(write_end, "wb", buffering=0) as source:
        give_stdin(read_end)
        assert count_requests("-") is None
        requests = read_requests("-")
        source.write(b"first\n")
        assert next(requests).prompt == "first"  # would block if it waited for the end
        source.write(b"\n")
        with pytest.raises(InputError, match="<stdin>:2: empty line"):
            next(requests)


def test_named_pipe_is_not_read_twice(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert count_requests(pipe) is None
    writer = threading.Thread(target=pipe.write_text, args=("a\nb\n",))
    writer.start()
    assert prompts_of(pipe) == ["a", "b"]
    writer.join()


def test_memory_holds_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, ("x" * 1000 + "\n") * 20_000)
    tracemalloc.start()
    assert count_requests(path) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # of 20 MB


def test_ten_megabyte_line_is_read(tmp_path: Path) -> None:
    text = "ü" * 5_000_000
    assert prompts_of(write(tmp_path, text)) == [text]
    assert prompts_of(write(tmp_path, json.dumps({"prompt": text}), "in.jsonl")) == [text]


def test_requests_passes_on_what_was_read_before_the_error(tmp_path: Path) -> None:
    path = write(tmp_path, "one\ntwo\n\nfour\n")
    requests = UntilBroken(read_requests(path))
    assert [request.prompt for request in requests] == ["one", "two"]
    assert "prompts.txt:3: empty line" in str(requests.error)


def test_only_what_can_be_counted_has_a_length(tmp_path: Path) -> None:
    counted = open_prompts(write(tmp_path, "one\ntwo\n"))
    assert isinstance(counted, Sized)
    assert len(counted) == counted.num_requests == len(list(counted)) == 2
    assert open_prompts("-").num_requests is None
    assert not isinstance(open_prompts("-"), Sized)


def test_empty_prompt_argument_is_named() -> None:
    assert list(check_prompts(["a", " "])) == [Request("a"), Request(" ")]
    with pytest.raises(InputError, match="prompt 2 is empty"):
        check_prompts(["a", ""])


@given(st.lists(st.text(min_size=1), min_size=1))
def test_any_text_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
        newline="",
    )
    assert prompts_of(path) == texts


@given(st.binary(max_size=300), st.sampled_from(["in.txt", "in.jsonl", "in"]))
def test_any_bytes_give_requests_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    message = ""
    try:
        assert all(request.prompt for request in read_requests(path))
    except InputError as error:
        message = str(error)
    assert "\n" not in message
