"""How are plain rows understood and written? Columns in, a record with a constant schema out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from graphengine.entry import checked_prompt, id_of, prompt_of
from graphengine.errors import RequestError
from graphengine.intake import derived_seed
from graphengine.jobs.config import JobConfig
from graphengine.jobs.rows import Row
from graphengine.jobs.sampling import overrides
from graphengine.jobs.tasks import Result, Stored, Task
from graphengine.jobs.template import RowTemplate
from graphengine.request import PROMPT_KEYS, check_text

STRING = "string"


class RowFormat:
    """A prompt from --template, --prompt-column or --messages-column, or else from a column named
    as a key of a Request is."""

    def __init__(self, config: JobConfig, kept_types: Mapping[str, str] | None) -> None:
        """kept_types: of each column kept, the type it has in Parquet; None keeps any JSON value,
        as JSONL can."""
        self._config = config
        self._kept_types = kept_types
        self._template = RowTemplate(config.template) if config.template is not None else None
        self._id_key = config.id_column or "id"
        # Options, and columns of theirs that a row may lack without an error: those that no row has
        # had yet.
        self._unseen = [("--keep-columns", old) for old, _ in config.keep]
        if config.sampling_column is not None:
            self._unseen.append(("--sampling-column", config.sampling_column))
        self._has_prepared = False

    def columns(self) -> frozenset[str] | None:
        config = self._config
        names = {self._id_key, config.sampling_column or "", *(old for old, _ in config.keep)}
        if self._template is not None:
            return frozenset(names | self._template.columns)
        given = {config.prompt_column or "", config.messages_column or ""} - {""}
        return frozenset(names | (given or set(PROMPT_KEYS)))

    def prepare(self, row: Row) -> Task:
        task = Task(row.index, str(row.index))
        data = row.data
        if data is None:
            task.error = row.error
            return task
        self._has_prepared = True
        if self._unseen:
            self._unseen = [(option, name) for option, name in self._unseen if name not in data]
        try:
            task.extra = {new: self._kept(old, data.get(old)) for old, new in self._config.keep}
            if self._config.id_column is not None and data.get(self._id_key) is None:
                raise RequestError(f"has no {self._id_key!r}, the column of ids")
            task.row_id = id_of(data, self._id_key) or task.row_id
            task.prompt = self._prompt(data)
            column = self._config.sampling_column
            if column is not None:
                task.params = overrides(data.get(column), column, self._config.sampling)
        except RequestError as error:
            task.error = str(error)
        except (TypeError, ValueError, OverflowError) as error:
            # A value of a Parquet column that no JSON has.
            task.error = f"a value cannot be taken: {' '.join(str(error).split())}"
        if "seed" not in task.params:
            task.params["seed"] = derived_seed(self._config.engine.seed, row.index)
        return task

    def unmet(self) -> list[str]:
        if not self._has_prepared:
            return []
        return [
            f"{option} {name!r}: no row of this run has that column"
            for option, name in dict.fromkeys(self._unseen)
        ]

    def record(self, task: Task, result: Result) -> dict[str, Any]:
        tokens = {"token_ids": result.token_ids} if self._config.token_ids else {}
        kept = task.extra or {new: None for _, new in self._config.keep}
        return {
            "id": task.row_id,
            "row_index": task.index,
            **kept,
            "text": result.text,
            **tokens,
            "finish_reason": result.finish_reason,
            "num_prompt_tokens": result.num_prompt_tokens,
            "num_output_tokens": result.num_output_tokens,
            "error": result.error,
        }

    def read_back(self, record: Mapping[str, Any]) -> Stored:
        index, row_id, error = record["row_index"], record["id"], record["error"]
        is_index = isinstance(index, int) and not isinstance(index, bool)
        if not is_index or not isinstance(row_id, str) or not isinstance(error, str):
            raise TypeError("not a record of a job")
        return Stored(index, row_id, bool(error))

    def _prompt(self, data: dict[str, Any]) -> str | dict[str, Any]:
        config = self._config
        if self._template is not None:
            text = self._template.render(data)
            check_text("the prompt", text)
            return checked_prompt("prompt", text)
        if config.prompt_column is not None:
            return checked_prompt("prompt", _column(data, config.prompt_column))
        if config.messages_column is not None:
            messages = _column(data, config.messages_column)
            return checked_prompt("messages", _as_json(_without_nulls(messages)))
        # A column that a Parquet file has for other rows is null in this one.
        given = {key: data[key] for key in PROMPT_KEYS if data.get(key) is not None}
        if "messages" in given:
            given["messages"] = _as_json(_without_nulls(given["messages"]))
        return prompt_of(given or {key: data[key] for key in PROMPT_KEYS if key in data})

    def _kept(self, name: str, value: object) -> object:
        """The value as the output can hold it."""
        if self._kept_types is None or value is None:
            return _as_json(value)
        if self._kept_types[name] != STRING or isinstance(value, str):
            return value
        as_json = _as_json(value)
        return as_json if isinstance(as_json, str) else orjson.dumps(as_json).decode()


def _column(data: Mapping[str, object], name: str) -> object:
    if name not in data:
        raise RequestError(f"has no column {name!r}; it has {', '.join(map(repr, data)) or 'none'}")
    return data[name]


def _without_nulls(messages: object) -> object:
    """Messages without the keys that only other messages of a Parquet column have."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _as_json(value: object) -> Any:
    """A value of a Parquet column as JSON has it: times and numbers of other kinds as text."""
    if value is None or isinstance(value, str | int | float):
        return value
    return orjson.loads(orjson.dumps(value, default=_as_text, option=orjson.OPT_NON_STR_KEYS))


def _as_text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
