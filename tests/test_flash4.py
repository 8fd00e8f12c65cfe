"""Is attention "flash4" chosen where it can be had, and does it give what the reference gives?"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from paged import CPU, HEAD_DIM, Cache, borders, random_queries, skip_without_flash4
from torch import Tensor

from graphengine import LLM, SamplingParams
from graphengine.attention import PrefillMetadata, flash4, make_attention
from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.reference import ReferenceAttention
from graphengine.config import EngineConfig
from graphengine.errors import BackendError, ConfigError
from graphengine.hub import resolve_model
from graphengine.metrics import Laps
from graphengine.model_config import load_model_config
from graphengine.options import environment_defaults
from graphengine.plan import _working_bytes
from graphengine.resolve import resolve
from graphengine.scheduler import PrefillBatch
from graphengine.step_inputs import prefill_metadata

CUDA = torch.device("cuda")
INSTALL = r'pip install "graphengine\[flash4\]", or choose attention "flash"'
REFERENCE = ReferenceAttention()


def reference_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int | None, int | None],
) -> tuple[Tensor, None]:
    """Stands in for flash_attn_varlen_func: each sequence alone, its keys packed."""
    assert softmax_scale == q.shape[-1] ** -0.5
    assert causal
    left, right = window_size
    assert right == (None if left is None else 0)
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = []
    for s in range(len(rows) - 1):
        own = slice(rows[s], rows[s + 1])
        k_own, v_own = (part[None, keys[s] : keys[s + 1]] for part in (k, v))
        metadata = PrefillMetadata(
            slot_mapping=torch.empty(0, dtype=torch.int64),
            cu_seqlens_q=borders([rows[s + 1] - rows[s]]),
            cu_seqlens_k=borders([keys[s + 1] - keys[s]]),
            last_rows=torch.tensor([rows[s + 1] - rows[s] - 1]),
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            max_seqlen_q=rows[s + 1] - rows[s],
            max_seqlen_k=keys[s + 1] - keys[s],
            has_context=True,
        )
        window = None if left is None else left + 1
        parts.append(REFERENCE.prefill(q[own], k_own, v_own, k_own, v_own, metadata, window=window))
    return torch.cat(parts), None


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hopper GPU with both packages; lists which calls went to flash-attn 2."""
    calls: list[str] = []

    def recorder(name: str) -> Callable[..., Any]:
        def call(q: Tensor, *_: Tensor, **__: Any) -> Any:
            calls.append(name)
            return (torch.zeros(q.shape),) if name == "varlen" else torch.zeros(q.shape)

        return call

    two = ModuleType("flash_attn.flash_attn_interface")
    two.__dict__["_flash_attn_varlen_forward"] = recorder("varlen")
    two.__dict__["flash_attn_with_kvcache"] = recorder("with_kvcache")
    four = ModuleType("flash_attn.cute")
    four.__dict__["flash_attn_varlen_func"] = reference_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", two)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", four)
    monkeypatch.setattr(flash4, "version", lambda _: "4.0.0b36")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    return calls


@pytest.mark.usefixtures("flash_calls")
def test_auto_is_not_flash4_even_where_it_is_installed() -> None:
    assert make_attention("auto", CUDA).name == "flash"
    attention = make_attention("flash4", CUDA)
    assert (attention.name, attention.default_block_size) == ("flash4", 256)


def test_flash4_on_the_cpu_is_an_error() -> None:
    with pytest.raises(BackendError, match='"flash4" runs on CUDA, the device is cpu'):
        make_attention("flash4", CPU)


@pytest.mark.usefixtures("flash_calls")
@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_generations_are_refused_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(flash4, "FlashAttention", lambda: pytest.fail("flash-attn was imported"))
    said = rf'needs compute capability 9\.x, this GPU has {capability[0]}\.0; choose .* "flash"'
    with pytest.raises(BackendError, match=said):
        make_attention("flash4", CUDA)


