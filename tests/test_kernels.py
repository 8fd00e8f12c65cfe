"""Do the kernels compute what transformers computes, and does Triton compute what the twins do?

Tolerances. float32: 1e-5 relative and absolute, for sums in another order. bfloat16: 2^-7 relative,
one unit in the last place, for a float32 result next to a rounding border; cancellation in RoPE
needs the same as an absolute figure for values of order 1.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from shapes import random_shapes
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from graphengine import kernels
from graphengine.errors import BackendError
from graphengine.kernels import kernels_for, reference
from graphengine.kernels.tiles import linear_tiles, silu_tiles, wide_tiles

CUDA = torch.device("cuda")
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
ROPE_TOLERANCES = {
    dtype: {"rtol": t["rtol"], "atol": max(t["rtol"], t["atol"])} for dtype, t in TOLERANCES.items()
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def hf_cos_sin(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """transformers' cos and sin, [P, D] each, both halves alike."""
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=num_positions
    )
    cos, sin = LlamaRotaryEmbedding(config)(
        torch.zeros(1), torch.arange(num_positions).unsqueeze(0)
    )
    return cos[0], sin[0]


class RopeCase:
    """Random inputs of rope_and_cache; the caches are the strided halves of one tensor."""

    def __init__(
        self,
        *,
        num_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        qk_norm: bool,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        num_blocks = 3 + num_tokens // block_size
        width = (num_heads + 2 * num_kv_heads) * head_dim
        cos, sin = hf_cos_sin(64, head_dim)
        self.cos, self.sin = cos, sin
        self.cos_sin = torch.cat((cos[:, : head_dim // 2], sin[:, : head_dim // 2]), dim=-1)
        self.qkv = torch.randn(num_tokens, width).to(dtype)
        self.positions = torch.randint(64, (num_tokens,))
        self.kv = torch.randn(num_blocks, 2, block_size, num_kv_heads, head_dim).to(dtype)
        self.slot_mapping = torch.randperm(num_blocks * block_size)[:num_tokens]
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q_weight = torch.rand(head_dim).to(dtype) + 0.5 if qk_norm else None
        self.k_weight = torch.rand(head_dim).to(dtype) + 0.5 if qk_norm else None

    def to(self, device: torch.device) -> RopeCase:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, copy=True))
        return self

    def run(self, module: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; self.qkv and self.kv are changed."""
        q, k, v = module.rope_and_cache(
            self.qkv,
            self.positions,
            self.cos_sin,
            self.kv[:, 0],
            self.kv[:, 1],
            self.slot_mapping,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            q_weight=self.q_weight,
            k_weight=self.k_weight,
            eps=1e-6,
        )
        return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    x, weight = randn(5, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.copy_(weight)
    # transformers rounds once more, before the product with the weight: two units in bfloat16.
    tolerance = TOLERANCES[dtype] if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-6}
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), norm(x), **tolerance)


def test_add_rms_norm_adds_in_place_and_norms_the_unrounded_sum() -> None:
    x, residual = randn(4, 64, dtype=torch.bfloat16), randn(4, 64, dtype=torch.bfloat16, seed=1)
    weight = randn(64, dtype=torch.bfloat16, seed=2)
    total = x.float() + residual.float()
    out = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total.bfloat16())
    assert torch.equal(out, reference.rms_norm(total, weight.float(), 1e-6).bfloat16())
    of_rounded_sum = reference.rms_norm(residual, weight, 1e-6)
    assert not torch.equal(out, of_rounded_sum)  # or the line above could not tell the two apart


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 1, 16), (6, 3, 64)])
def test_rope_is_that_of_transformers(
    num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool
) -> None:
    case = RopeCase(
        num_tokens=7,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=16,
        qk_norm=qk_norm,
    )
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    q, k, v = (
        part.clone().view(1, 7, -1, head_dim).transpose(1, 2) for part in case.qkv.split(sizes, -1)
    )
    if qk_norm:
        norm = LlamaRMSNorm(head_dim, eps=1e-6)
        assert case.q_weight is not None
        assert case.k_weight is not None
        norm.weight.data = case.q_weight
        q = norm(q)
        norm.weight.data = case.k_weight
        k = norm(k)
    cos, sin = case.cos[case.positions].unsqueeze(0), case.sin[case.positions].unsqueeze(0)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)

    qkv = case.qkv
    results = case.run(reference)
    for result, expected in zip(results, (expected_q, expected_k, v), strict=True):
        torch.testing.assert_close(result, expected[0].transpose(0, 1), **TOLERANCES[torch.float32])
        assert result.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


@pytest.mark.parametrize("block_size", [16, 256])
def test_k_and_v_go_to_their_slots_and_nowhere_else(block_size: int) -> None:
    case = RopeCase(
        num_tokens=9, num_heads=4, num_kv_heads=2, head_dim=16, block_size=block_size, qk_norm=True
    )
    expected = case.kv.clone()
    _, k, v = case.run(reference)
    for token, slot in enumerate(case.slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        expected[block, 0, offset] = k[token]
        expected[block, 1, offset] = v[token]
    assert torch.equal(case.kv, expected)


def test_padding_rows_may_share_a_slot() -> None:
    case = RopeCase(
        num_tokens=5, num_heads=2, num_kv_heads=1, head_dim=16, block_size=16, qk_norm=False
    )
    case.slot_mapping = torch.tensor([20, 0, 0, 0, 0])
    before = case.kv.clone()
    _, k, v = case.run(reference)
    assert torch.equal(case.kv[1, 0, 4], k[0])
    assert any(torch.equal(case.kv[0, 1, 0], v[token]) for token in range(1, 5))
    assert torch.equal(case.kv[0, :, 1:], before[0, :, 1:])


def test_linear_silu_mul_is_silu_of_the_first_half_times_the_second() -> None:
    x, weight, bias = randn(3, 8), randn(20, 8, seed=1), randn(20, seed=2)
    gate, up = weight.split(10)
    gate_bias, up_bias = bias.split(10)
    expected = torch.nn.functional.silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
    result = reference.linear_silu_mul(x, weight, bias)
    torch.testing.assert_close(result, expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("has_bias", [False, True])
def test_add_linear_adds_in_place(has_bias: bool) -> None:
    x, weight, residual = randn(3, 8), randn(20, 8, seed=1), randn(3, 20, seed=2)
    bias = randn(20, seed=3) if has_bias else None
    expected = residual + x @ weight.T + (bias if bias is not None else 0.0)
    reference.add_linear(x, weight, bias, residual)
    torch.testing.assert_close(residual, expected, **TOLERANCES[torch.float32])


def test_partial_sums_count_as_their_sum() -> None:
    parts, residual, weight = randn(3, 5, 16), randn(5, 16, seed=1), randn(16, seed=2)
    twin_residual = residual.clone()
    result = reference.add_rms_norm(parts, residual, weight, 1e-5)
    expected = reference.add_rms_norm(parts.sum(0), twin_residual, weight, 1e-5)
    assert torch.equal(result, expected)
    assert torch.equal(residual, twin_residual)
    case = RopeCase(
        num_tokens=4, num_heads=4, num_kv_heads=2, head_dim=16, block_size=16, qk_norm=True
    )
    twin = copy.deepcopy(case)
    case.qkv = torch.stack((case.qkv - 1.0, torch.ones_like(case.qkv)))
    for result, expected in zip(case.run(reference), twin.run(reference), strict=True):
        torch.testing.assert_close(result, expected, **ROPE_TOLERANCES[torch.float32])
    torch.testing.assert_close(case.kv, twin.kv, **ROPE_TOLERANCES[torch.float32])
    case = copy.deepcopy(twin)
    case.qkv = case.qkv[None]
    for result, expected in zip(case.run(reference), twin.run(reference), strict=True):
        assert torch.equal(result, expected)


# Products of real models: features, depth.
PRODUCTS = [(6144, 4096), (4096, 4096), (4096, 14336), (4096, 1024), (1024, 2048), (1024, 3072)]


@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 33, 64])
def test_products_of_real_models_are_cut_into_whole_pieces(num_rows: int) -> None:
    for num_features, depth in PRODUCTS:
        tiles = linear_tiles(num_rows, num_features, depth, whole=False)
        if num_rows <= 16 and num_features * depth >= 2**24:
            assert tiles is None, "cuBLAS is ahead"
            continue
        assert tiles is not None
        assert num_features % tiles.block_f == 0
        assert depth % (tiles.splits * tiles.block_c) == 0
        assert num_features // tiles.block_f * tiles.splits >= 128, "multiprocessors stay idle"
    for num_features, depth in ((14336, 4096), (3072, 1024)):
        tiles = silu_tiles(num_rows, num_features, depth)
        if num_rows <= 16 and num_features * depth >= 2**24:
            assert tiles is None
            continue
        assert tiles is not None
        assert tiles.splits == 1, "SiLU takes whole sums"
    head = linear_tiles(num_rows, 151936, 1024, whole=True)
    assert head is not None
    assert head.splits == 1


def test_cublas_has_many_rows_and_what_no_tile_divides() -> None:
    assert linear_tiles(65, 4096, 4096, whole=False) is None
    assert silu_tiles(65, 14336, 4096) is None
    assert linear_tiles(1, 1000, 4096, whole=False) is None
    assert linear_tiles(1, 4096, 1000, whole=False) is None
    assert linear_tiles(1, 32001, 4096, whole=True) is None
    assert silu_tiles(1, 5, 64) is None


# Qwen3-0.6B: features, depth; gate_up's under SiLU.
SMALL_PRODUCTS = [(4096, 1024), (1024, 2048), (1024, 3072)]
SMALL_SILU = (3072, 1024)


@pytest.mark.parametrize("rows", [range(65, 129), range(129, 257)])
def test_wide_products_have_one_cut_and_a_multiprocessor_for_each_program(rows: range) -> None:
    cases = [(*shape, False) for shape in SMALL_PRODUCTS] + [(*SMALL_SILU, True)]
    for num_features, depth, silu in cases:
        cuts = {wide_tiles(num_rows, num_features, depth, silu=silu) for num_rows in rows}
        (tiles,) = cuts
        assert tiles is not None
        assert num_features % tiles.block_f == 0
        assert depth % (tiles.splits * tiles.block_c) == 0
        row_tiles = -(-rows[-1] // tiles.block_n)
        assert 96 <= num_features // tiles.block_f * tiles.splits * row_tiles <= 132
        lines = tiles.block_n + tiles.block_f * (2 if silu else 1)
        shared_bytes = 2 * tiles.num_stages * tiles.block_c * lines
        # Of 228 KiB of a multiprocessor: no two programs, and one with its 1 KiB and barriers.
        assert 114 * 2**10 < shared_bytes < 226 * 2**10
        assert tiles.splits == 1 or not silu, "SiLU takes whole sums"


def test_cublas_has_large_weights_of_more_rows() -> None:
    for num_features, depth in PRODUCTS[:3]:  # of an 8B
        for num_rows in (65, 128, 256):
            assert wide_tiles(num_rows, num_features, depth, silu=False) is None
    assert wide_tiles(256, 14336, 4096, silu=True) is None
    assert wide_tiles(64, 4096, 1024, silu=False) is None
    assert wide_tiles(257, 4096, 1024, silu=False) is None
    assert wide_tiles(100, 4096, 1000, silu=False) is None
    assert wide_tiles(100, 1024, 1024 + 128, silu=False) is None, "no halves of whole pieces"
    assert wide_tiles(100, 256, 256, silu=False) is None, "too few programs"


def test_cpu_gets_the_twins() -> None:
    assert kernels_for(torch.device("cpu")) is reference


@pytest.mark.parametrize("missing", ["triton", "cuda.bindings"])
def test_cuda_without_what_its_kernels_need_is_an_error(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("triton", "triton.language"):  # imported first; a CPU machine has none
        monkeypatch.setitem(sys.modules, name, Mock())
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("fused", "fused_sampling", "decode_chain", "nvrtc"):
        monkeypatch.delitem(sys.modules, f"graphengine.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    message = rf"Triton or cuda-bindings cannot be imported \(.*{missing}.*\); .*"
    message += r'pip install --no-build-isolation -e "\.\[cuda\]"'
    with pytest.raises(BackendError, match=message) as error:
        kernels_for(CUDA)
    assert "\n" not in str(error.value)


@pytest.fixture
def fused() -> ModuleType:
    """The Triton kernels, imported when a test runs: a CPU machine has no Triton."""
    from graphengine.kernels import fused

    return fused


@pytest.mark.gpu
def test_fused_has_the_signatures_of_its_twins(fused: ModuleType) -> None:
    for name in fused.__all__:
        signature = inspect.signature(getattr(reference, name))
        assert inspect.signature(getattr(fused, name)) == signature, name
    assert kernels_for(CUDA) is fused


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("num_tokens", "size"),
    [
        *((1, 4096), (3, 1000), (32, 1024), (65, 5120), (300, 8192)),
        *random_shapes(8, range(1, 400), range(8, 8193, 8)),
    ],
)
def test_fused_norms_and_silu_are_their_twins(
    fused: ModuleType, num_tokens: int, size: int, dtype: torch.dtype
) -> None:
    x = randn(num_tokens, size, dtype=dtype).to(CUDA)
    residual = randn(num_tokens, size, dtype=dtype, seed=1).to(CUDA)
    weight = randn(size, dtype=dtype, seed=2).to(CUDA)
    twin_residual = residual.clone()
    for result, expected in (
        (fused.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)),
        (
            fused.add_rms_norm(x, residual, weight, 1e-5),
            reference.add_rms_norm(x, twin_residual, weight, 1e-5),
        ),
    ):
        torch.testing.assert_close(result, expected, **TOLERANCES[dtype])
    assert torch.equal(residual, twin_residual)
    parts = randn(4, num_tokens, size, seed=4).to(CUDA)
    torch.testing.assert_close(
        fused.add_rms_norm(parts, residual, weight, 1e-5),
        reference.add_rms_norm(parts, twin_residual, weight, 1e-5),
        **TOLERANCES[dtype],
    )
    torch.testing.assert_close(residual, twin_residual, **TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 16, 32, 40, 64, 100])
def test_fused_products_are_their_twins(
    fused: ModuleType, num_rows: int, has_bias: bool, dtype: torch.dtype
) -> None:
    """Against float64. An error may be some units in the last place of the result; SiLU multiplies
    two rounded values of up to about 4. float32 sums round as often as they have terms, in cuBLAS
    too: 31 units were seen; products in TF32 would be off by thousands."""
    eps = torch.finfo(dtype).eps

    def check(result: Tensor, expected: Tensor, num_eps: int) -> None:
        error = (result.double() - expected).abs() / (1.0 + expected.abs())
        assert error.max() < num_eps * eps, (num_rows, weight.shape)

    for num_features, depth in (
        *((4096, 1024), (1024, 3072), (2**15, 256), (1000, 320)),
        *random_shapes(3, range(16, 8193, 16), range(16, 4097, 16), seed=num_rows),
    ):
        x = randn(num_rows, depth, dtype=dtype).to(CUDA)
        weight = (randn(num_features, depth, seed=1) / depth**0.5).to(CUDA, dtype)
        bias = randn(num_features, dtype=dtype, seed=2).to(CUDA) if has_bias else None
        exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
        for whole in (False, True):
            result = fused.linear(x, weight, bias, whole=whole, decode=True)
            if result.dim() == 3:
                assert not whole
                result = result.sum(0)
            check(result, exact, 64 if dtype == torch.float32 else 2)
        residual = randn(num_rows, num_features, dtype=dtype, seed=3).to(CUDA)
        total = residual.double() + exact
        fused.add_linear(x, weight, bias, residual)
        # With a bias what is added is rounded twice.
        check(residual, total, 64 if dtype == torch.float32 else 4 if has_bias else 2)
        gate, up = exact.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate) * up
        left = fused.linear(x, weight, bias)
        assert torch.equal(left, torch.nn.functional.linear(x, weight, bias)), "not cuBLAS's"
        for decode in (False, True):
            result = fused.linear_silu_mul(x, weight, bias, decode=decode)
            check(result, activated, 256 if eps < 1e-6 else 8)


@pytest.fixture
def hopper_kernels(fused: ModuleType) -> ModuleType:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("products of more than 64 rows are left to cuBLAS on this GPU")
    return fused


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [65, 80, 112, 128, 129, 161, 192, 255, 256])
def test_wide_products_are_their_twins(
    hopper_kernels: ModuleType, num_rows: int, has_bias: bool, dtype: torch.dtype
) -> None:
    """Against float64, as above. Rows past the last one are NaN. A row is the same to the bit
    beside as many others as its cut takes."""
    eps = torch.finfo(dtype).eps
    most = 128 if num_rows <= 128 else 256
    for num_features, depth in (*SMALL_PRODUCTS, (2 * SMALL_SILU[0], SMALL_SILU[1])):
        silu = num_features == 2 * SMALL_SILU[0]
        rows = torch.full((512, depth), float("nan"), dtype=dtype, device=CUDA)
        rows[:most] = randn(most, depth, dtype=dtype).to(CUDA)
        weight = (randn(num_features, depth, seed=1) / depth**0.5).to(CUDA, dtype)
        bias = randn(num_features, dtype=dtype, seed=2).to(CUDA) if has_bias else None
        expected = rows[:num_rows].double() @ weight.double().T
        if bias is not None:
            expected += bias.double()
        if silu:
            gate, up = expected.chunk(2, dim=-1)
            expected = torch.nn.functional.silu(gate) * up
            result, same = (
                hopper_kernels.linear_silu_mul(rows[:count], weight, bias, decode=True)
                for count in (num_rows, most)
            )
            assert torch.equal(result, same[:num_rows])
        else:
            result, same = (
                hopper_kernels.linear(rows[:count], weight, bias, decode=True)
                for count in (num_rows, most)
            )
            assert result.shape[1:] == (num_rows, num_features), "not left to cuBLAS"
            assert torch.equal(result, same[:, :num_rows])
            result = result.sum(0)
        error = (result.double() - expected).abs() / (1.0 + expected.abs())
        assert error.max() < (8 if silu else 2) * eps, (num_rows, weight.shape)
        left = hopper_kernels.linear(rows[:num_rows], weight, bias)
        assert torch.equal(left, torch.nn.functional.linear(rows[:num_rows], weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [100, 256])
def test_wide_products_that_start_early_see_what_came_before(
    hopper_kernels: ModuleType, num_rows: int
) -> None:
    """Replays, whose kernels overlap, against the same kernels one at a time, on other inputs each
    time, so that what an earlier replay left is wrong."""
    (f, e), (_, h), (_, i) = SMALL_PRODUCTS
    shapes = {"qkv": (f, e), "o": (e, h), "gate_up": (2 * i, e), "down": (e, i)}
    weights = {
        name: (randn(*shape, seed=n) / shape[1] ** 0.5).to(CUDA, torch.bfloat16)
        for n, (name, shape) in enumerate(shapes.items())
    }
    ones = torch.ones(e, dtype=torch.bfloat16, device=CUDA)
    x, residual = (
        torch.zeros(num_rows, size, dtype=torch.bfloat16, device=CUDA) for size in (h, e)
    )

    def step(settle: Callable[[], None]) -> tuple[Tensor, Tensor]:
        stream, added = residual.clone(), x
        for _ in range(3):
            settle()
            added = hopper_kernels.linear(added, weights["o"], None, decode=True)
            settle()
            normed = hopper_kernels.add_rms_norm(added, stream, ones, 1e-6)
            settle()
            activated = hopper_kernels.linear_silu_mul(
                normed, weights["gate_up"], None, decode=True
            )
            settle()
            added = hopper_kernels.linear(activated, weights["down"], None, decode=True)
            settle()
            normed = hopper_kernels.add_rms_norm(added, stream, ones, 1e-6)
            settle()
            qkv = hopper_kernels.linear(normed, weights["qkv"], None, decode=True)
            settle()
            added = hopper_kernels.rms_norm(qkv[0, :, :h].contiguous(), ones.repeat(h // e), 1e-6)
        return stream, added

    step(torch.cuda.synchronize)  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(lambda: None)
    for seed in range(10):
        x.copy_(randn(num_rows, h, seed=seed))
        residual.copy_(randn(num_rows, e, seed=seed + 100))
        graph.replay()
        for result, expected in zip(out, step(torch.cuda.synchronize), strict=True):
            assert torch.equal(result, expected), seed
        assert not out[1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "block_size"),
    [
        (1, 32, 8, 128, 256),
        (1, 1, 1, 64, 16),
        (5, 6, 2, 64, 16),
        (33, 16, 8, 128, 256),
        (7, 14, 2, 80, 16),
        (900, 32, 8, 128, 256),
        (17, 32, 4, 256, 256),
        *(
            (num_tokens, num_kv_heads * group, num_kv_heads, head_dim, block_size)
            for num_tokens, num_kv_heads, group, head_dim, block_size in random_shapes(
                6, range(1, 300), range(1, 9), range(1, 9), range(16, 257, 16), range(16, 257, 16)
            )
        ),
    ],
)
def test_fused_rope_and_cache_is_its_twin(
    fused: ModuleType,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    qk_norm: bool,
    dtype: torch.dtype,
) -> None:
    case, twin = (
        RopeCase(
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            qk_norm=qk_norm,
            dtype=dtype,
        ).to(CUDA)
        for _ in range(2)
    )
    for result, expected in zip(case.run(fused), twin.run(reference), strict=True):
        assert result.stride() == expected.stride()
        torch.testing.assert_close(result, expected, **ROPE_TOLERANCES[dtype])
    torch.testing.assert_close(case.kv, twin.kv, **ROPE_TOLERANCES[dtype])
    # What is cached is what attention gets, to the bit; the slots of other tokens are untouched.
    blocks, offsets = case.slot_mapping // block_size, case.slot_mapping % block_size
    _, k, v = case.qkv.view(num_tokens, -1, head_dim).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    assert torch.equal(case.kv[blocks, 0, offsets], k)
    assert torch.equal(case.kv[blocks, 1, offsets], v)
    case.kv[blocks, :, offsets] = 0
    twin.kv[blocks, :, offsets] = 0
    assert torch.equal(case.kv, twin.kv)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_elements(fused: ModuleType) -> None:
    from graphengine.kernels.fused_linear import _silu_mul

    case = RopeCase(
        num_tokens=2, num_heads=8, num_kv_heads=8, head_dim=128, block_size=256, qk_norm=False
    ).to(CUDA)
    num_blocks = 2**31 // (2 * 256 * 8 * 128) + 2
    case.kv = torch.zeros(num_blocks, 2, 256, 8, 128, dtype=torch.float32, device=CUDA)
    case.slot_mapping = torch.tensor([num_blocks * 256 - 1, 3], device=CUDA)
    _, k, v = case.run(fused)
    assert torch.equal(case.kv[-1, 0, -1], k[0])
    assert torch.equal(case.kv[-1, 1, -1], v[0])
    assert int(case.kv[1:-1].count_nonzero()) == 0
    del case

    gate_up = torch.zeros(2**31 // 28672 + 2, 28672, dtype=torch.bfloat16, device=CUDA)
    gate_up[-1] = 2.0
    activated = torch.nn.functional.silu(gate_up[-1, :14336].float()) * 2.0
    assert torch.equal(_silu_mul(gate_up)[-1], activated.to(torch.bfloat16))
    ones = torch.ones(28672, dtype=torch.bfloat16, device=CUDA)
    normed = fused.rms_norm(gate_up, ones, 1e-5)
    torch.testing.assert_close(normed[-1], ones, **TOLERANCES[torch.bfloat16])


@pytest.mark.gpu
def test_captured_rope_and_cache_follows_its_inputs(fused: ModuleType) -> None:
    first, second = (
        RopeCase(
            num_tokens=8,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            block_size=16,
            qk_norm=True,
            dtype=torch.bfloat16,
            seed=seed,
        ).to(CUDA)
        for seed in (1, 2)
    )
    static = RopeCase(
        num_tokens=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        block_size=16,
        qk_norm=True,
        dtype=torch.bfloat16,
    ).to(CUDA)
    static.run(fused)  # compiles, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.run(fused)
    for case in (first, second, first.to(CUDA)):
        for name in ("qkv", "positions", "kv", "slot_mapping", "q_weight", "k_weight"):
            getattr(static, name).copy_(getattr(case, name))
        graph.replay()
        case.run(fused)
        assert torch.equal(static.qkv, case.qkv)
        assert torch.equal(static.kv, case.kv)
