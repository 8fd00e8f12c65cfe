"""Where does a decode step's time go? Kernel by kernel, each beside its own floor.

A floor is what the kernel cannot be faster than: the bytes it must move at the card's measured read
bandwidth, or its arithmetic at the card's measured rate. Bytes of two-byte weights and activations.

Letters: B rows, E hidden, H query heads, K kv heads, D head dim, I intermediate, V vocab, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphengine.model_config import ModelConfig

# bf16 matrix products of one H200, measured: perf/LOG.md, issue 4.
FLOPS_PER_S = 790e12
_BYTES = 2
# Part of the step by kernel name; the first that is found in it counts. flash-attn's names hold
# "cutlass", cuBLAS's reductions "cublas".
_RULES = (
    ("beside the kernels", r"^Mem(cpy|set)"),
    ("split reduction", r"splitKreduce|splitkv_combine"),
    ("attention", r"flash_fwd|paged_decode|decode_attention|row_attention"),
    ("chain", r"decode_chain"),
    ("norm", r"rms_norm"),
    ("rope and cache", r"rope_and_cache"),
    ("silu", r"silu_mul"),
    ("sampler", r"^_split_kernel"),
    ("sampler's end", r"^_combine_kernel"),
    ("product", r"_linear_kernel|^gated_linear|nvjet|gemm|gemv|cutlass|xmma|cublas"),
    ("other", r""),
)
_LAYER_PRODUCTS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """A kernel, copy or fill on the device, in microseconds of one clock."""

    name: str
    stream: int
    start_us: float
    end_us: float

    @property
    def is_kernel(self) -> bool:
        return part_of(self.name) != _RULES[0][0]


@dataclass(slots=True)
class KernelRow:
    """Kernels of one name and part, sums over all steps. own_us: time in which no kernel that began
    earlier still ran, so that kernels which overlap are not counted twice; raw_us: as each says of
    itself. gap_us: time before them in which nothing ran. floor_us: None where nothing says it."""

    part: str
    kernel: str
    count: int = 0
    own_us: float = 0.0
    raw_us: float = 0.0
    gap_us: float = 0.0
    floor_us: float | None = None


@dataclass(slots=True)
class StepAccount:
    """Rows in the order in which they first ran. busy_us + gap_us = span_us, from the first
    kernel's start to the last one's end. beside: copies of other streams, raw_us alone."""

    num_steps: int
    span_us: float
    busy_us: float
    gap_us: float
    rows: list[KernelRow] = field(default_factory=list)
    beside: list[KernelRow] = field(default_factory=list)

    def per_step(self) -> dict[str, Any]:
        """Everything in microseconds of one step, for JSON."""

        def contents(row: KernelRow) -> dict[str, Any]:
            n = self.num_steps
            return {
                "part": row.part,
                "kernel": row.kernel,
                "count": row.count / n,
                "own_us": row.own_us / n,
                "raw_us": row.raw_us / n,
                "gap_us": row.gap_us / n,
                "floor_us": None if row.floor_us is None else row.floor_us / n,
            }

        return {
            "span_us": self.span_us / self.num_steps,
            "busy_us": self.busy_us / self.num_steps,
            "gap_us": self.gap_us / self.num_steps,
            "rows": [contents(row) for row in self.rows],
            "beside": [contents(row) for row in self.beside],
        }


@dataclass(frozen=True, slots=True)
class StepFloors:
    """Least microseconds of one call of each part, of a step of B rows at one context length."""

    config: ModelConfig
    rows: int
    context: int
    bytes_per_s: float
    flops_per_s: float = FLOPS_PER_S

    def of(self, part: str) -> float | None:
        config, rows, e = self.config, self.rows, self.config.hidden_size
        heads, kv_heads = config.num_heads, config.num_kv_heads
        elements = {
            "norm": 4 * rows * e,
            "rope and cache": 2 * rows * (heads + 2 * kv_heads) * config.head_dim,
            "silu": 3 * rows * config.intermediate_size,
            "sampler": rows * config.vocab_size,
        }
        if part in elements:
            return self._us(_BYTES * elements[part], 0)
        if part == "attention":
            return self._attention_us()
        if part == "chain":  # one launch more than there are layers
            return self._products_us * config.num_layers / (config.num_layers + 1)
        if part in (*_LAYER_PRODUCTS, "lm_head"):
            return self._product_us(*self._shape(part))
        return None

    @property
    def step_us(self) -> float:
        """Of the whole step: its products, and keys and values read once."""
        head = self.of("lm_head")
        assert head is not None
        return self.config.num_layers * (self._products_us + self._attention_us()) + head

    @property
    def _products_us(self) -> float:
        """Of one layer."""
        return sum(self._product_us(*self._shape(name)) for name in _LAYER_PRODUCTS)

    def _shape(self, product: str) -> tuple[int, int, int]:
        """Weights' output and input features, and output features of what follows them."""
        config = self.config
        e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
        qkv = (config.num_heads + 2 * config.num_kv_heads) * d
        return {
            "qkv": (qkv, e, qkv),
            "o": (e, config.num_heads * d, e),
            "gate_up": (2 * i, e, i),
            "down": (e, i, e),
            "lm_head": (config.vocab_size, e, config.vocab_size),
        }[product]

    def _product_us(self, num_out: int, num_in: int, num_stored: int) -> float:
        elements = num_out * num_in + self.rows * (num_in + num_stored)
        return self._us(_BYTES * elements, 2 * self.rows * num_out * num_in)

    def _attention_us(self) -> float:
        """Mean of the layers, some of which may see a window alone."""
        config = self.config
        windows = [self.context if w is None else w for w in config.sliding_windows]
        tokens = sum(min(self.context, window) for window in windows) / len(windows)
        heads, d = config.num_heads, config.head_dim
        elements = self.rows * (2 * tokens * config.num_kv_heads + 2 * heads) * d
        return self._us(_BYTES * elements, 4 * self.rows * tokens * heads * d)

    def _us(self, num_bytes: float, flops: float) -> float:
        return 1e6 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def part_of(name: str) -> str:
    return next(part for part, pattern in _RULES if re.search(pattern, name))


