"""Which rows are this machine's? Every n-th one, for machines that share nothing but the input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphengine.errors import ConfigError

SLURM = "slurm"


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows whose index leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    def __contains__(self, row_index: int) -> bool:
        return row_index % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def num_rows(self, total: int) -> int:
        """Of `total` rows, those that are in it."""
        return (total - self.index + self.count - 1) // self.count

    def output(self, output: str) -> str:
        """Its own place: out.jsonl becomes out-00002-of-00008.jsonl, and a directory has one
        shard-00002-of-00008 for each."""
        if self.count == 1:
            return output
        name = f"{self.index:05d}-of-{self.count:05d}"
        path = Path(output)
        if path.suffix:
            return str(path.with_name(f"{path.stem}-{name}{path.suffix}"))
        return str(path / f"shard-{name}")


def parse_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """Of "2/8", or of Slurm's variables for "slurm": tasks of an array job, tasks of a step, or
    both. Raises ConfigError."""
    if text is None:
        return Shard()
    if text == SLURM:
        return _of_slurm(environment)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--shard is {text!r}; give i/n with i from 0 to n - 1, or {SLURM}")
    return Shard(int(match[1]), int(match[2]))


def _of_slurm(environment: Mapping[str, str]) -> Shard:
    task, tasks = (
        _number(environment, "SLURM_PROCID", 0),
        _number(environment, "SLURM_NTASKS", 1),
    )
    if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in environment:
        # A batch script is itself task 0 of as many as were asked for, and runs alone.
        raise ConfigError(
            f"--shard slurm: {tasks} tasks were asked for, but this is not one of a step's; start "
            "it with srun, or give --shard i/n"
        )
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        place, rest = divmod(_number(environment, "SLURM_ARRAY_TASK_ID", 0) - first, max(1, step))
        count = _number(environment, "SLURM_ARRAY_TASK_COUNT", 0)
        if rest or not 0 <= place < count:
            raise ConfigError(
                f"--shard slurm: task {environment['SLURM_ARRAY_TASK_ID']} is not one of {count} "
                "that follow one another; submit with --array=0-N, or give --shard i/n"
            )
        return Shard(place * tasks + task, count * tasks)
    if "SLURM_PROCID" not in environment:
        raise ConfigError(
            "--shard slurm: neither SLURM_ARRAY_TASK_ID nor SLURM_PROCID is set; start it with "
            "srun or sbatch --array, or give --shard i/n"
        )
    if not task < tasks:
        raise ConfigError(f"--shard slurm: task {task} of {tasks}; give --shard i/n")
    return Shard(task, tasks)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"--shard slurm: {name} is {text!r}, not a number; give --shard i/n")
    return int(text)
