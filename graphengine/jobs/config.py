"""What does a user ask of a job? One frozen dataclass, validated when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from graphengine.config import EngineConfig
from graphengine.errors import ConfigError
from graphengine.jobs.shard import Shard
from graphengine.request import SamplingParams, brief, check_text

ORDERS = ("completion", "input")
# Each is a process with an engine of its own: more is taken for a slip of the keyboard, which would
# fill the memory.
MAX_WORKERS = 256
# What the output has of its own.
COLUMNS = (
    "id",
    "row_index",
    "text",
    "token_ids",
    "finish_reason",
    "num_prompt_tokens",
    "num_output_tokens",
    "error",
)
# Engine options that change the speed and never a row.
_SPEED_OPTIONS = (
    "model",  # their fingerprints are kept instead
    "tokenizer",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "enforce_eager",
    "tuning",  # but for "off", under which attention "auto" is another: see `meaning`
    "async_scheduling",
    "trace",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """keep: columns of the input that the output has too, as (name, name there).
    workers: None is one for each GPU, or one on the CPU. order: of the output's rows.
    part_rows: of a Parquet part, at most."""

    engine: EngineConfig
    sampling: SamplingParams
    input: str
    output: str
    prompt_column: str | None = None
    messages_column: str | None = None
    id_column: str | None = None
    sampling_column: str | None = None
    template: str | None = None
    keep: tuple[tuple[str, str], ...] = ()
    token_ids: bool = False
    order: str = "completion"
    retry_errors: bool = False
    workers: int | None = 1
    shard: Shard = field(default_factory=Shard)
    part_rows: int = 50_000

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option, its value and what is accepted, and RequestError
        for one that is no text."""
        # Workers are told of paths in JSON, and the output's is where its job keeps `tuning`. A
        # column or template that is no text would make every row an error.
        for option, text in (
            ("MODEL", self.engine.model),
            ("--tokenizer", self.engine.tokenizer),
            ("--tuning", self.engine.tuning),
            ("--trace", self.engine.trace),
            ("--output", self.output),
            ("--template", self.template),
            ("--prompt-column", self.prompt_column),
            ("--messages-column", self.messages_column),
            ("--id-column", self.id_column),
            ("--sampling-column", self.sampling_column),
            *(("--keep-columns", name) for pair in self.keep for name in pair),
        ):
            check_text(option, text or "")
        sources = {
            "--template": self.template,
            "--prompt-column": self.prompt_column,
            "--messages-column": self.messages_column,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each make a prompt; give one of them")
        if self.engine.skip_tokenizer_init:
            # Every row would be an error.
            texts = given + ["--stop"] * bool(self.sampling.stop)
            if texts:
                raise ConfigError(
                    f"{texts[0]} needs a tokenizer; leave out --skip-tokenizer-init, or give rows "
                    "with prompt_token_ids, and --stop-token-ids"
                )
        if self.order not in ORDERS:
            raise ConfigError(f"--order is {self.order!r}; choose one of {', '.join(ORDERS)}")
        if self.workers is not None and not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(
                f"--workers is {brief(self.workers)}; give 1 to {MAX_WORKERS}, each a process with "
                "an engine of its own, or auto"
            )
        if self.part_rows < 1:
            raise ConfigError(f"--part-rows is {self.part_rows}; give 1 or more")
        taken = set(COLUMNS)
        for old, new in self.keep:
            if not old or not new:
                raise ConfigError(f"--keep-columns has {old!r}={new!r}; give NAME or NAME=NEW")
            if new in taken:
                raise ConfigError(
                    f"--keep-columns {new}: the output has a column of that name; "
                    f"write {old}=NEW for another"
                )
            taken.add(new)

    @property
    def has_prompt_option(self) -> bool:
        return (self.template, self.prompt_column, self.messages_column) != (None, None, None)

    @property
    def has_columns(self) -> bool:
        """Whether an option names a column, as OpenAI Batch files have none."""
        others = (self.id_column, self.sampling_column)
        return self.has_prompt_option or bool(self.keep) or others != (None, None)

    def meaning(self) -> dict[str, Any]:
        """All that decides what a finished row looks like, as JSON: a job goes on only under the
        same."""
        engine = dataclasses.asdict(self.engine)
        return {
            **{f"engine.{name}": v for name, v in engine.items() if name not in _SPEED_OPTIONS},
            # See _SPEED_OPTIONS. None where it is another: how they differ matters to no row.
            "engine.tuning": "off" if self.engine.tuning == "off" else None,
            **{
                f"sampling.{name}": list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.sampling).items()
            },
            "prompt_column": self.prompt_column,
            "messages_column": self.messages_column,
            "id_column": self.id_column,
            "sampling_column": self.sampling_column,
            "template": self.template,
            "keep_columns": [f"{old}={new}" for old, new in self.keep],
            "token_ids": self.token_ids,
            "order": self.order,
            "shard": str(self.shard),
        }


def parse_keep(values: list[str]) -> tuple[tuple[str, str], ...]:
    """Of "question,text=source": (question, question), (text, source)."""
    pairs = []
    for part in (part for value in values for part in value.split(",")):
        old, equals, new = part.strip().partition("=")
        pairs.append((old.strip(), new.strip() if equals else old.strip()))
    return tuple(pairs)