@pytest.mark.usefixtures("flash_calls")
def test_flash4_that_is_not_installed_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2 has a folder flash_attn/cute of its own, which must not pass for it."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flash4, "version", missing)
    with pytest.raises(BackendError, match=f"flash-attn-4, which is not installed; .*{INSTALL}"):
        make_attention("flash4", CUDA)


@pytest.mark.usefixtures("flash_calls")
@pytest.mark.parametrize("error", [ImportError("no cutlass"), RuntimeError("no CTK\nflavor")])
def test_flash4_that_cannot_be_imported_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == "flash_attn.cute":
            raise error
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    why = " ".join(str(error).split())
    with pytest.raises(BackendError, match=rf"imported \({why}\); .*{INSTALL}") as caught:
        make_attention("flash4", CUDA)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.usefixtures("flash_calls")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head_dim": 96}, BackendError, 'head_dim is 96; attention "flash4" needs 64 or 128'),
        ({"block_size": 128}, ConfigError, "block_size is 128; .* multiple of 256"),
        ({"dtype": torch.float32}, ConfigError, "dtype is float32; .* bfloat16 or float16"),
    ],
)
def test_flash4_checks_its_limits_and_those_of_flash(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {"block_size": 256, "head_dim": 64, "dtype": torch.float16, "device": CUDA}
    FlashAttention4(CUDA).check(**good)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        FlashAttention4(CUDA).check(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 1, 5])
def test_keys_of_earlier_chunks_are_found_in_the_cache(
    flash_calls: list[str], window: int | None
) -> None:
    q_lengths = [1, 3, 27, 9]
    cache = Cache([20, 3, 29, 10])
    q = random_queries(sum(q_lengths))
    nothing = torch.full((len(q), cache.k_cache.shape[2], HEAD_DIM), float("nan"))
    metadata = cache.prefill_metadata(q_lengths, has_context=True)
    inputs = (q, nothing, nothing, cache.k_cache, cache.v_cache, metadata)
    out = FlashAttention4(CUDA).prefill(*inputs, window=window)
    torch.testing.assert_close(out, REFERENCE.prefill(*inputs, window=window))
    assert flash_calls == []


def test_without_context_the_cache_is_not_read(flash_calls: list[str]) -> None:
    lengths = [1, 14, 30]
    cache = Cache(lengths)
    q = random_queries(sum(lengths))
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    nothing = torch.full_like(cache.k_cache, float("nan"))
    metadata = cache.prefill_metadata(lengths, has_context=False)
    out = FlashAttention4(CUDA).prefill(q, k, v, nothing, nothing, metadata, window=None)
    expected = REFERENCE.prefill(q, k, v, nothing, nothing, metadata, window=None)
    torch.testing.assert_close(out, expected)
    assert flash_calls == []


@pytest.mark.parametrize(("num_sequences", "expected"), [(256, []), (257, ["varlen"])])
def test_what_would_be_compiled_for_apart_goes_to_flash(
    flash_calls: list[str], num_sequences: int, expected: list[str]
) -> None:
    lengths = [2] * num_sequences
    cache = Cache(lengths)
    q = random_queries(sum(lengths))
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    metadata = cache.prefill_metadata(lengths, has_context=False)
    FlashAttention4(CUDA).prefill(q, k, v, cache.k_cache, cache.v_cache, metadata, window=None)
    assert flash_calls == expected


@pytest.mark.parametrize("has_context", [False, True])
def test_single_queries_stay_with_flash(flash_calls: list[str], has_context: bool) -> None:
    cache = Cache([5, 9])
    metadata = cache.prefill_metadata([5, 9], has_context=has_context).of_last_tokens()
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    FlashAttention4(CUDA).prefill(
        random_queries(2), k, v, cache.k_cache, cache.v_cache, metadata, window=None
    )
    assert flash_calls == ["varlen"]


