"""What passes through a job? One row as a task, its result, and what each format makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from graphengine.jobs.rows import Row
from graphengine.request import FinishReason


@dataclass(slots=True)
class Task:
    """One row on its way. error: set if the row never reaches the engine.

    prompt: as in a Request. params: fields of SamplingParams that differ from the job's; the seed
    is always among them. extra: what its format needs again to write it."""

    index: int
    row_id: str
    prompt: str | dict[str, Any] = ""
    params: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    num_deaths: int = 0  # of workers, while it was in their hands


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a task. error: "" unless finish_reason is "error"."""

    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    error: str

    @classmethod
    def failed(cls, error: str) -> Result:
        return cls("", [], str(FinishReason.ERROR), 0, 0, error)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a finished row of the output tells a resumed job."""

    index: int
    row_id: str
    is_failed: bool


class Format(Protocol):
    """How rows are understood and written."""

    def columns(self) -> frozenset[str] | None:
        """Of the input, those that are read; None reads all."""

    def prepare(self, row: Row) -> Task:
        """Never raises for what a row holds: the task then has an error."""

    def unmet(self) -> list[str]:
        """Options that none of the prepared rows had anything for, a line each: slips, perhaps."""

    def record(self, task: Task, result: Result) -> dict[str, Any]:
        """One line of the output."""

    def read_back(self, record: Mapping[str, Any]) -> Stored:
        """What `record` wrote. Raises KeyError, TypeError or ValueError for anything else."""