def account(events: Sequence[KernelEvent], num_steps: int, floors: StepFloors) -> StepAccount:
    """What `num_steps` whole steps did. Raises ValueError if there is no kernel among the events.

    Counted are the kernels, and the copies on the stream that runs most of them; other copies run
    beside."""
    kernel_us: dict[int, float] = {}
    for event in events:
        if event.is_kernel:
            ran_us = event.end_us - event.start_us
            kernel_us[event.stream] = kernel_us.get(event.stream, 0.0) + ran_us
    if not kernel_us:
        raise ValueError("the profile holds no kernels; nothing ran on a CUDA device")
    main = max(kernel_us, key=lambda stream: kernel_us[stream])
    counted = [event for event in events if event.is_kernel or event.stream == main]
    counted.sort(key=lambda event: event.start_us)
    rows: dict[tuple[str, str], KernelRow] = {}
    busy_until_us = counted[0].start_us
    busy_us = gap_us = 0.0
    for part, event in zip(_parts(counted, num_steps, floors), counted, strict=True):
        own_us = max(0.0, event.end_us - max(event.start_us, busy_until_us))
        waited_us = max(0.0, event.start_us - busy_until_us)
        busy_until_us = max(busy_until_us, event.end_us)
        busy_us += own_us
        gap_us += waited_us
        _add(rows, part, event, own_us=own_us, gap_us=waited_us, floor_us=floors.of(part))
    beside: dict[tuple[str, str], KernelRow] = {}
    for event in events:
        if not event.is_kernel and event.stream != main:
            _add(beside, _RULES[0][0], event, own_us=0.0, gap_us=0.0, floor_us=None)
    span_us = busy_until_us - counted[0].start_us
    return StepAccount(
        num_steps, span_us, busy_us, gap_us, list(rows.values()), list(beside.values())
    )


def _parts(counted: Sequence[KernelEvent], num_steps: int, floors: StepFloors) -> list[str]:
    """Products by their place in the step, where there are as many as the model has; a step that
    runs as a chain has the head's alone. Otherwise they stay "product", without a floor."""
    parts = [part_of(event.name) for event in counted]
    num_layers = floors.config.num_layers
    names = {
        4 * num_layers + 1: (*_LAYER_PRODUCTS * num_layers, "lm_head"),
        1: ("lm_head",),
    }.get(parts.count("product") // num_steps)
    if names is None or parts.count("product") != num_steps * len(names):
        return parts
    found = 0
    for place, part in enumerate(parts):
        if part == "product":
            parts[place] = names[found % len(names)]
            found += 1
    return parts


def _add(
    rows: dict[tuple[str, str], KernelRow],
    part: str,
    event: KernelEvent,
    *,
    own_us: float,
    gap_us: float,
    floor_us: float | None,
) -> None:
    kernel = _brief(event.name)
    row = rows.setdefault((part, kernel), KernelRow(part, kernel))
    row.count += 1
    row.own_us += own_us
    row.raw_us += event.end_us - event.start_us
    row.gap_us += gap_us
    if floor_us is not None:
        row.floor_us = (row.floor_us or 0.0) + floor_us


def _brief(name: str) -> str:
    """Without return type, template arguments and parameters: `void a::b<...>(...)` is `a::b`. A
    copy keeps its direction, and a kernel of no part of its own all that tells it from others."""
    if part_of(name) in (_RULES[0][0], _RULES[-1][0]):
        return name
    return re.split(r"[<(]", name.removeprefix("void ").replace("(anonymous namespace)", ""))[0]
