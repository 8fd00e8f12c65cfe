"""Is paged attention plain attention? The reference against torch's own, flash by its arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from paged import CPU, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Cache, random_queries
from torch import Tensor

from graphengine.attention import make_attention
from graphengine.attention.flash import (
    FlashAttention,
    decode_splits,
)
from graphengine.attention.reference import ReferenceAttention
from graphengine.errors import BackendError, ConfigError

WINDOWS = [None, 1, 5, 1000]
# float32 against float64; values have a standard deviation of 1.
TOLERANCE = 1e-5


def oracle(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """q [n, H, D] at the end of k, v [T, K, D] -> [n, H, D], one query at a time in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        end = len(k) - len(q) + row + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            keys, values = k[start:end, kv_head].double(), v[start:end, kv_head].double()
            weights = (keys @ q[row, head].double() / HEAD_DIM**0.5).softmax(0)
            out[row, head] = weights @ values
    return out


@pytest.mark.parametrize("window", WINDOWS)
def test_decode_is_attention_over_the_context(window: int | None) -> None:
    cache = Cache([1, 4, 5, 19])
    q = random_queries(4)
    out = ReferenceAttention().decode(
        q, cache.k_cache, cache.v_cache, cache.decode_metadata(), window=window
    )
    for row in range(4):
        expected = oracle(q[row : row + 1], cache.k[row], cache.v[row], window=window)
        assert (out[row] - expected[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("window", WINDOWS)
def test_prefill_without_context_reads_the_steps_own_keys(window: int | None) -> None:
    lengths = [1, 4, 300, 13]  # more than one slab of queries
    cache = Cache(lengths)
    q = random_queries(sum(lengths))
    nothing = torch.full_like(cache.k_cache, float("nan"))
    metadata = cache.prefill_metadata(lengths, has_context=False)
    out = ReferenceAttention().prefill(
        q, torch.cat(cache.k), torch.cat(cache.v), nothing, nothing, metadata, window=window
    )
    for part, rows, k, v in zip(
        out.split(lengths), q.split(lengths), cache.k, cache.v, strict=True
    ):
        assert (part - oracle(rows, k, v, window=window)).abs().max() < TOLERANCE


@pytest.mark.parametrize("window", WINDOWS)
def test_prefill_with_context_reads_the_cache(window: int | None) -> None:
    q_lengths = [1, 3, 270, 9]
    cache = Cache([20, 3, 290, 10])
    q = random_queries(sum(q_lengths))
    nothing = torch.full((len(q), NUM_KV_HEADS, HEAD_DIM), float("nan"))
    metadata = cache.prefill_metadata(q_lengths, has_context=True)
    out = ReferenceAttention().prefill(
        q, nothing, nothing, cache.k_cache, cache.v_cache, metadata, window=window
    )
    for part, rows, k, v in zip(
        out.split(q_lengths), q.split(q_lengths), cache.k, cache.v, strict=True
    ):
        assert (part - oracle(rows, k, v, window=window)).abs().max() < TOLERANCE


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("has_context", [False, True])
def test_last_queries_alone_see_what_they_see_among_all(
    has_context: bool, window: int | None
) -> None:
    lengths = [1, 4, 300, 13]
    cache = Cache([20, 4, 310, 13] if has_context else lengths)
    metadata = cache.prefill_metadata(lengths, has_context=has_context)
    q = random_queries(sum(lengths))
    last = metadata.of_last_tokens()
    rows = q[metadata.last_rows]
    inputs = torch.cat(cache.k), torch.cat(cache.v), cache.k_cache, cache.v_cache
    out = ReferenceAttention().prefill(rows, *inputs, last, window=window)
    for row, k, v, seen in zip(rows, cache.k, cache.v, out, strict=True):
        assert (seen - oracle(row[None], k, v, window=window)[0]).abs().max() < TOLERANCE
    assert last.max_seqlen_q == 1
    assert last.last_rows.tolist() == [0, 1, 2, 3]


def test_rows_of_a_decode_batch_do_not_influence_each_other() -> None:
    cache = Cache([3, 17, 8])
    q = random_queries(3)
    attention = ReferenceAttention()
    before = attention.decode(q, cache.k_cache, cache.v_cache, cache.decode_metadata(), window=None)
    broken = cache.tables[1].long()
    cache.k_cache[broken], cache.v_cache[broken] = float("nan"), float("nan")
    after = attention.decode(q, cache.k_cache, cache.v_cache, cache.decode_metadata(), window=None)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_half_precision_is_rounded_only_at_the_end() -> None:
    cache = Cache([40], dtype=torch.bfloat16)
    q = random_queries(1).bfloat16()
    out = ReferenceAttention().decode(
        q, cache.k_cache, cache.v_cache, cache.decode_metadata(), window=None
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), oracle(q, cache.k[0], cache.v[0], window=None), rtol=2**-8, atol=1e-5
    )


def test_auto_is_the_reference_on_the_cpu() -> None:
    for name in ("auto", "reference"):
        attention = make_attention(name, CPU)
        assert (attention.name, attention.default_block_size) == ("reference", 16)
        attention.check(block_size=3, head_dim=10, dtype=torch.float64, device=CPU)


def test_flash_on_the_cpu_is_an_error() -> None:
    with pytest.raises(BackendError, match="runs on CUDA, the device is cpu"):
        make_attention("flash", CPU)


@pytest.mark.parametrize("name", ["auto", "flash"])
def test_missing_flash_attn_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(BackendError, match=r'pip install .* -e "\.\[cuda\]"') as caught:
        make_attention(name, torch.device("cuda"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for flash-attn; lists the arguments of each call."""
    calls: list[dict[str, Any]] = []

    def recorder(name: str) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            calls.append({"name": name, "q": q, "k": k, "v": v, **options})
            return torch.zeros(q.shape)

        return call

    module = ModuleType("flash_attn.flash_attn_interface")
    varlen = recorder("varlen")
    module.__dict__["_flash_attn_varlen_forward"] = lambda *args, **options: (
        varlen(*args, **options),
    )
    module.__dict__["flash_attn_with_kvcache"] = recorder("with_kvcache")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    return calls


def test_flash_prefill_pages_only_with_context(flash_calls: list[dict[str, Any]]) -> None:
    cache = Cache([5, 9])
    q = random_queries(14)
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    for has_context, window in ((False, None), (True, 4)):
        metadata = cache.prefill_metadata([5, 9], has_context=has_context)
        FlashAttention().prefill(q, k, v, cache.k_cache, cache.v_cache, metadata, window=window)
    plain, paged = flash_calls
    assert (plain["name"], plain["k"] is k, plain["v"] is v) == ("varlen", True, True)
    assert (plain["block_table"], plain["window_size_left"], plain["window_size_right"]) == (
        None,
        -1,
        -1,
    )
    assert (paged["k"] is cache.k_cache, paged["v"] is cache.v_cache) == (True, True)
    assert paged["block_table"] is cache.tables
    assert (paged["window_size_left"], paged["window_size_right"]) == (3, 0)
    assert paged["softmax_scale"] == HEAD_DIM**-0.5
    assert all(call["causal"] and call["max_seqlen_k"] == 9 for call in flash_calls)


def test_flash_decode_gives_each_row_one_query(flash_calls: list[dict[str, Any]]) -> None:
    cache = Cache([5, 9] * 30)
    metadata = cache.decode_metadata()
    out = FlashAttention().decode(
        random_queries(60), cache.k_cache, cache.v_cache, metadata, window=4
    )
    (call,) = flash_calls
    assert out.shape == (60, NUM_HEADS, HEAD_DIM)
    assert call["q"].shape == (60, 1, NUM_HEADS, HEAD_DIM)
    assert call["cache_seqlens"] is metadata.context_lens
    assert (call["window_size"], call["causal"]) == ((3, 0), True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"device": CPU}, BackendError, "the device is cpu"),
        ({"block_size": 128}, ConfigError, "block_size is 128; .* multiple of 256"),
        ({"dtype": torch.float32}, ConfigError, "dtype is float32; .* bfloat16 or float16"),
        ({"head_dim": 264}, BackendError, "head_dim is 264; .* at most 256"),
        ({"head_dim": 20}, BackendError, "head_dim is 20; .* multiple of 8"),
    ],
)
@pytest.mark.usefixtures("flash_calls")
def test_flash_checks_its_limits(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "block_size": 512,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda"),
    }
    FlashAttention().check(**good)
    with pytest.raises(error, match=message):
        FlashAttention().check(**{**good, **change})


@pytest.mark.usefixtures("flash_calls")
def test_flash_refuses_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    with pytest.raises(BackendError, match=r"needs compute capability 8\.0, this GPU has 7\.5"):
        FlashAttention().check(
            block_size=256, head_dim=64, dtype=torch.float16, device=torch.device("cuda")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_gives_what_the_reference_gives(head_dim: int, window: int | None) -> None:
    """bfloat16 keeps 8 bits; flash-attn also rounds the weights, of values with deviation 1."""
    device = torch.device("cuda")
    flash, reference = make_attention("auto", device), ReferenceAttention()
    assert flash.name == "flash"
    q_lengths, k_lengths = [1, 300, 256, 7], [1, 300, 700, 519]
    cache = Cache(k_lengths, block_size=256, head_dim=head_dim, dtype=torch.bfloat16, device=device)
    caches = cache.k_cache, cache.v_cache

    def compare(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)

    q = random_queries(4, head_dim).to(device, torch.bfloat16)
    decode = cache.decode_metadata()
    expected = reference.decode(q, *caches, decode, window=window)
    compare(flash.decode(q, *caches, decode, window=window), expected)
    planned = flash.planned_decode(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        block_size=256,
        dtype=torch.bfloat16,
        device=device,
    )
    if planned is not None and window is None:
        planned.plan(decode.block_tables, decode.context_lens)
        own_q = q.clone()  # a kernel between the two: see PlannedDecode
        compare(planned.decode(own_q, *caches), expected)
    k, v = (torch.cat(parts).to(device) for parts in (cache.k, cache.v))
    for lengths, has_context in ((q_lengths, True), (k_lengths, False)):
        q = random_queries(sum(lengths), head_dim).to(device, torch.bfloat16)
        metadata = cache.prefill_metadata(lengths, has_context=has_context)
        expected = reference.prefill(q, k, v, *caches, metadata, window=window)
        compare(flash.prefill(q, k, v, *caches, metadata, window=window), expected)
        rows = metadata.last_rows
        last = flash.prefill(q[rows], k, v, *caches, metadata.of_last_tokens(), window=window)
        compare(last, expected[rows])


@pytest.mark.parametrize(
    ("num_rows", "num_heads", "splits"),
    [
        *((1, 16, 16), (2, 16, 16), (8, 16, 4), (13, 16, 2), (14, 16, None)),
        *((64, 16, None), (65, 16, 1), (1, 32, None), (65, 32, 1)),
    ],
)
def test_decoding_goes_where_it_was_faster(
    num_rows: int, num_heads: int, splits: int | None
) -> None:
    heads = {"num_heads": num_heads, "num_kv_heads": 8}
    assert decode_splits(num_rows, **heads, head_dim=128) == splits
    assert decode_splits(num_rows, **heads, head_dim=96) is None, "no power of 2"
    assert decode_splits(num_rows, **heads, head_dim=8) is None, "too short for tl.dot"
    assert decode_splits(num_rows, **heads, head_dim=256) is None, "not measured"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("num_splits", [1, 3, 16])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_paged_decode_gives_what_the_reference_gives(
    group: int, num_splits: int, window: int | None
) -> None:
    """Contexts that end at, before and after borders of tiles and blocks; what lies past them is
    NaN. Twice, since the second launch finds what the first left in the counters."""
    from graphengine.kernels.paged_decode import paged_decode

    device = torch.device("cuda")
    lengths = [1, 63, 64, 65, 255, 256, 257, 700, 1024, 1500]
    cache = Cache(lengths, block_size=256, head_dim=128, dtype=torch.bfloat16, device=device)
    num_kv_heads = cache.k_cache.shape[2]
    for part in (cache.k_cache, cache.v_cache):
        for row, length in enumerate(lengths):
            if length % 256:
                part[cache.tables[row, length // 256], length % 256 :] = torch.nan
    q = randn_queries(len(lengths), group * num_kv_heads, device)
    metadata = cache.decode_metadata()
    arrivals = torch.zeros(len(lengths) * num_kv_heads, dtype=torch.int32, device=device)
    results = [
        paged_decode(
            q,
            cache.k_cache,
            cache.v_cache,
            metadata.block_tables,
            metadata.context_lens,
            arrivals,
            window=window,
            num_splits=num_splits,
        )
        for _ in range(2)
    ]
    assert torch.equal(*results)
    assert int(arrivals.count_nonzero()) == 0
    clean = [part.nan_to_num() for part in (cache.k_cache, cache.v_cache)]
    expected = ReferenceAttention().decode(q, *clean, metadata, window=window)
    torch.testing.assert_close(results[0], expected, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_attention_that_starts_early_sees_what_rope_wrote() -> None:
    """As many rows as it starts early for. The newest token alone decides: its key is far the
    largest where the query is. Each replay has other tokens, so what an earlier one left in the
    caches or in q is wrong."""
    from graphengine.kernels import fused, paged_decode
    from graphengine.kernels.tiles import MAX_ROWS

    device = torch.device("cuda")
    num_rows, num_heads, num_kv_heads, head_dim = MAX_ROWS, 4, 2, 128
    lengths = [1 + 28 * row for row in range(num_rows)]
    cache = Cache(lengths, block_size=256, head_dim=head_dim, dtype=torch.bfloat16, device=device)
    metadata = cache.decode_metadata()
    positions = metadata.context_lens.long() - 1
    blocks = cache.tables.long().gather(1, positions[:, None] // 256)[:, 0]
    slots = blocks * 256 + positions % 256
    cos_sin = torch.cat((torch.ones(2048, 64), torch.zeros(2048, 64)), dim=1).to(device)
    arrivals = torch.zeros(0, dtype=torch.int32, device=device)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.zeros(num_rows, width, dtype=torch.bfloat16, device=device)

    def step() -> Tensor:
        q, _, _ = fused.rope_and_cache(
            qkv.clone(),
            positions,
            cos_sin,
            cache.k_cache,
            cache.v_cache,
            slots,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_weight=None,
            k_weight=None,
            eps=1e-6,
        )
        tables, lens = metadata.block_tables, metadata.context_lens
        caches = cache.k_cache, cache.v_cache
        return paged_decode.paged_decode(
            q, *caches, tables, lens, arrivals, window=None, num_splits=1
        )

    step()  # compiles, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(10):
        torch.manual_seed(seed)
        direction = torch.randn(num_rows, 1, head_dim).sign() * 4
        v = torch.randn(num_rows, num_kv_heads, head_dim).bfloat16()
        heads = direction.expand(-1, num_heads + num_kv_heads, -1).bfloat16()
        qkv.copy_(torch.cat((heads, v), dim=1).flatten(1))
        graph.replay()
        expected = v.repeat_interleave(num_heads // num_kv_heads, dim=1).to(device)
        assert torch.equal(out, expected), seed


def randn_queries(num_rows: int, num_heads: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(num_rows, num_heads, 128, generator=generator)
    return q.to(device, torch.bfloat16)
