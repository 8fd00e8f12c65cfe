"""How is an engine configured? One frozen dataclass, validated when it is made."""

from __future__ import annotations

import dataclasses
import stat
from dataclasses import dataclass
from pathlib import Path

from graphengine.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION = ("auto", "flash", "flash4", "reference")
TUNING = ("auto", "off")
# No folder's names.
_SLIPS = ("", "on", "none", "false", "true", "no", "yes", *TUNING)
LOAD_FORMATS = ("auto", "dummy")

# Stop ids (EOS included) a request may have: the width of a per-sequence table.
MAX_STOP_IDS = 32
# Graphs are captured for that many rows and a ladder of sizes below: 79 of them at 4096, and
# their number grows with the limit.
MAX_NUM_SEQS = 4096


@dataclass(frozen=True)
class EngineConfig:
    """Every option of an engine. Names follow vLLM where the meaning is the same.

    model: local directory in Hugging Face format, a hub id, or "demo".
    tokenizer: directory or hub id; None takes the model's. skip_tokenizer_init: token ids only.
    dtype: "auto" is the checkpoint's on CUDA and float32 on the CPU. device: "auto" prefers CUDA.
    attention: "auto" is "flash" on CUDA (an error without flash-attn) and "reference" on the CPU.
    "flash4" prefills with flash-attn 4 where the chunks have 256 tokens or more in the mean, which
    is faster there, and rounds otherwise. On Hopper, in bfloat16 with heads of 64 or 128, "auto" is
    "flash4" where exactly the version of the extra flash4 is installed; should its kernels then not
    compile, be kept or run, a warning says so and it is "flash".
    load_format: "dummy" gives seeded random weights and reads config.json only.
    max_model_len: tokens of prompt and output together; None takes the model's limit.
    max_num_seqs: sequences running at once, the largest decode bucket; at most MAX_NUM_SEQS. How
    many run decides which kernels a step runs by, which round differently in bfloat16.
    max_num_batched_tokens: token budget of one prefill step; longer prompts are chunked. What is
    prefilled together decides how it rounds, too.
    block_size: tokens per KV block; None takes the attention backend's default.
    gpu_memory_utilization: share of the card's memory this engine may use in all.
    kv_cache_memory_bytes: KV memory instead of the figure derived from free memory. On the CPU None
    means what max_num_seqs sequences of max_model_len need, at most 1 GiB.
    num_gpu_blocks_override: KV blocks (null block not counted) instead of any figure in bytes.
    seed: of dummy weights and of requests that bring no seed.
    enforce_eager: no CUDA graphs; the same step function is called instead.
    tuning: which way each product of a decode step runs in on a GPU. "auto" measures it at the
    first start, takes what is faster than the rule by the product's shape, and keeps it in
    ~/.cache/graphengine/products; a folder is asked first and gets what it lacks, the attention of
    the first start too, which "auto" then is, so that what goes on with it rounds as it began, or
    is refused; "off" is the rule, and "auto" of attention is not "flash4". Ways differ in how sums
    round.
    async_scheduling: launch step N+1 before waiting for step N; False takes turns.
    trace: file for a Chrome trace of host phases and device work of all streams; None writes none.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    seed: int = 0
    enforce_eager: bool = False
    tuning: str = "auto"
    async_scheduling: bool = True
    trace: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option, its value and the accepted range."""
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            is_given = value is not None or name == "model"
            if is_given and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} is {value!r}; give a directory or a hub id, as a string")
        _check_tuning(self.tuning)
        if self.trace is not None and not isinstance(self.trace, str):
            raise ConfigError(f"trace is {self.trace!r}; give a file, as a string")
        for name in ("skip_tokenizer_init", "enforce_eager", "async_scheduling"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}; give True or False")
        for name, choices in (
            ("dtype", DTYPES),
            ("device", DEVICES),
            ("attention", ATTENTION),
            ("load_format", LOAD_FORMATS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        for name, smallest in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("kv_cache_memory_bytes", 1),
            ("num_gpu_blocks_override", 1),
        ):
            value = getattr(self, name)
            is_given = value is not None or name in ("max_num_seqs", "max_num_batched_tokens")
            if is_given and (not _is_int(value) or value < smallest):
                raise ConfigError(f"{name} is {value!r}; give a whole number >= {smallest}")
            if is_given and value >= 2**63:  # what torch and NumPy count in
                raise ConfigError(f"{name} is {value!r}; give a whole number below 2**63")
        if self.max_num_seqs > MAX_NUM_SEQS:
            raise ConfigError(
                f"max_num_seqs is {self.max_num_seqs}; give a whole number <= {MAX_NUM_SEQS}"
            )
        share: object = self.gpu_memory_utilization
        is_number = isinstance(share, float) or _is_int(share)
        if not is_number or not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization is {share!r}; give a share in (0, 1]")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; give a whole number in [0, 2**63)")


def _check_tuning(value: object) -> None:
    if isinstance(value, str) and value in TUNING:
        return
    if not isinstance(value, str) or value.strip().lower() in _SLIPS:
        raise ConfigError(f"tuning is {value!r}; give auto, off or a folder, as a string")
    try:
        is_file = not stat.S_ISDIR(Path(value).expanduser().stat().st_mode)
    except FileNotFoundError:
        return
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"tuning is {value!r}, which is no folder ({error}); give auto, off or a folder"
        ) from error
    if is_file:
        raise ConfigError(f"tuning is {value!r}, which is a file; give auto, off or a folder")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def engine_config(model: str, **options: object) -> EngineConfig:
    """An EngineConfig from keyword options. Raises ConfigError naming one that does not exist."""
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; choose from {', '.join(sorted(known))}")
    return EngineConfig(model, **options)  # type: ignore[arg-type]
