"""How does Ray Data use an engine? A class for `Dataset.map_batches`, for more than one machine.

    dataset.map_batches(
        LLMBatches,
        fn_constructor_kwargs={"model": "demo", "prompt_column": "question"},
        batch_format="pyarrow", batch_size=64, concurrency=2, num_gpus=1,
    )

Ray calls `__call__` for several batches of one actor at once. All their rows go to one engine,
which starts rows of the next batch as rows of this one end: the end of a batch leaves no gap.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import orjson

from graphengine.config import engine_config
from graphengine.errors import ConfigError
from graphengine.jobs.config import JobConfig
from graphengine.jobs.extras import require
from graphengine.jobs.feed import Feed
from graphengine.jobs.row_format import RowFormat
from graphengine.jobs.rows import Row
from graphengine.jobs.tasks import Result, Task
from graphengine.request import Request, RequestOutput, SamplingParams


class LLMBatches:
    """Adds text, finish_reason, num_prompt_tokens, num_output_tokens and error to a batch, each
    with `prefix` before its name, and token_ids if asked for; a row that cannot be served has an
    error. The columns and their types are the same for every batch.

    A row's seed comes from the engine's seed and the row's id, or from its prompt where there is no
    id_column: rows with one prompt then get one text."""

    def __init__(
        self,
        model: str,
        *,
        sampling: Mapping[str, Any] | None = None,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        template: str | None = None,
        id_column: str | None = None,
        sampling_column: str | None = None,
        token_ids: bool = False,
        prefix: str = "",
        **engine: Any,
    ) -> None:
        """sampling: fields of SamplingParams; greedy and 256 tokens unless told, as on the command
        line. engine: fields of EngineConfig. The rest is as in a job. Loads the model; raises
        GraphEngineError for whatever a user can fix."""
        config = JobConfig(
            engine=engine_config(model, **engine),
            sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 256, **(sampling or {})}),
            input="",
            output="",
            prompt_column=prompt_column,
            messages_column=messages_column,
            template=template,
            id_column=id_column,
            sampling_column=sampling_column,
            token_ids=token_ids,
        )
        self._config = config
        self._format = RowFormat(config, None)
        self._prefix = prefix
        self._engine = _Engine(config)

    async def __call__(self, batch: Any) -> Any:
        """batch: a pyarrow Table. Gives one with the same rows in the same order."""
        columns = self._columns()
        taken = [name for name in columns if name in batch.column_names]
        if taken:
            raise ConfigError(
                f"the batch has {', '.join(map(repr, taken))} already; give another prefix="
            )
        tasks = [self._task(data) for data in batch.to_pylist()]
        results = await asyncio.gather(*map(self._run, tasks))
        for name, kind in columns.items():
            field = name.removeprefix(self._prefix)
            values = [getattr(result, field) for result in results]
            batch = batch.append_column(name, require("pyarrow").array(values, kind))
        return batch

    def close(self) -> None:
        """Frees the device. Ends with what was handed in."""
        self._engine.close()

    def _columns(self) -> dict[str, Any]:
        pa = require("pyarrow")
        kinds = {
            "text": pa.string(),
            **({"token_ids": pa.list_(pa.int32())} if self._config.token_ids else {}),
            "finish_reason": pa.string(),
            "num_prompt_tokens": pa.int64(),
            "num_output_tokens": pa.int64(),
            "error": pa.string(),
        }
        return {self._prefix + name: kind for name, kind in kinds.items()}

    def _task(self, data: dict[str, Any]) -> Task:
        task = self._format.prepare(Row(0, data))
        # A row's place among all rows is not known here; what it is stands for it.
        name = task.row_id if self._config.id_column is not None else orjson.dumps(task.prompt)
        key = name.encode() if isinstance(name, str) else name
        index = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
        return self._format.prepare(Row(index, data))

    async def _run(self, task: Task) -> Result:
        if task.error:
            return Result.failed(task.error)
        params = dataclasses.replace(self._config.sampling, **task.params)
        output = await asyncio.wrap_future(self._engine.submit(task.prompt, params))
        completion = output.outputs[0]
        return Result(
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=str(completion.finish_reason),
            num_prompt_tokens=len(output.prompt_token_ids),
            num_output_tokens=len(completion.token_ids),
            error=output.error,
        )


class _Engine:
    """An LLM in a thread of its own, that takes requests at any time."""

    def __init__(self, config: JobConfig) -> None:
        from graphengine.engine import LLM  # imports torch, which takes seconds

        self._llm = LLM(**dataclasses.asdict(config.engine))
        self._feed = Feed()
        self._numbers = itertools.count()
        self._waiting: dict[str, Future[RequestOutput]] = {}
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | Mapping[str, Any], params: SamplingParams
    ) -> Future[RequestOutput]:
        future: Future[RequestOutput] = Future()
        with self._lock:
            if self._error is not None:
                raise RuntimeError("the engine has stopped") from self._error
            number = str(next(self._numbers))
            self._waiting[number] = future
            self._feed.put(Request(prompt, params, number))
        return future

    def close(self) -> None:
        self._feed.end()
        self._thread.join()
        self._llm.close()

    def _run(self) -> None:
        error: BaseException = RuntimeError("the engine was closed")
        try:
            for output in self._llm.stream(self._feed):
                future = self._waiting.pop(output.request_id)
                if future.set_running_or_notify_cancel():  # its batch may have been given up
                    future.set_result(output)
        except BaseException as raised:  # whoever waits must hear of it
            error = raised
        with self._lock:
            self._error = error
            waiting: Sequence[Future[RequestOutput]] = list(self._waiting.values())
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
