"""How are OpenAI Batch files understood and written? Request lines in, response lines out.

The formats are those of OpenAI's Batch API reference ("The request input object", "The request
output object"). A line of the output has the row's index in its `id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphengine.entry import checked_prompt
from graphengine.errors import RequestError
from graphengine.intake import derived_seed
from graphengine.jobs.config import JobConfig
from graphengine.jobs.rows import Row
from graphengine.jobs.sampling import checked
from graphengine.jobs.tasks import Result, Stored, Task
from graphengine.request import SamplingParams, brief

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
_KEYS = ("custom_id", "method", "url", "body")
_LINE_ID = "batch_req_"
_OK = 200
_BAD_REQUEST = 400

# Options with our own meaning under their own name, or another: the first three are vLLM's too.
_SAMPLING = {
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
}
# Options that change nothing in what is generated.
_IGNORED = {"model", "user", "metadata", "store", "service_tier", "safety_identifier"}
# Options that are not supported, with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}


def is_request(data: Mapping[str, Any] | None) -> bool:
    """Whether a row is a line of an OpenAI Batch file."""
    return data is not None and {"custom_id", "url", "body"} <= data.keys()


class OpenAIFormat:
    """created: seconds since 1970, for all responses of a job, so that a resumed job writes the
    same lines."""

    def __init__(self, config: JobConfig, *, created: int) -> None:
        self._sampling = config.sampling
        self._seed = config.engine.seed
        self._model = config.engine.model
        self._created = created

    def columns(self) -> None:
        return None

    def prepare(self, row: Row) -> Task:
        """extra: `url` once the line is a request; without it the error is the line's."""
        task = Task(row.index, "", params={"seed": derived_seed(self._seed, row.index)})
        if row.data is None:
            task.error = row.error
            return task
        try:
            url, body = self._request(row.data, task)
            task.extra["url"] = url
            if url == CHAT_URL:
                task.prompt = checked_prompt("messages", body.get("messages"))
            else:
                task.prompt = _prompt(body)
            task.params |= _params(body, url, self._sampling)
        except RequestError as error:
            task.error = str(error)
        return task

    def unmet(self) -> list[str]:
        return []

    def record(self, task: Task, result: Result) -> dict[str, Any]:
        response, error = None, None
        if not result.error:
            response = self._response(task, _OK, self._body(task, result))
        elif "url" in task.extra:
            # As an HTTP server would refuse this request; `error` is for what never became one.
            response = self._response(task, _BAD_REQUEST, {"error": _error_body(result.error)})
        else:
            error = {"code": "invalid_request_line", "message": result.error}
        return {
            "id": f"{_LINE_ID}{task.index}",
            "custom_id": task.row_id,
            "response": response,
            "error": error,
        }

    def read_back(self, record: Mapping[str, Any]) -> Stored:
        line_id, row_id, response = record["id"], record["custom_id"], record["response"]
        index = int(line_id.removeprefix(_LINE_ID))
        # int takes "+5", "0_5" and the digits of other scripts too.
        if line_id != f"{_LINE_ID}{index}" or not isinstance(row_id, str):
            raise TypeError("not a line of a job")
        is_failed = response is None or response["status_code"] != _OK
        return Stored(index, row_id, is_failed)

    def _request(self, data: Mapping[str, Any], task: Task) -> tuple[str, Mapping[str, Any]]:
        """The line's url and body."""
        custom_id = data.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise RequestError(f"custom_id is {brief(custom_id)}; give a string")
        task.row_id = custom_id
        for key in data:
            if key not in _KEYS:
                raise RequestError(f"the line has {key!r}; give {', '.join(_KEYS)} alone")
        if data.get("method", "POST") != "POST":
            raise RequestError(f"method is {brief(data['method'])}; give 'POST'")
        url, body = data.get("url"), data.get("body")
        if url not in (CHAT_URL, COMPLETIONS_URL):
            raise RequestError(f"url is {brief(url)}; give {CHAT_URL} or {COMPLETIONS_URL}")
        if not isinstance(body, dict):
            raise RequestError(f"body is {brief(body)}; give an object")
        assert isinstance(url, str)
        return url, body

    def _response(self, task: Task, status_code: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"status_code": status_code, "request_id": f"req_{task.index}", "body": body}

    def _body(self, task: Task, result: Result) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        choice["finish_reason"] = result.finish_reason
        if task.extra["url"] == CHAT_URL:
            name, kind = "chatcmpl", "chat.completion"
            choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
        else:
            name, kind = "cmpl", "text_completion"
            choice["text"] = result.text
        return {
            "id": f"{name}-{task.index}",
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": result.num_prompt_tokens,
                "completion_tokens": result.num_output_tokens,
                "total_tokens": result.num_prompt_tokens + result.num_output_tokens,
            },
        }


def _error_body(message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def _params(body: Mapping[str, Any], url: str, default: SamplingParams) -> dict[str, Any]:
    """The sampling parameters that `body` sets. Raises RequestError for an option that would
    otherwise seem to have an effect."""
    names = dict(_SAMPLING)
    if url == CHAT_URL:
        names["max_completion_tokens"] = "max_tokens"
    given: dict[str, Any] = {}
    for option, value in body.items():
        if option in _IGNORED or option == _INPUT[url] or value is None:
            continue
        if option in names:
            if names[option] in given:
                raise RequestError("max_tokens and max_completion_tokens are both set; give one")
            given[names[option]] = value
        elif option not in _NEUTRAL:
            known = sorted({*names, *_NEUTRAL, *_IGNORED, _INPUT[url]})
            raise RequestError(f"unknown option {option!r}; choose from {', '.join(known)}")
        elif not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in _NEUTRAL[option]
        ):
            raise RequestError(f"{option} is {brief(value)}, which is not supported; leave it out")
    return checked(given, default)


_INPUT = {CHAT_URL: "messages", COMPLETIONS_URL: "prompt"}


def _prompt(body: Mapping[str, Any]) -> str | dict[str, Any]:
    prompt = body.get("prompt")
    is_tokens = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    if not is_tokens and not isinstance(prompt, str):
        raise RequestError(f"prompt is {brief(prompt)}; give one string or a list of token ids")
    return checked_prompt("prompt_token_ids" if is_tokens else "prompt", prompt)
