"""Are OpenAI Batch files read and written as OpenAI's own types and documents say?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from jobs import config, read, refused, run, write_jsonl
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ConfigDict

from graphengine.errors import OutputError
from graphengine.jobs.openai_batch import OpenAIFormat
from graphengine.jobs.rows import Row
from graphengine.jobs.tasks import Result, Task

CHAT_URL = "/v1/chat/completions"
URL = "/v1/completions"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Response(Strict):
    status_code: int
    request_id: str
    body: dict[str, Any]


class LineError(Strict):
    code: str
    message: str


class OutputLine(Strict):
    """BatchRequestOutput of OpenAI's OpenAPI document; the package has no type for it."""

    id: str
    custom_id: str
    response: Response | None
    error: LineError | None


class ErrorBody(Strict):
    error: dict[str, Any]


def line(url: str = CHAT_URL, custom_id: str = "a", **body: Any) -> dict[str, Any]:
    key = "messages" if url == CHAT_URL else "prompt"
    value = [{"role": "user", "content": "hi"}] if url == CHAT_URL else "hi"
    body = {"model": "m", key: value, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def format_() -> OpenAIFormat:
    return OpenAIFormat(config(Path("in.jsonl"), Path("out.jsonl")), created=1700000000)


def prepare(data: dict[str, Any] | None) -> Task:
    return format_().prepare(Row(7, data, "broken JSON"))


def strict_types(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    """The body as the package's own type; a key that the type lacks is an error too."""
    parsed = kind.model_validate(body, strict=True)
    assert set(body) <= set(kind.model_fields)
    assert not parsed.model_extra
    return parsed


@pytest.mark.parametrize("url", [CHAT_URL, URL])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_response_line_is_of_openai_s_types(url: str, reason: Literal["stop", "length"]) -> None:
    task = prepare(line(url, custom_id="mine"))
    assert task.error == ""
    record = format_().record(task, Result("text", [], reason, 3, 2, ""))
    parsed = OutputLine.model_validate(record)
    assert parsed.custom_id == "mine"
    assert parsed.error is None
    assert parsed.response is not None
    assert parsed.response.status_code == 200
    body = strict_types(ChatCompletion if url == CHAT_URL else Completion, parsed.response.body)
    choice = body.choices[0]
    assert (choice.message.content if url == CHAT_URL else choice.text) == "text"
    assert choice.finish_reason == reason
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (3, 2)
    assert body.usage.total_tokens == 5
    assert body.created == 1700000000
    stored = format_().read_back(record)
    assert (stored.index, stored.row_id, stored.is_failed) == (7, "mine", False)


def test_params_keep_their_openai_meaning() -> None:
    params = prepare(
        line(
            max_completion_tokens=9,
            temperature=0.5,
            top_p=0.9,
            seed=4,
            stop=["a"],
            top_k=3,
            n=1,
            stream=False,
            logprobs=False,
            frequency_penalty=0,
            user="me",
            logit_bias=None,
        )
    ).params
    assert params == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 4,
        "stop": ["a"],
        "top_k": 3,
    }


def test_prompts_of_both_kinds_are_taken() -> None:
    assert prepare(line(URL, prompt="x")).prompt == "x"
    assert prepare(line(URL, prompt=[1, 2])).prompt == {"prompt_token_ids": [1, 2]}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = prepare(line(messages=[{"role": "user", "content": parts}])).prompt
    assert chat == {"messages": [{"role": "user", "content": "ab"}]}


REFUSED = {
    "unknown option": (line(heat=1), "unknown option 'heat'; choose from"),
    "unsupported option": (line(n=2), "n is 2, which is not supported"),
    "tools": (line(tools=[{"type": "function"}]), "tools is"),
    "chat option in a completion": (line(URL, max_completion_tokens=3), "unknown option"),
    "both limits": (line(max_tokens=1, max_completion_tokens=2), "are both set"),
    "out of range": (line(temperature=-1), "temperature is -1"),
    "wrong type": (line(max_tokens="9"), "max_tokens is '9'"),
    "no messages": (line(messages=[]), "messages is []"),
    "an image": (
        line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "give text parts alone",
    ),
    "several prompts": (line(URL, prompt=["a", "b"]), "give one string or a list of token ids"),
    "no prompt": (line(URL, prompt=None), "prompt is None"),
}


@pytest.mark.parametrize(("data", "error"), REFUSED.values(), ids=REFUSED)
def test_refused_request_is_a_line_with_status_400(data: dict[str, Any], error: str) -> None:
    task = prepare(data)
    assert error in task.error
    parsed = OutputLine.model_validate(format_().record(task, Result.failed(task.error)))
    assert parsed.custom_id == "a"
    assert parsed.error is None
    assert parsed.response is not None
    assert parsed.response.status_code == 400
    body = ErrorBody.model_validate(parsed.response.body)
    assert ErrorObject.model_validate(body.error, strict=True).message == task.error


BROKEN = {
    "broken JSON": (None, "broken JSON"),
    "no custom_id": ({"url": URL, "body": {}}, "custom_id is None"),
    "unknown key": ({**line(), "extra": 1}, "the line has 'extra'"),
    "method": ({**line(), "method": "GET"}, "method is 'GET'"),
    "url": ({**line(), "url": "/v1/embeddings"}, "url is '/v1/embeddings'"),
    "body": ({**line(), "body": 5}, "body is 5"),
}


@pytest.mark.parametrize(("data", "error"), BROKEN.values(), ids=BROKEN)
def test_line_that_is_no_request_is_a_line_with_an_error(
    data: dict[str, Any] | None, error: str
) -> None:
    task = prepare(data)
    assert error in task.error
    record = format_().record(task, Result.failed(task.error))
    parsed = OutputLine.model_validate(record)
    assert parsed.response is None
    assert parsed.error is not None
    assert parsed.error.message == task.error
    assert format_().read_back(record).is_failed


def test_batch_file_is_recognised_and_kept_apart_by_custom_id(tmp_path: Path) -> None:
    rows = [line(custom_id="a"), b"{broken", line(URL, custom_id="b"), line(custom_id="a")]
    source = write_jsonl(tmp_path / "in.jsonl", [b"{broken at once", *rows])
    outcome = run(source, tmp_path / "out.jsonl", order="input")
    assert outcome.stats.num_failed == 3
    lines = [OutputLine.model_validate(row) for row in read(tmp_path / "out.jsonl")]
    assert [found.id for found in lines] == [f"batch_req_{index}" for index in range(5)]
    assert [found.custom_id for found in lines] == ["", "a", "", "b", "a"]
    codes = [found.response.status_code if found.response else None for found in lines]
    assert codes[:4] == [None, 200, None, 200]
    assert "id 'a' is that of row 1 too" in str(read(tmp_path / "out.jsonl")[4])
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(source, tmp_path / "out.jsonl", order="input").stats.num_before == 5
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", ["+1", "1_0", " 1", "01", "\u0661", "", "1" * 5000])
def test_id_that_no_job_writes_is_no_line_of_one(number: str) -> None:
    record = format_().record(prepare(line()), Result("", [], "stop", 1, 1, ""))
    with pytest.raises((TypeError, ValueError)):
        format_().read_back({**record, "id": f"batch_req_{number}"})


@pytest.mark.parametrize("index", [-1, 2])
def test_line_that_the_batch_has_not_is_refused(tmp_path: Path, index: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [line(custom_id="a"), line(custom_id="b")])
    out = tmp_path / "out.jsonl"
    run(source, out)
    more = {**read(out)[0], "id": f"batch_req_{index}", "custom_id": "c"}
    write_jsonl(out, [*read(out), more])
    with pytest.raises(OutputError, match=f"row {index} stands there, "):
        refused(run(source, out))
