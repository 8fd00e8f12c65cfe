"""Which options do several commands have? Names, meanings and defaults are those of the engine."""

from __future__ import annotations

from typing import Annotated

import typer

from graphengine.config import ATTENTION, DEVICES, DTYPES, LOAD_FORMATS
from graphengine.errors import ConfigError

_MOST_DIGITS = 18  # of an id, far more than any vocabulary has

Model = Annotated[str, typer.Argument(help="A local directory, a hub id, or 'demo'.")]
Tokenizer = Annotated[str | None, typer.Option(help="Directory or hub id, if not the model's own.")]
SkipTokenizerInit = Annotated[
    bool,
    typer.Option("--skip-tokenizer-init", help="Prompts are token ids, and texts stay empty."),
]
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
    typer.Option(
        metavar="|".join(ATTENTION),
        help="auto: flash on CUDA, reference on the CPU. flash4: for long prompts on Hopper, where "
        "auto is flash4 in bfloat16 if it is installed.",
    ),
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
Tuning = Annotated[
    str,
    typer.Option(
        metavar="auto|off|FOLDER",
        help="auto: at a first start measure how a GPU's matrix products run fastest, and keep it; "
        "off: by rules of shape; a folder: what is kept there goes first.",
    ),
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


MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
MinTokens = Annotated[int, typer.Option(help="No stop before that many tokens.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[
    float, typer.Option(help="Keep tokens with this share of the likeliest one's probability.")
]
Stop = Annotated[
    list[str] | None, typer.Option(help="The text ends before this string. May be repeated.")
]
StopTokenIds = Annotated[
    list[str] | None,
    typer.Option(metavar="ID[,ID...]", help="Token ids that end an output. May be repeated."),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")]
SkipSpecialTokens = Annotated[bool, typer.Option(help="Leave special tokens out of the text.")]


def parse_ids(values: list[str]) -> tuple[int, ...]:
    """Raises ConfigError for what is no token id of any model."""
    parts = [part.strip() for value in values for part in value.split(",")]
    if not all(part.isdecimal() and len(part) <= _MOST_DIGITS for part in parts):
        raise ConfigError(
            f"--stop-token-ids is {','.join(values)!r}; give whole numbers from 0 on, as in "
            "2,128001"
        )
    return tuple(map(int, parts))


def environment_defaults() -> dict[str, str]:
    """What libraries are told, where the user does not tell them otherwise, before torch is
    imported."""
    return {
        # Its warnings are for callers of transformers; what matters here is an error of our own.
        "TRANSFORMERS_VERBOSITY": "error",
        # torch's threads sleep while they wait: where other programs want the cores too, spinning
        # ones made the demo 50 times slower on a CPU.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
