"""Are outputs written in input order, whole, and safely for a terminal?"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from graphengine.errors import ConfigError
from graphengine.output_file import (
    InputOrder,
    JsonlWriter,
    TerminalWriter,
    TextWriter,
    check_output_path,
    record,
    write_in_order,
)
from graphengine.request import CompletionOutput, FinishReason, RequestOutput


def output(index: int, text: str = "text", *, prompt: str | None = "p") -> RequestOutput:
    completion = CompletionOutput(0, text, [7, 8, 2], FinishReason.STOP, stop_reason="x")
    return RequestOutput(f"id-{index}", index, prompt, [1, 5], [completion])


def failed(index: int) -> RequestOutput:
    completion = CompletionOutput(0, "", [], FinishReason.ERROR)
    return RequestOutput(f"id-{index}", index, "p", [], [completion], error="prompt is too long")


@given(st.permutations(range(20)))
def test_outputs_come_in_input_order_and_none_is_held_at_the_end(order: list[int]) -> None:
    ordered = InputOrder()
    written = [ready.index for index in order for ready in ordered.push(output(index))]
    assert written == list(range(20))
    assert ordered.rest() == []


def test_record_holds_the_whole_result() -> None:
    assert record(output(3)) == {
        "id": "id-3",
        "prompt": "p",
        "text": "text",
        "token_ids": [7, 8, 2],
        "finish_reason": "stop",
        "stop_reason": "x",
        "num_prompt_tokens": 2,
        "num_output_tokens": 3,
        "error": None,
    }
    assert record(failed(1))["error"] == "prompt is too long"
    assert record(failed(1))["finish_reason"] == "error"


def test_jsonl_is_one_line_per_output_whatever_the_text() -> None:
    file = io.BytesIO()
    text = 'a\nb\r\n"q" \u2028 \x00 🌍'
    JsonlWriter(file, "out").write(output(0, text))
    assert file.getvalue().count(b"\n") == 1
    assert json.loads(file.getvalue())["text"] == text


def test_jsonl_finishes_a_line_that_the_file_takes_in_parts() -> None:
    class Slow(io.RawIOBase):
        taken = b""

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            self.taken += bytes(data[:10])
            return min(10, len(data))

    file = Slow()
    JsonlWriter(file, "out").write(output(0, "long" * 50))
    assert json.loads(file.taken)["text"] == "long" * 50


def test_full_disk_is_one_error_that_names_the_file() -> None:
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(ConfigError, match=r"/dev/full: No space left"),
    ):
        JsonlWriter(full, "/dev/full").write(output(0))
    text = open("/dev/full", "w")  # noqa: SIM115 (closing it fails too)
    with pytest.raises(ConfigError, match=r"standard output: No space left"):
        TextWriter(text, "standard output").write(output(0))
    with pytest.raises(OSError, match="No space left"):
        text.close()


def test_closed_pipe_stays_a_closed_pipe() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb", buffering=0) as pipe, pytest.raises(BrokenPipeError):
        JsonlWriter(pipe, "pipe").write(output(0))


def test_failed_request_keeps_its_line_in_piped_text(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    write_in_order([output(2, "c"), failed(1), output(0, "a")], TextWriter(file, "out"))
    assert file.getvalue() == "a\n\nc\n"
    assert capsys.readouterr().err == "error: request id-1: prompt is too long\n"


def test_failure_is_named_in_one_line_that_obeys_no_escape_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = failed(0)
    bad.request_id = "\x1b]0;pwned\x07\nfake line"
    bad.error = "the template says\r\n\x9b2Jerror: \u2028none"
    write_in_order([bad], TextWriter(io.StringIO(), "out"))
    assert capsys.readouterr().err == (
        "error: request \ufffd]0;pwned\ufffd fake line: the template says \ufffd2Jerror:  none\n"
    )


def test_only_the_first_failures_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    write_in_order(map(failed, range(50)), TextWriter(io.StringIO(), "out"))
    assert capsys.readouterr().err.count("\n") == 10


def test_failures_that_nobody_can_be_told_of_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk behind standard error lost all answers."""
    file = io.BytesIO()
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("sys.stderr", io.TextIOWrapper(full, write_through=True))
        write_in_order([failed(0), output(1, "b")], JsonlWriter(file, "out"))
        monkeypatch.undo()
    assert len(file.getvalue().splitlines()) == 2


def test_what_finished_before_a_stop_is_written() -> None:
    def stopped() -> Iterator[RequestOutput]:
        yield from (output(4), output(0), output(2))
        raise KeyboardInterrupt

    file = io.BytesIO()
    with pytest.raises(KeyboardInterrupt):
        write_in_order(stopped(), JsonlWriter(file, "out"))
    assert [json.loads(line)["id"] for line in file.getvalue().splitlines()] == [
        "id-0",
        "id-2",
        "id-4",
    ]
    # Lines of bare text could no longer be told apart.
    text = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        write_in_order(stopped(), TextWriter(text, "out"))
    assert text.getvalue() == "text\n"


def test_terminal_shows_prompt_and_text_but_obeys_no_escape_sequence() -> None:
    file = io.StringIO()
    writer = TerminalWriter(Console(file=file, width=20))
    writer.write(output(0, "[bold]\x1b[2J" + "word " * 10, prompt="a" * 300))
    writer.write(output(1, "two\nlines", prompt=None))
    writer.write(failed(2))
    shown = file.getvalue()
    assert "\x1b" not in shown
    assert "[bold]\ufffd[2J" + "word " * 10 in shown  # not wrapped: it can be copied
    assert "..." + "a" * 200 + " -> " in shown
    assert shown.endswith("request id-1 -> two\nlines\n")


def test_output_path_is_checked_and_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("old")
    check_output_path(str(taken), None)
    check_output_path(str(tmp_path / "new"), str(taken))
    check_output_path("-", "-")
    assert taken.read_text() == "old"
    with pytest.raises(ConfigError, match="is a directory"):
        check_output_path(str(tmp_path), None)
    with pytest.raises(ConfigError, match="no directory"):
        check_output_path(str(tmp_path / "none" / "out"), None)
    with pytest.raises(ConfigError, match=r"File name too long; give another name"):
        check_output_path(str(tmp_path / ("n" * 300)), None)
    with pytest.raises(ConfigError, match="File name too long"):
        check_output_path(str(tmp_path / ("n" * 300) / "out"), None)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
        check_output_path(str(loop), str(taken))
    link = tmp_path / "link"
    link.symlink_to(taken)
    with pytest.raises(ConfigError, match="is the input file"):
        check_output_path(str(link), str(taken))
