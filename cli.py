"""Which commands does graphengine have? Parses, calls, prints; the work is in the package."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from graphengine.config import (
    EngineConfig,
    engine_config,
)
from graphengine.errors import ConfigError
from graphengine.exit_codes import (
    BAD_INPUT,
    errors_as_exit_codes,
    help_errors,
    ignore_interrupts_at_exit,
    say,
    sigterm_as_interrupt,
)
from graphengine.jobs.command import run
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
    STDOUT_NAME,
    JsonlWriter,
    TerminalWriter,
    TextWriter,
    Writer,
    check_apart,
    check_output_path,
    write_errors,
    write_in_order,
)
from graphengine.progress import Progress, status_line, summary
from graphengine.prompt_file import check_prompts, open_prompts
from graphengine.request import SamplingParams
from graphengine.standard_streams import open_closed_streams
from perf.commands import perf_app

if TYPE_CHECKING:
    from graphengine.plan import Plan

FAILED_REQUESTS = 1
MAX_GPU_MEMORY_GIB = 2**20

app = typer.Typer(
    name="graphengine",
    help="Offline LLM inference: every decode step is one CUDA-graph replay.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the rich one cuts option names short on 80 columns.
    rich_markup_mode=None,
)
app.command()(run)
app.add_typer(perf_app, name="perf")


def main() -> None:
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that its encoding lacks becomes a "?"; it is no reason to end a run.
        sys.stdout.reconfigure(errors="replace")
    try:
        with help_errors():
            app()
    finally:
        ignore_interrupts_at_exit()


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts, unless --input is given.")
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="FILE|-",
            help="Prompts: lines of text, or JSONL with prompt, messages or prompt_token_ids.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="FILE|-",
            help="Write JSONL there, in input order. Without it the texts go to standard output.",
        ),
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
    """Generate text for prompts, given as arguments or in a file.

    Exit code: 0, or 1 if some requests failed (each output says why), 2 for bad input or if all
    failed, 130 after Ctrl-C and 143 after SIGTERM (what was finished is in the output).
    """
    with errors_as_exit_codes():
        if bool(prompts) == (input is not None):
            raise ConfigError("give prompts as arguments or --input FILE, one of the two")
        config = engine_config(
            model,
            tokenizer=tokenizer,
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
        )
        sampling_params = SamplingParams(
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
        )
        _generate(config, sampling_params, prompts, input, output)


def _generate(
    config: EngineConfig,
    sampling_params: SamplingParams,
    prompts: list[str] | None,
    input: str | None,
    output: str | None,
) -> None:
    # All that can be wrong with the input is found before the seconds a model takes to load.
    requests = check_prompts(prompts or []) if input is None else open_prompts(input)
    if output is not None:
        check_output_path(output, input)
    if config.trace is not None:
        check_output_path(config.trace, input, option="--trace")
        check_apart([("--trace", config.trace), ("--output", STDOUT if output is None else output)])

    for name, value in environment_defaults().items():
        os.environ.setdefault(name, value)
    from graphengine import LLM  # imports torch, which takes seconds

    console = _progress_console(output)
    with LLM(**dataclasses.asdict(config)) as llm, contextlib.ExitStack() as stack:
        stack.enter_context(sigterm_as_interrupt())
        writer = _writer(output, console, stack)
        try:
            # Closed before the engine is, also when writing fails.
            stream = llm.stream(requests, sampling_params)
            outputs = stack.enter_context(contextlib.closing(stream))
            total = requests.num_requests
            with Progress(llm.stats, lambda: total, console, line=status_line):
                write_in_order(outputs, writer)
        finally:
            stats = llm.stats()
            say(summary(stats))
    if requests.error is not None:
        raise requests.error
    if stats.num_failed:
        raise typer.Exit(BAD_INPUT if stats.num_failed == stats.num_finished else FAILED_REQUESTS)


@app.command()
def plan(
    model: Model,
    dtype: Dtype = EngineConfig.dtype,
    device: Device = EngineConfig.device,
    attention: Attention = EngineConfig.attention,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = EngineConfig.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = EngineConfig.max_num_batched_tokens,
    block_size: BlockSize = None,
    gpu_memory_utilization: GpuMemoryUtilization = EngineConfig.gpu_memory_utilization,
    kv_cache_memory_bytes: KVCacheMemoryBytes = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(help="Plan for a GPU with that much memory instead.")
    ] = None,
) -> None:
    """Show what fits: weights, graphs, KV cache, sequences. Loads and allocates nothing."""
    with errors_as_exit_codes():
        config = engine_config(
            model,
            dtype=dtype,
            device=device,
            attention=attention,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
        )
        memory_bytes = None if gpu_memory_gib is None else _memory_bytes(gpu_memory_gib)
        from graphengine.plan import plan as plan_for

        found = plan_for(config, gpu_memory_bytes=memory_bytes)
        with write_errors(STDOUT_NAME):
            _print_plan(model, found)
            sys.stdout.flush()


def _memory_bytes(gpu_memory_gib: float) -> int:
    num_bytes = gpu_memory_gib * 2**30
    if not 1 <= num_bytes <= MAX_GPU_MEMORY_GIB * 2**30:
        raise ConfigError(
            f"--gpu-memory-gib is {gpu_memory_gib:g}; give a number above 0, "
            f"at most {MAX_GPU_MEMORY_GIB:,}"
        )
    return int(num_bytes)


def _print_plan(model: str, plan: Plan) -> None:
    print(f"{model}: {plan.architecture}, {plan.num_parameters:,} parameters")
    print(f"  on {plan.device}, {plan.dtype}, {plan.attention} attention")
    for name, num_bytes, remark in (
        ("weights", plan.weight_bytes, ""),
        ("prefill", plan.working_bytes, "at its peak, estimated"),
        ("graphs", plan.graph_bytes, f"estimated, buckets {', '.join(map(str, plan.buckets))}"),
        (
            "KV cache",
            plan.kv_bytes,
            f"{plan.num_blocks:,} blocks of {plan.block_size} tokens, "
            f"{plan.kv_bytes_per_token:,} bytes a token",
        ),
        ("memory", plan.total_bytes, "in all"),
    ):
        if num_bytes:
            print(f"  {name:<10}{num_bytes / 2**30:8.3f} GiB  {remark}".rstrip())
    print(f"  sequences at once, prompt and output together, of {plan.max_model_len:,} at most:")
    for num_tokens, num_sequences in plan.sequences_by_length.items():
        print(f"{num_sequences:12,} of {num_tokens:,} tokens")


def _progress_console(output: str | None) -> Console:
    """Where progress is shown. Texts and bar share standard output if that is a terminal, so that
    one goes above the other; JSON lines are kept apart from it."""
    if output == STDOUT:
        return Console(stderr=True, force_terminal=sys.stderr.isatty() and not sys.stdout.isatty())
    if sys.stdout.isatty():
        return Console()
    return Console(stderr=True, force_terminal=sys.stderr.isatty())


def _writer(output: str | None, console: Console, stack: contextlib.ExitStack) -> Writer:
    if output == STDOUT:
        return JsonlWriter(sys.stdout.buffer, STDOUT_NAME)
    if output is not None:
        with write_errors(output):
            return JsonlWriter(stack.enter_context(open(output, "wb", buffering=0)), output)
    if sys.stdout.isatty():
        return TerminalWriter(console)
    return TextWriter(sys.stdout, STDOUT_NAME)


if __name__ == "__main__":
    main()