def test_decoding_stays_with_flash(flash_calls: list[str]) -> None:
    cache = Cache([5, 9] * 30)
    FlashAttention4(CUDA).decode(
        random_queries(60), cache.k_cache, cache.v_cache, cache.decode_metadata(), window=4
    )
    assert flash_calls == ["with_kvcache"]


def test_key_slots_are_where_the_block_tables_say() -> None:
    """Random chunks: of new sequences, of begun ones, with and without borders of blocks."""
    draw = random.Random(3)
    for _ in range(200):
        block_size, num = draw.choice((1, 4, 16)), draw.randint(1, 5)
        starts = [draw.choice((0, draw.randint(1, 40))) for _ in range(num)]
        ends = [start + draw.randint(1, 40) for start in starts]
        width = -(-max(ends) // block_size) + 1
        ids = draw.sample(range(1, 1 + num * width), num * width)
        tables = [ids[s * width : (s + 1) * width] for s in range(num)]
        batch = PrefillBatch(
            np.arange(num), np.zeros(num), np.array(starts), np.array(ends), np.ones(num, np.bool_)
        )
        metadata = prefill_metadata(
            {"slot_mapping": torch.empty(0)},
            {
                "block_tables": torch.tensor([*tables, [0] * width], dtype=torch.int32),
                "cu_seqlens_q": borders([e - s for s, e in zip(starts, ends, strict=True)]),
                "cu_seqlens_k": borders(ends),
                "last_rows": torch.zeros(num, dtype=torch.int64),
            },
            batch,
            block_size=block_size,
            with_key_slots=True,
        )
        expected = [
            table[position // block_size] * block_size + position % block_size
            for table, end in zip(tables, ends, strict=True)
            for position in range(end)
        ]
        if any(starts):
            assert metadata.key_slots is not None
            assert metadata.key_slots.dtype == torch.int64
            assert metadata.key_slots.tolist() == expected
        else:
            assert metadata.key_slots is None


@pytest.mark.parametrize("is_read", [False, True])
def test_key_slots_are_made_only_for_attention_that_reads_them(
    is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    prefill = ReferenceAttention.prefill

    def record(self: ReferenceAttention, *args: Any, **kwargs: Any) -> Tensor:
        metadata = args[5]
        if metadata.has_context:
            made.append(metadata.key_slots is not None)
        return prefill(self, *args, **kwargs)

    monkeypatch.setattr(ReferenceAttention, "prefill", record)
    monkeypatch.setattr(ReferenceAttention, "reads_key_slots", is_read)
    with LLM("demo", max_num_batched_tokens=4, device="cpu") as llm:
        llm.generate(["346+354="], SamplingParams(temperature=0.0, max_tokens=1))
    assert set(made) == {is_read}


def test_only_flash4_reads_key_slots() -> None:
    backends = (FlashAttention4, FlashAttention, ReferenceAttention)
    assert [backend.reads_key_slots for backend in backends] == [True, False, False]


@pytest.mark.usefixtures("flash_calls")
def test_plan_counts_the_context_that_is_copied() -> None:
    config = EngineConfig("demo", max_num_batched_tokens=16, max_num_seqs=1)
    path = resolve_model("demo")
    resolved = resolve(config, path, load_model_config(path), laps=Laps())
    model = resolved.model_config
    resolved = replace(resolved, attention=FlashAttention4(CUDA))
    context_bytes = 2 * model.num_kv_heads * model.head_dim * resolved.dtype.itemsize
    small = _working_bytes(replace(resolved, max_model_len=10_000))
    assert _working_bytes(replace(resolved, max_model_len=10_100)) == small + 100 * context_bytes
    flash = replace(resolved, attention=ReferenceAttention())
    assert _working_bytes(flash) == _working_bytes(replace(flash, max_model_len=10_100))


def test_compiled_kernels_are_kept_in_the_users_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By itself flash-attn 4 loads machine code from /tmp, where others may have put it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    told = environment_defaults()
    assert told["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert Path(told["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]).is_relative_to(tmp_path)


# --- on a GPU


@pytest.fixture(scope="module")
def attention() -> FlashAttention4:
    skip_without_flash4()
    return FlashAttention4(torch.device("cuda", 0))


def compare(attention: FlashAttention4, seed: int, window: int | None, **shape: Any) -> None:
    """Against the reference in float32, over random lengths, with and without context. Half
    precision keeps 8 or 11 bits; the kernel also rounds the weights, of values of deviation 1."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    num_kv_heads, group, head_dim, dtype = (
        shape[name] for name in ("num_kv_heads", "group", "head_dim", "dtype")
    )
    lengths = [draw.choice((1, 127, 128, 129, draw.randint(2, 900))) for _ in range(6)]
    starts = [draw.choice((0, 255, 256, draw.randint(1, 700))) for _ in lengths]
    for has_context in (False, True):
        totals = [n + start for n, start in zip(lengths, starts, strict=True)]
        cache = Cache(
            totals if has_context else lengths,
            block_size=256,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=CUDA,
            seed=seed,
        )
        metadata = cache.prefill_metadata(lengths, has_context=has_context)
        heads = group * num_kv_heads
        qkv = torch.randn(sum(lengths), heads + 2 * num_kv_heads, head_dim, device=CUDA).to(dtype)
        q, k, v = qkv.split([heads, num_kv_heads, num_kv_heads], dim=1)
        actual = attention.prefill(q, k, v, cache.k_cache, cache.v_cache, metadata, window=window)
        wide = (part.float() for part in (q, k, v, cache.k_cache, cache.v_cache))
        expected = REFERENCE.prefill(*wide, metadata, window=window)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [2, 4])
def test_flash4_gives_what_the_reference_gives(
    attention: FlashAttention4, group: int, head_dim: int, window: int | None
) -> None:
    for seed in range(2):
        compare(
            attention,
            seed,
            window,
            num_kv_heads=2,
            group=group,
            head_dim=head_dim,
            dtype=torch.bfloat16,
        )


@pytest.mark.gpu
def test_flash4_takes_float16(attention: FlashAttention4) -> None:
    compare(attention, 0, None, num_kv_heads=8, group=4, head_dim=128, dtype=torch.float16)


@pytest.mark.gpu
def test_flash4_compiles_nothing_after_its_first_call(attention: FlashAttention4) -> None:
    """In the middle of a run that would take seconds."""
    compiled = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd.compile_cache
    shape = {"num_kv_heads": 2, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
    compare(attention, 0, None, **shape)
    compare(attention, 0, 77, **shape)
    before = len(compiled.cache)
    assert before > 0
    for seed in range(1, 10):
        compare(attention, seed, None, **shape)
        compare(attention, seed, 10 * seed, **shape)
    assert len(compiled.cache) == before


@pytest.mark.gpu
def test_flash4_runs_on_the_current_stream(attention: FlashAttention4) -> None:
    """Its inputs are written on a side stream, late: on any other they would be read too early."""
    lengths = [300, 1000]
    cache = Cache(lengths, block_size=256, head_dim=128, dtype=torch.bfloat16, device=CUDA)
    metadata = cache.prefill_metadata(lengths, has_context=False)
    q = random_queries(sum(lengths), 128).to(CUDA, torch.bfloat16)
    k, v = (torch.cat(parts).to(CUDA) for parts in (cache.k, cache.v))
    caches = cache.k_cache, cache.v_cache
    expected = attention.prefill(q, k, v, *caches, metadata, window=None)
    late = [torch.zeros_like(part) for part in (q, k, v)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
        torch.cuda._sleep(200_000_000)
        for target, source in zip(late, (q, k, v), strict=True):
            target.copy_(source)
        actual = attention.prefill(*late, *caches, metadata, window=None)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(actual, expected)
