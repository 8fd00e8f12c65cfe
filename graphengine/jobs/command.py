"""How is a dataset job started from the command line? Parses, calls, prints. Part of `cli.py`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from graphengine.config import TUNING, EngineConfig, engine_config
from graphengine.errors import ConfigError
from graphengine.exit_codes import BAD_INPUT, errors_as_exit_codes, say, tell
from graphengine.options import (
    Attention,
    BlockSize,
    Device,
    Dtype,
    GpuMemoryUtilization,
    IgnoreEos,
    KVCacheMemoryBytes,
    LoadFormat,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MaxTokens,
    MinP,
    MinTokens,
    Model,
    NoGraphs,
    NoOverlap,
    Seed,
    SkipSpecialTokens,
    SkipTokenizerInit,
    Stop,
    StopTokenIds,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
    Trace,
    Tuning,
    environment_defaults,
    parse_ids,
)
from graphengine.output_file import (
    STDOUT,
    check_apart,
    check_output_path,
    print_line,
    write_errors,
)
from graphengine.request import SamplingParams, brief

FAILED_ROWS = 1
WORKERS_LOST = 3
_AUTO = "auto"
_MOST_DIGITS = 1000  # Python refuses to read more than some thousands


def run(
    model: Model,
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="JSONL (plain, .gz, .zst) or Parquet: a file, a glob in quotes, or a directory.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", metavar="OUT", help="A .jsonl file, or a directory for Parquet parts."
        ),
    ],
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column that holds the prompt.")
    ] = None,
    messages_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column that holds a chat.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='The prompt as a Jinja template: "Q: {{question}}".'),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column that holds the id; without it 'id', if any."),
    ] = None,
    sampling_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The column with a row's own sampling, as {'temperature': 0.7}."
        ),
    ] = None,
    keep_columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=NEW][,...]", help="Columns that the output has too. May be repeated."
        ),
    ] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Write the ids of the output tokens too.")
    ] = False,
    order: Annotated[
        str,
        typer.Option(metavar="completion|input", help="Of the output's rows."),
    ] = "completion",
    part_rows: Annotated[int, typer.Option(help="Rows of a Parquet part at most.")] = 50_000,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run the rows again that failed before.")
    ] = False,
    workers: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Engine processes; auto: one for each GPU."),
    ] = "1",
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N|slurm", help="Run every N-th row, from the I-th on."),
    ] = None,
    summary: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="Write the counts of the end there too."),
    ] = None,
    max_tokens: MaxTokens = 256,
    min_tokens: MinTokens = 0,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = EngineConfig.seed,
    stop: Stop = None,
    stop_token_ids: StopTokenIds = None,
    ignore_eos: IgnoreEos = False,
    skip_special_tokens: SkipSpecialTokens = True,
    tokenizer: Tokenizer = None,
    skip_tokenizer_init: SkipTokenizerInit = False,
    dtype: Dtype = EngineConfig.dtype,
    device: Device = EngineConfig.device,
    attention: Attention = EngineConfig.attention,
    load_format: LoadFormat = EngineConfig.load_format,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = EngineConfig.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = EngineConfig.max_num_batched_tokens,
    block_size: BlockSize = None,
    gpu_memory_utilization: GpuMemoryUtilization = EngineConfig.gpu_memory_utilization,
    kv_cache_memory_bytes: KVCacheMemoryBytes = None,
    no_graphs: NoGraphs = False,
    no_overlap: NoOverlap = False,
    tuning: Tuning = EngineConfig.tuning,
    trace: Trace = None,
) -> None:
    """Run a model over a dataset. The same command again goes on where it was left.

    Rows that cannot be served are written with an `error`, and the job goes on. The last line of
    standard output is one JSON object: the counts.

    Exit code: 0, or 1 if rows of the output have an error, 2 for bad input or an output that cannot
    be written, 3 if no worker process is left, 130 after Ctrl-C, 143 after SIGTERM. It is 2 for
    counts that cannot be written only where it would be 0.
    """
    with errors_as_exit_codes():
        from graphengine.jobs.extras import require

        for module in ("orjson", "filelock"):
            require(module)
        from graphengine.errors import WorkersLostError
        from graphengine.jobs.config import JobConfig, parse_keep
        from graphengine.jobs.job import run_job
        from graphengine.jobs.output import Place
        from graphengine.jobs.shard import parse_shard
        from graphengine.jobs.watch import job_report, job_summary
        from graphengine.jobs.workers import choose_devices, worker_trace

        config = JobConfig(
            engine=engine_config(
                model,
                tokenizer=tokenizer,
                skip_tokenizer_init=skip_tokenizer_init,
                dtype=dtype,
                device=device,
                attention=attention,
                load_format=load_format,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=block_size,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                seed=seed,
                enforce_eager=no_graphs,
                async_scheduling=not no_overlap,
                tuning=tuning,
                trace=trace,
            ),
            sampling=SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                stop=tuple(stop or ()),
                stop_token_ids=parse_ids(stop_token_ids or []),
                ignore_eos=ignore_eos,
                skip_special_tokens=skip_special_tokens,
            ),
            input=input,
            output=output,
            prompt_column=prompt_column,
            messages_column=messages_column,
            id_column=id_column,
            sampling_column=sampling_column,
            template=template,
            keep=parse_keep(keep_columns or []),
            token_ids=token_ids,
            order=order,
            part_rows=part_rows,
            retry_errors=retry_errors,
            workers=_num_workers(workers),
            shard=parse_shard(shard, os.environ),
        )
        place = Place.of(config)
        if tuning not in TUNING:
            folder = Path(tuning).expanduser()
            for inside in (folder, folder / "a.json"):
                place.check_beside("--tuning", str(inside))
        # For the worker processes, as `generate` sets them for its own.
        environment = {**environment_defaults(), **os.environ}
        written = [] if summary is None else [("--summary", summary)]
        if trace is not None:
            check_output_path(trace, input, option="--trace")
            num_workers = config.workers or len(
                choose_devices(None, device=device, environment=environment)
            )
            names = [worker_trace(trace, number) for number in range(num_workers)]
            written += [("--trace", name) for name in (names if len(names) > 1 else [trace])]
        for option, path in written:
            check_output_path(path, input, option=option)
            place.check_beside(option, path)
        # A record of Parquet parts is not written to standard output's file.
        results = [] if place.is_parquet else [("--output", str(place.output))]
        check_apart([*written, *results, ("", STDOUT)])
        outcome = run_job(config, environment=environment, console=_console(), say=say)
        signum = None if outcome.signum is None else signal.Signals(outcome.signum)
        say(job_report(outcome.stats))
        is_told = _write_counts(json.dumps(job_summary(outcome)), summary)
        if isinstance(outcome.error, WorkersLostError):
            tell(outcome.error)
            raise typer.Exit(WORKERS_LOST)
        if outcome.error is not None:
            raise outcome.error
        if signum is not None:
            say(f"{signum.name}: stopped; run the same command again to go on")
            raise typer.Exit(128 + signum)
        if outcome.stats.num_failed:
            raise typer.Exit(FAILED_ROWS)
        if not is_told:
            raise typer.Exit(BAD_INPUT)


def _write_counts(line: str, summary: str | None) -> bool:
    """Whether the counts could be written wherever they go. Where not, the error is told: how the
    job itself ended still decides the exit code."""
    is_told = True
    try:
        if summary is not None:
            with write_errors(summary):
                Path(summary).write_text(line + "\n", "utf-8")
    except ConfigError as error:
        tell(error)
        is_told = False
    try:
        print_line(line)
    except ConfigError as error:
        tell(error)
        is_told = False
    return is_told


def _num_workers(text: str) -> int | None:
    if text == _AUTO:
        return None
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise ConfigError(f"--workers is {brief(text)}; give a number or {_AUTO}")
    return int(text)


def _console() -> Console:
    return Console(stderr=True, force_terminal=sys.stderr.isatty())
