"""Does the kernel of gate and up compute what the plain product and SiLU compute?"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("cuda-bindings is for Linux here, as in torch", allow_module_level=True)

from cpu_launcher import CpuGatedLauncher  # after the skip: imports cuda-bindings

from graphengine.kernels import nvrtc, reference, tiles
from graphengine.kernels.gated_linear import (
    ARCHITECTURE,
    HEADER,
    SOURCE,
    defines_for,
    gated_linear,
)
from graphengine.kernels.tiles import gated_features

CUDA = torch.device("cuda")
# A gate and an up may each round to the other neighbour, 2^-7 away at most, and the result is
# rounded too.
TOLERANCE = 5 * 2**-8
MakeLauncher = Callable[..., CpuGatedLauncher]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> MakeLauncher:
    """By features of a tile, blocks at once and, of them, clusters of four."""
    folder = tmp_path_factory.mktemp("gated")

    def make(features: int, num_blocks: int, quads: int = 0) -> CpuGatedLauncher:
        return CpuGatedLauncher(features, num_blocks=num_blocks, folder=folder, quads=quads)

    return make


def inputs(
    num_rows: int, intermediate: int, depth: int, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_rows + intermediate + depth)
    x = torch.randn(num_rows, depth, device=device, dtype=torch.bfloat16)
    weight = torch.randn(2 * intermediate, depth, device=device) / depth**0.5
    return x, weight.bfloat16()


def assert_close(actual: Tensor, x: Tensor, weight: Tensor) -> None:
    # In float32, but for what is rounded between the two kernels of the reference.
    product = (x.float() @ weight.float().T).bfloat16()
    gate, up = product.float().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    # Of a gate below 0 more than that much of SiLU: it falls as fast as e^x.
    bound = TOLERANCE * (expected.abs() + up.abs() * 2**-4 + 2**-10)
    assert bool((((actual.float() - expected).abs()) <= bound).all())


@pytest.mark.parametrize(
    ("num_rows", "intermediate", "depth", "features", "num_blocks"),
    [
        (256, 96, 320, 96, 4),  # a tile each
        (256, 96, 320, 96, 2),  # two tiles of the same rows
        (130, 112, 384, 96, 4),  # rows and features that fill no tile
        (600, 64, 320, 96, 2),  # three tiles of rows, the last not full, in one cluster
        (600, 64, 320, 96, 4),  # one cluster has two, the other one
        (2048, 48, 320, 96, 2),  # as many tiles of rows as run side by side
        (257, 176, 256, 224, 2),
    ],
)
def test_kernel_computes_what_the_reference_does(
    launcher: MakeLauncher,
    num_rows: int,
    intermediate: int,
    depth: int,
    features: int,
    num_blocks: int,
) -> None:
    x, weight = inputs(num_rows, intermediate, depth)
    cpu = launcher(features, num_blocks)
    cpu.writes = [(x, x.clone())]
    x.fill_(torch.nan)  # until the kernel ahead has ended
    assert_close(gated_linear(x, weight, features, cpu), cpu.writes[0][1], weight)


def test_order_of_threads_does_not_matter(launcher: MakeLauncher) -> None:
    x, weight = inputs(256, 96, 448)
    cpu = launcher(96, 2)
    first = gated_linear(x, weight, 96, cpu)
    for _ in range(4):
        assert torch.equal(gated_linear(x, weight, 96, cpu), first)


@pytest.mark.parametrize(
    ("num_rows", "intermediate", "features", "num_blocks", "quads", "launches"),
    [
        (2048, 192, 96, 8, 1, [(4, 2, False), (4, 1, True)]),
        (1600, 208, 96, 8, 1, [(4, 2, False), (4, 1, True)]),  # 7 tiles of rows, the last not full
        (2600, 192, 96, 8, 1, [(4, 2, False), (4, 1, True)]),  # more than run side by side
        (6300, 64, 96, 16, 3, [(12, 2, False), (2, 1, True)]),  # one left, of 25 rows
        (1280, 480, 96, 16, 3, [(12, 2, False), (4, 1, True)]),  # only the last row of tiles left
        (2048, 192, 96, 8, 2, [(8, 2, False)]),  # no room beside
        (1600, 448, 224, 8, 1, [(4, 2, False), (4, 1, True)]),
        (1024, 192, 96, 8, 1, [(8, 1, True)]),  # two waves
        (1200, 192, 96, 4, 1, [(4, 1, True)]),  # nobody beside for the last row of tiles
    ],
)
def test_clusters_of_four_compute_what_those_of_two_do(
    launcher: MakeLauncher,
    num_rows: int,
    intermediate: int,
    features: int,
    num_blocks: int,
    quads: int,
    launches: list[tuple[int, int, bool]],
) -> None:
    x, weight = inputs(num_rows, intermediate, 320)
    four = launcher(features, num_blocks, quads)
    actual = gated_linear(x, weight, features, four)
    assert four.launches == launches
    assert_close(actual, x, weight)
    assert torch.equal(gated_linear(x, weight, features, launcher(features, num_blocks)), actual)


def test_clusters_beside_wait_for_the_others_not_for_the_kernel_ahead(
    launcher: MakeLauncher,
) -> None:
    x, weight = inputs(2048, 192, 320)
    four = launcher(96, 8, 1)
    # Written when the second launch, which has half of the tiles, first waits: when one of its
    # clusters has read all it needs, and the other most.
    four.writes = [(x, torch.full_like(x, torch.nan))]
    four.writes_of = 1
    actual = gated_linear(x, weight, 96, four)
    assert bool(x.isnan().all())
    assert float(actual.isfinite().float().mean()) > 0.75


def test_rows_of_a_wider_tensor(launcher: MakeLauncher) -> None:
    x, weight = inputs(200, 48, 320)
    wider = torch.full((200, 512), torch.nan, dtype=torch.bfloat16)
    wider[:, :320] = x
    assert_close(gated_linear(wider[:, :320], weight, 96, launcher(96, 2)), x, weight)


@pytest.mark.parametrize("cluster_rows", [1, 2])
@pytest.mark.parametrize("features", [128, 160, 192, 224])
def test_kernel_compiles_without_spills_or_products_in_turn(
    features: int, cluster_rows: int
) -> None:
    source, header = (path.read_text("utf-8") for path in (SOURCE, HEADER))
    defines = defines_for(features, cluster_rows)
    options = [*nvrtc.options_for(ARCHITECTURE, defines), "--ptxas-options=-v"]
    _, log = nvrtc.compile_source(source, SOURCE.name, options, {HEADER.name: header})
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    assert "serialized" not in log


@pytest.mark.parametrize(
    ("intermediate", "depth", "features"),
    [
        (14336, 4096, 224),  # Llama-3.1-8B: 128 tiles
        (12288, 4096, 192),  # Qwen3-8B
        (9728, 2560, 160),  # Qwen3-4B
        (8192, 3072, 128),  # Llama-3.2-3B
        (28672, 8192, 224),  # Llama-3.1-70B: two waves
        (17408, 5120, None),  # Qwen3-14B: little of a second wave
        (3072, 1024, None),  # Qwen3-0.6B: little of one
        (14336, 4100, None),
        (14344, 4096, None),
        (8192, 448, None),
    ],
)
def test_tiles_of_256_rows_fill_their_waves(
    intermediate: int, depth: int, features: int | None
) -> None:
    assert gated_features(256, intermediate, depth) == features


@pytest.mark.parametrize(
    ("row_tiles", "pairs", "num_quads", "share"),
    [
        (32, 64, 30, 960),  # an 8B's 8,192 rows: 1,024, in 32 waves either way
        (32, 64, 33, 1024),
        (32, 64, 0, 0),
        (4, 64, 30, 120),
        (3, 64, 30, 0),  # three waves
        (33, 64, 30, 960),  # the last row of tiles is left to clusters of two
        (9, 64, 30, 0),  # in 9 waves these have time for 54 of its 64
        (11, 64, 30, 320),
    ],
)
def test_clusters_of_four_take_no_wave_more(
    row_tiles: int, pairs: int, num_quads: int, share: int
) -> None:
    actual = tiles.quad_share(row_tiles, pairs, num_blocks=132, num_quads=lambda: num_quads)
    assert actual == share


def test_a_prefill_of_waves_enough_asks_for_clusters_of_four_whether_it_takes_them_or_not() -> None:
    """So that no smaller one is the first to."""
    asked = []
    assert tiles.quad_share(9, 64, num_blocks=132, num_quads=lambda: asked.append(1) or 30) == 0
    assert asked


@pytest.mark.parametrize("num_rows", [1, 192, 211, 257, 384])
def test_few_rows_of_a_tile_are_left_to_cublas(num_rows: int) -> None:
    assert gated_features(num_rows, 14336, 4096) is None


@pytest.mark.parametrize("num_rows", [212, 256, 512, 8192, 8193])
def test_all_rows_of_a_model_have_one_kernel(num_rows: int) -> None:
    assert gated_features(num_rows, 14336, 4096) == 224


@pytest.mark.parametrize(
    ("intermediate", "depth", "features"),
    [(3072, 1024, 192), (6144, 2048, 192), (17408, 5120, 224), (18944, 3584, 192)],
)
def test_long_prefills_of_other_models(intermediate: int, depth: int, features: int) -> None:
    assert gated_features(4096, intermediate, depth) == features


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [224, 256, 512, 1000, 3200, 8195])
@pytest.mark.parametrize(
    ("intermediate", "depth"), [(14336, 4096), (12288, 4096), (9728, 2560), (8192, 3072)]
)
def test_gpu_computes_what_the_reference_does(num_rows: int, intermediate: int, depth: int) -> None:
    from graphengine.kernels import fused

    x, weight = inputs(num_rows, intermediate, depth, "cuda")
    assert gated_features(num_rows, intermediate, depth) is not None
    actual = fused.linear_silu_mul(x, weight, None, decode=num_rows <= 256)
    assert_close(actual, x, weight)
    assert torch.equal(fused.linear_silu_mul(x, weight, None), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [256, 2048])
def test_gpu_replays_what_it_computes(num_rows: int) -> None:
    from graphengine.kernels import fused
    from graphengine.kernels.gated_linear import HopperLauncher

    x, weight = inputs(num_rows, 14336, 4096, "cuda")
    quads = HopperLauncher(x.device).num_quads(224)
    share = tiles.quad_share(num_rows // 256, 64, num_blocks=132, num_quads=lambda: quads)
    assert (share > 0) == (num_rows == 2048)
    norm = torch.ones(4096, device=CUDA, dtype=torch.bfloat16)

    def step() -> tuple[Tensor, Tensor]:
        normed = fused.rms_norm(x, norm, 1e-5)
        product = fused.linear_silu_mul(normed, weight, None, decode=num_rows <= 256)
        # One that starts early and reads what is computed last in clusters of four.
        return product, fused.linear_silu_mul(product[-256:, 9344:13440], weight, None)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    for _ in range(20):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = [part.clone() for part in actual]
        for part in actual:
            part.fill_(torch.nan)
        assert_close(replayed[0], fused.rms_norm(x, norm, 1e-5), weight)
        for part, expected in zip(replayed, step(), strict=True):
            assert torch.equal(part, expected)


@pytest.mark.gpu
def test_gpu_leaves_a_bias_and_another_dtype_to_cublas() -> None:
    from graphengine.kernels import fused

    x, weight = inputs(256, 14336, 4096, "cuda")
    bias = torch.randn(2 * 14336, device=CUDA, dtype=torch.bfloat16)
    actual = fused.linear_silu_mul(x, weight, bias)
    torch.testing.assert_close(actual, reference.linear_silu_mul(x, weight, bias))
    half = fused.linear_silu_mul(x.half(), weight.half(), None)
    torch.testing.assert_close(half, reference.linear_silu_mul(x.half(), weight.half(), None))
