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
    ATTENTION,
    DEVICES,
    DTYPES,
    LOAD_FORMATS,
    EngineConfig,
    engine_config,
)
from graphengine.errors import ConfigError
from graphengine.exit_codes import BAD_INPUT, errors_as_exit_codes, say
from graphengine.output_file import (
    STDOUT,
    JsonlWriter,
    TerminalWriter,
    TextWriter,
    Writer,
    check_output_path,
    write_errors,
    write_in_order,
)
from graphengine.progress import Progress, summary
from graphengine.prompt_file import check_prompts, open_prompts
from graphengine.request import SamplingParams
from perf.commands import perf_app

if TYPE_CHECKING:
    from graphengine.plan import Plan

FAILED_REQUESTS = 1
MAX_GPU_MEMORY_GIB = 2**20
_STDOUT_NAME = "standard output"

app = typer.Typer(
    name="graphengine",
    help="Offline LLM inference: every decode step is one CUDA-graph replay.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: the rich one cuts option names short on 80 columns.
    rich_markup_mode=None,
)
app.add_typer(perf_app, name="perf")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that its encoding lacks becomes a "?"; it is no reason to end a run.
        sys.stdout.reconfigure(errors="replace")
    app()


# Options of several commands. Names, meanings and defaults are those of EngineConfig.
Model = Annotated[str, typer.Argument(help="A local directory, a hub id, or 'demo'.")]
Tokenizer = Annotated[str | None, typer.Option(help="Directory or hub id, if not the model's own.")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="|".join(DTYPES), help="auto: the checkpoint's on CUDA, float32 on the CPU."
    ),
]
Device = Annotated[
    str, typer.Option(metavar="|".join(DEVICES), help="auto: CUDA if there is a GPU.")
]
Attention = Annotated[
    str,
    typer.Option(metavar="|".join(ATTENTION), help="auto: flash on CUDA, reference on the CPU."),
]
LoadFormat = Annotated[
    str,
    typer.Option(
        metavar="|".join(LOAD_FORMATS), help="dummy: seeded random weights, reads config.json only."
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and output together, if not the model's limit.")
]
MaxNumSeqs = Annotated[
    int, typer.Option(help="Sequences running at once, the largest decode batch.")
]
MaxNumBatchedTokens = Annotated[
    int, typer.Option(help="Tokens of one prefill step; longer prompts are chunked.")
]
BlockSize = Annotated[
    int | None, typer.Option(help="Tokens per KV block, if not the attention backend's default.")
]
GpuMemoryUtilization = Annotated[
    float, typer.Option(help="Share of the GPU's memory this engine may use in all.")
]
KVCacheMemoryBytes = Annotated[
    int | None, typer.Option(help="KV memory, instead of a figure from free memory.")
]
NoGraphs = Annotated[
    bool, typer.Option("--no-graphs", help="Call the same step instead of replaying it.")
]
Trace = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Write what ran when, host and device, for Perfetto or Chrome's tracing page.",
    ),
]
NoOverlap = Annotated[
    bool, typer.Option("--no-overlap", help="Wait for a step before the next is scheduled.")
]
Seed = Annotated[
    int, typer.Option(help="Of sampling (each request derives its own) and of dummy weights.")
]


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
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    min_tokens: Annotated[int, typer.Option(help="No stop before that many tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Keep the likeliest tokens up to this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens with this share of the likeliest one's probability.")
    ] = 0.0,
    seed: Seed = EngineConfig.seed,
    stop: Annotated[
        list[str] | None, typer.Option(help="The text ends before this string. May be repeated.")
    ] = None,
    stop_token_ids: Annotated[
        list[str] | None,
        typer.Option(metavar="ID[,ID...]", help="Token ids that end an output. May be repeated."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")
    ] = False,
    skip_special_tokens: Annotated[
        bool, typer.Option(help="Leave special tokens out of the text.")
    ] = True,
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
    trace: Trace = None,
) -> None:
    """Generate text for prompts, given as arguments or in a file.

    Exit code: 0, or 1 if some requests failed (each output says why), 2 for bad input or if all
    failed, 130 after Ctrl-C (what was finished is in the output).
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
            stop_token_ids=_parse_ids(stop_token_ids or []),
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

    # Its warnings are for callers of transformers; what matters here is an error of our own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch's threads sleep while they wait: where other programs want the cores too, spinning ones
    # made the demo 50 times slower on a CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from graphengine import LLM  # imports torch, which takes seconds

    console = _progress_console(output)
    with LLM(**dataclasses.asdict(config)) as llm, contextlib.ExitStack() as stack:
        writer = _writer(output, console, stack)
        try:
            # Closed before the engine is, also when writing fails.
            stream = llm.stream(requests, sampling_params)
            outputs = stack.enter_context(contextlib.closing(stream))
            with Progress(llm.stats, requests.num_requests, console):
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
        with write_errors(_STDOUT_NAME):
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


def _parse_ids(values: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(part) for value in values for part in value.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--stop-token-ids is {','.join(values)!r}; give whole numbers, as in 2,128001"
        ) from error


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
        return JsonlWriter(sys.stdout.buffer, _STDOUT_NAME)
    if output is not None:
        with write_errors(output):
            return JsonlWriter(stack.enter_context(open(output, "wb", buffering=0)), output)
    if sys.stdout.isatty():
        return TerminalWriter(console)
    return TextWriter(sys.stdout, _STDOUT_NAME)


if __name__ == "__main__":
    main()
