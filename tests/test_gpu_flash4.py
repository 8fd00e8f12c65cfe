"""Does attention "flash4" give what the reference gives, on a GPU, and its kernels what its own
interface gives?"""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import Cache, borders, random_queries, skip_without_flash4

from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.flash4_kernels import Kind
from graphengine.attention.reference import ReferenceAttention

CUDA = torch.device("cuda")
REFERENCE = ReferenceAttention()

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def attention() -> FlashAttention4:
    skip_without_flash4()
    attention = FlashAttention4(torch.device("cuda", 0))
    attention.min_mean_length = 1
    return attention


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


def test_flash4_takes_float16(attention: FlashAttention4) -> None:
    compare(attention, 0, None, num_kv_heads=8, group=4, head_dim=128, dtype=torch.float16)


def test_flash4_compiles_nothing_after_its_first_call(attention: FlashAttention4) -> None:
    """In the middle of a run that would take seconds."""
    shape = {"num_kv_heads": 2, "group": 4, "head_dim": 128, "dtype": torch.bfloat16}
    compare(attention, 0, None, **shape)
    compare(attention, 0, 77, **shape)
    before = list(attention._begun)
    assert before
    for seed in range(1, 10):
        compare(attention, seed, None, **shape)
        compare(attention, seed, 10 * seed, **shape)
    assert list(attention._begun) == before


# Query lengths, and contexts before them.
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "one": ([1000], [0]),
    "one token": ([1], [0]),
    "ragged": ([1, 127, 128, 129, 700, 33], [0] * 6),
    "256": ([2 + i % 40 for i in range(256)], [0] * 256),
    "context": ([5, 128, 300], [1000, 0, 129]),
}


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [
        (4, 128, torch.bfloat16),
        (2, 128, torch.bfloat16),
        (5, 128, torch.bfloat16),
        (1, 64, torch.bfloat16),
        (4, 64, torch.float16),
    ],
)
def test_kept_kernel_gives_what_the_interface_gives(
    attention: FlashAttention4, group: int, head_dim: int, dtype: torch.dtype, window: int | None
) -> None:
    """To the bit: it is the same kernel."""
    num_kv_heads = 3
    kernel = attention._launch(Kind(dtype, head_dim, group, window is not None, (9, 0)))
    assert kernel is not None
    varlen = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    torch.manual_seed(0)
    for name, (lengths, contexts) in BATCHES.items():
        totals = [n + before for n, before in zip(lengths, contexts, strict=True)]
        heads = group * num_kv_heads
        qkv = torch.randn(sum(lengths), heads + 2 * num_kv_heads, head_dim, device=CUDA).to(dtype)
        q, k, v = qkv.split([heads, num_kv_heads, num_kv_heads], dim=1)
        if any(contexts):
            k, v = torch.randn(2, sum(totals), num_kv_heads, head_dim, device=CUDA).to(dtype)
        options: dict[str, Any] = {
            "cu_seqlens_q": borders(lengths).to(CUDA),
            "cu_seqlens_k": borders(totals).to(CUDA),
        }
        actual = kernel(q, k, v, **options, window=window)
        # Without max_seqlen_q: with it, short prompts would be compiled for apart.
        expected = varlen(
            q,
            k,
            v,
            **options,
            softmax_scale=head_dim**-0.5,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )[0]
        assert actual.dtype == dtype
        assert actual.isfinite().all(), name
        assert torch.equal(actual, expected), name


def test_more_sequences_than_it_is_compiled_for_run_by_flash(attention: FlashAttention4) -> None:
    lengths = [2 + i % 40 for i in range(300)]
    cache = Cache(lengths, block_size=256, head_dim=128, dtype=torch.bfloat16, device=CUDA)
    metadata = cache.prefill_metadata(lengths, has_context=False)
    q = random_queries(sum(lengths), 128).to(CUDA, torch.bfloat16)
    k, v = (torch.cat(parts).to(CUDA) for parts in (cache.k, cache.v))
    inputs = (q, k, v, cache.k_cache, cache.v_cache, metadata)
    expected = FlashAttention().prefill(*inputs, window=None)
    assert torch.equal(attention.prefill(*inputs, window=None), expected)


# Compiles, or loads, one kernel and launches it; prints what of flash-attn 4 was imported.
_FIRST_PREFILL = """
import sys, time
from pathlib import Path
import torch
from graphengine.attention import flash4_kernels
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.flash4_kernels import Kind
flash4_kernels.CACHE = Path(sys.argv[1])
attention = FlashAttention4(torch.device("cuda", 0))
begin = time.perf_counter()
launch = attention._launch(Kind(torch.bfloat16, 128, 4, False, (9, 0)))
seconds = time.perf_counter() - begin
torch.manual_seed(0)
q, k, v = (torch.randn(700, n, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
borders = torch.tensor([0, 700], dtype=torch.int32, device="cuda")
out = launch(q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, window=None)
roots = {name.partition(".")[0] for name in sys.modules}
print(seconds, float(out.double().abs().sum()), sorted(roots & {"cutlass", "quack"}),
      "flash_attn.cute.interface" in sys.modules)
"""


def test_second_process_imports_nothing_of_flash4_and_a_damaged_kernel_is_made_anew(
    tmp_path: Path,
) -> None:
    skip_without_flash4()

    def first_prefill() -> tuple[float, list[str]]:
        command = [sys.executable, "-W", "ignore", "-c", _FIRST_PREFILL, str(tmp_path / "linked")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        seconds, *others = run.stdout.strip().splitlines()[-1].split(maxsplit=1)
        return float(seconds), others

    compiled_s, first = first_prefill()
    assert first[0].endswith("[] False"), first
    loaded_s, second = first_prefill()
    assert second == first
    assert loaded_s < compiled_s / 4
    (file,) = (tmp_path / "linked").glob("*.so")
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    _, third = first_prefill()
    assert third == first
    assert len(file.read_bytes()) == len(good)


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
