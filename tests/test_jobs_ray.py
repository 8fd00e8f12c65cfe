"""Does Ray Data run the model, with one schema for every batch and batches that overlap?"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import job_engines
import pyarrow as pa
import pytest

import graphengine.engine
from graphengine.errors import ConfigError
from graphengine.jobs.ray_data import LLMBatches
from graphengine.request import Request, RequestOutput

COLUMNS = ["text", "finish_reason", "num_prompt_tokens", "num_output_tokens", "error"]


class WaitingLLM(job_engines.EchoLLM):
    """Answers nothing before it has 12 requests at once."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self.is_closed = False

    def stream(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        reader = iter(requests)
        held = [next(reader) for _ in range(12)]
        for index, request in enumerate(held):
            yield self._answer(index, request)
        for index, request in enumerate(reader):
            yield self._answer(index, request)

    def close(self) -> None:
        self.is_closed = True


class DyingLLM(WaitingLLM):
    def stream(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        next(iter(requests))
        raise RuntimeError("the device is gone")
        yield


def batch(*prompts: str | None) -> pa.Table:
    return pa.table({"q": pa.array(prompts, pa.string()), "n": range(len(prompts))})


def batches(monkeypatch: pytest.MonkeyPatch, engine: type, **options: Any) -> LLMBatches:
    monkeypatch.setattr(graphengine.engine, "LLM", engine)
    return LLMBatches("demo", prompt_column="q", **options)


async def call_together(made: LLMBatches, tables: list[pa.Table]) -> list[pa.Table]:
    return await asyncio.wait_for(asyncio.gather(*map(made, tables)), timeout=20)


def test_rows_of_several_batches_are_in_the_engine_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = batches(monkeypatch, WaitingLLM)
    tables = [batch("a", "b", None, "c", "d") for _ in range(3)]
    # One batch alone has 4 rows for the engine, and would wait for ever.
    found = asyncio.run(call_together(made, tables))
    for table in found:
        assert table.column_names == ["q", "n", *COLUMNS]
        rows = table.to_pylist()
        assert [row["q"] for row in rows] == ["a", "b", None, "c", "d"]
        assert [row["text"][:3] for row in rows] == ["<a>", "<b>", "", "<c>", "<d>"]
        assert rows[2]["error"] == "prompt is None; give a string"
        assert [row["error"] for row in rows if row["q"]] == [""] * 4
    assert found[0] == found[1], "a row's seed is its own"
    made.close()


async def call_and_give_one_up(made: LLMBatches) -> list[pa.Table]:
    given_up = asyncio.ensure_future(made(batch("a", "b", "c", "d")))
    await asyncio.sleep(0.2)  # its requests are in the engine
    given_up.cancel()
    return await call_together(made, [batch("e", "f", "g", "h"), batch("i", "j", "k", "l")])


def test_batch_that_is_given_up_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first output for it had ended the engine, and who waited then waited for ever."""
    made = batches(monkeypatch, WaitingLLM)
    found = asyncio.run(call_and_give_one_up(made))
    assert [row["error"] for table in found for row in table.to_pylist()] == [""] * 8
    made.close()


class GivenUpLLM(WaitingLLM):
    """Dies when it has 8 requests, of which some are given up by then."""

    def stream(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        reader = iter(requests)
        for _ in range(8):
            next(reader)
        raise RuntimeError("the device is gone")
        yield


def test_who_waits_beside_a_batch_that_is_given_up_hears_of_a_dead_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = batches(monkeypatch, GivenUpLLM)
    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(call_and_give_one_up(made))


def test_schema_is_the_same_for_batches_of_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches(monkeypatch, WaitingLLM, token_ids=True, prefix="llm_")
    good, bad = asyncio.run(call_together(made, [batch(*"abcdefghijkl"), batch(None, None)]))
    assert good.schema == bad.schema
    assert [name for name in good.column_names if name.startswith("llm_")] == [
        "llm_text",
        "llm_token_ids",
        *(f"llm_{name}" for name in COLUMNS[1:]),
    ]
    made.close()


def test_column_that_is_there_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches(monkeypatch, WaitingLLM)
    table = pa.table({"q": ["a"], "text": ["b"]})
    with pytest.raises(ConfigError, match="the batch has 'text' already; give another prefix="):
        asyncio.run(call_together(made, [table]))


def test_engine_that_dies_fails_every_batch_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches(monkeypatch, DyingLLM)
    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(call_together(made, [batch("a", "b", "c")]))
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        asyncio.run(call_together(made, [batch("a")]))


def test_ray_runs_the_demo_model(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    # Its workers import what this process can.
    path = os.pathsep.join(filter(None, sys.path))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    try:
        rows = [{"q": f"{n}+{n}=" if n % 10 else None, "n": n} for n in range(120)]
        dataset = ray.data.from_items(rows).map_batches(
            LLMBatches,
            fn_constructor_kwargs={"model": "demo", "prompt_column": "q", "device": "cpu"},
            batch_format="pyarrow",
            batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        dataset.write_parquet(str(tmp_path / "out"))
    finally:
        ray.shutdown()
    import pandas

    frame = pandas.read_parquet(tmp_path / "out").sort_values("n").to_dict("records")
    assert [row["n"] for row in frame] == list(range(120))
    for row in frame:
        wanted = ("", "error") if row["n"] % 10 == 0 else (str(2 * row["n"]), "stop")
        assert (row["text"], row["finish_reason"]) == wanted
        assert bool(row["error"]) == (row["n"] % 10 == 0)
