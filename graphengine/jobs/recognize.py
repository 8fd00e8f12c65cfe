"""What do the rows of an input look like? Its format, and what its columns become in Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from graphengine.errors import ConfigError, InputError
from graphengine.jobs.config import JobConfig
from graphengine.jobs.inputs import PARQUET, InputFile
from graphengine.jobs.openai_batch import OpenAIFormat, is_request
from graphengine.jobs.row_format import STRING, RowFormat
from graphengine.jobs.rows import RowSource, open_parquet
from graphengine.jobs.store import kept_type
from graphengine.jobs.tasks import Format
from graphengine.request import PROMPT_KEYS

ROWS, OPENAI = "rows", "openai"
# Rows looked at for the format: the first may be broken.
_MOST_PEEKED = 100


def recognize(files: Sequence[InputFile], config: JobConfig, *, is_parquet_output: bool) -> str:
    """OPENAI for an OpenAI Batch file, else ROWS. Raises InputError for an input without rows, or
    if a Parquet file cannot be read or lacks a column; ConfigError for an option that does not go
    with the format."""
    if files[0].kind == PARQUET:
        _check_columns(files, config)
        return ROWS
    peeked = list(islice(RowSource(files, lambda _: True), _MOST_PEEKED))
    if not peeked:
        raise InputError(f"{config.input}: holds no row; give a JSON object a line")
    first = next((row.data for row in peeked if row.data is not None), None)
    if not is_request(first) or config.has_columns:
        return ROWS
    if is_parquet_output:
        raise ConfigError(f"--output {config.output}: OpenAI lines are JSON; give a .jsonl file")
    if config.token_ids:
        raise ConfigError("--token-ids: OpenAI lines have no place for them; leave it out")
    return OPENAI


def make_format(
    name: str, config: JobConfig, types: Mapping[str, str] | None, *, created: int
) -> Format:
    """types: see `parquet_types`; None for JSONL."""
    if name == OPENAI:
        return OpenAIFormat(config, created=created)
    return RowFormat(config, types)


def parquet_types(files: Sequence[InputFile], config: JobConfig) -> dict[str, str]:
    """For each column kept, by its name in the input, its type in a Parquet output: as in a Parquet
    input where it is a plain one, else text. Raises InputError if two files differ."""
    names = [old for old, _ in config.keep]
    if files[0].kind != PARQUET:
        return dict.fromkeys(names, STRING)
    found: dict[str, str] = {}
    for file in files:
        schema = open_parquet(file.path).schema_arrow
        for name in names:
            kind = kept_type(schema.field(name).type)
            if found.setdefault(name, kind) != kind:
                raise InputError(
                    f"{file.path}: column {name!r} is {kind}, in {files[0].path.name} it is "
                    f"{found[name]}; give files of one schema"
                )
    return found


def _check_columns(files: Sequence[InputFile], config: JobConfig) -> None:
    named = (
        config.prompt_column,
        config.messages_column,
        config.id_column,
        config.sampling_column,
        *(old for old, _ in config.keep),
    )
    needed = [name for name in named if name is not None]
    used = RowFormat(config, None).columns()
    num_rows = 0
    for file in files:
        parquet = open_parquet(file.path)
        num_rows += parquet.metadata.num_rows
        columns = parquet.schema_arrow.names
        shown = ", ".join(map(repr, columns)) or "none"
        for name in needed:
            if name not in columns:
                raise InputError(f"{file.path}: no column {name!r}; it has {shown}")
        for name in sorted(used or ()):
            if columns.count(name) > 1:
                raise InputError(f"{file.path}: has two columns {name!r}; rename one of them")
        if not config.has_prompt_option and not set(PROMPT_KEYS) & set(columns):
            raise InputError(
                f"{file.path}: no column {' or '.join(PROMPT_KEYS)}; it has {shown}; name one with "
                "--prompt-column, --messages-column or --template"
            )
    if num_rows == 0:
        raise InputError(f"{config.input}: holds no row; give at least one")
