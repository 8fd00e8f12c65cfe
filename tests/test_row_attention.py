"""Does attention of many rows on Hopper give what plain attention gives, and a row alike in any
company?

See decode_cases.py for what the results are compared with.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
from decode_cases import BLOCK_SIZE, BORDERS, SHAPES, Case, Shape
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("cuda-bindings is for Linux here, as in torch", allow_module_level=True)

from cpu_launcher import CpuRowLauncher, layout_claims, static_asserts

from graphengine.attention.flash import FlashAttention
from graphengine.kernels import nvrtc, row_attention  # after the skip: imports cuda-bindings

CUDA = torch.device("cuda")
WINDOWS = [None, 1, 31, 32, 33, 100, 640]
Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    launcher = CpuRowLauncher(tmp_path_factory.mktemp("rows"))

    def run(case: Case, window: int | None = None) -> Tensor:
        return attend(case, window, launcher)

    return run


def attend(case: Case, window: int | None = None, launcher: CpuRowLauncher | None = None) -> Tensor:
    caches = case.k_cache, case.v_cache
    return row_attention.row_attention(
        case.q, *caches, case.tables, case.lens, window=window, launcher=launcher
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 64), (4, 2, 128), (8, 2, 64), (8, 1, 128), (12, 1, 64), (16, 1, 128)],
)
def test_kernel_on_a_cpu_agrees_with_float32(
    on_cpu: Run, heads: int, kv_heads: int, head_dim: int
) -> None:
    case = Case(Shape(heads, kv_heads, head_dim), [*BORDERS, 31, 32, 33, 97, 0])
    case.check(on_cpu(case))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_on_a_cpu_agrees_with_float32(on_cpu: Run, window: int | None) -> None:
    case = Case(Shape(4, 2, 64), [1, 32, 33, 65, 100, 255, 300, 700])
    if window is not None:
        case.spoil_before(window)
    case.check(on_cpu(case, window), window)


def test_scores_far_above_the_others_agree_with_float32(on_cpu: Run) -> None:
    case = Case(Shape(12, 1, 64), [700, 333])
    case.spread_scores()
    case.check(on_cpu(case))


def test_a_token_that_outweighs_all_others_is_what_comes_out(on_cpu: Run) -> None:
    """e^3 to e^5 above the first token, so that the base is not moved, and its weight, rounded, is
    no power of two."""
    case = Case(Shape(8, 1, 64), [600] * 8)
    case.q.zero_()
    case.q[:, :, 0] = 8
    first, last = case.tables[:, 0].long(), case.tables[:, 2].long()
    case.k_cache.fill_(-100)
    case.k_cache[first, 0] = 0
    at = 599 % BLOCK_SIZE
    case.k_cache[last, at, 0, 0] = torch.linspace(3, 5, 8).bfloat16()
    out, exact = on_cpu(case).float(), case.reference()
    # Nothing but the result's own rounding: a rounded weight beside a mass of whole ones adds its
    # own, up to 2e-3.
    rounding = (exact.bfloat16() - exact).norm(dim=(1, 2))
    assert ((out - exact).norm(dim=(1, 2)) < 1.1 * rounding).all()


def test_a_row_on_a_cpu_is_alike_in_any_company(on_cpu: Run) -> None:
    """In any order of threads, in any place."""
    shape = Shape(4, 2, 64)
    contexts = [900, 64, 640, 1, 130, 77, 1500]
    first = on_cpu(Case(shape, contexts))
    for num_rows in (1, 3):
        assert torch.equal(on_cpu(Case(shape, contexts[:num_rows])), first[:num_rows])
    case = Case(shape, contexts)
    order = torch.tensor([6, 3, 5, 0, 2, 1, 4])
    case.q.copy_(case.q[order].clone())
    case.tables, case.lens = case.tables[order], case.lens[order]
    assert torch.equal(on_cpu(case), first[order])


def compile_kernel(shape: Shape, added: str = "") -> str:
    """The compiler's log of row_attention.cu with `added` at its end."""
    defines = row_attention.defines_for(**shape.sizes)
    options = nvrtc.options_for(row_attention.ARCHITECTURE, defines)
    source = row_attention.SOURCE.read_text("utf-8") + added
    included = {header.name: header.read_text("utf-8") for header in row_attention.HEADERS}
    options += ["--ptxas-options=-v"]
    return nvrtc.compile_source(source, "row_attention.cu", options, included)[1]


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_compiles_without_spills_and_agrees_with_its_host(name: str) -> None:
    # 228 KiB a multiprocessor, 1 of them for the system of each block.
    fits = static_asserts(["(SHARED_BYTES + 1024) * BLOCKS_PER_SM <= 228 * 1024"])
    log = compile_kernel(SHAPES[name], layout_claims(row_attention.Params) + fits)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spills == ["0"] * 2, log


def test_nothing_is_taken_on_a_cpu() -> None:
    case = Case(Shape(4, 2, 64), [3])
    assert not row_attention.takes(case.q, case.k_cache)


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_agrees_with_float32(name: str, window: int | None) -> None:
    torch.zeros(1, device=CUDA)  # the driver's functions need the device's context
    for contexts in ([*BORDERS, 0, 0], [4096, 1, 2500, 0], [1000], [300] * 64):
        case = Case(SHAPES[name], contexts, CUDA)
        assert row_attention.takes(case.q, case.k_cache)
        case.check(attend(case, window), window)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_a_row_is_alike_alone_and_among_others(name: str) -> None:
    torch.zeros(1, device=CUDA)
    contexts = [900, 64, 4096, 1, 130, 77, 1500] + [5 + 17 * i for i in range(93)]
    all_rows = attend(Case(SHAPES[name], contexts, CUDA))
    for num_rows in (1, 2, 7, 64):
        out = attend(Case(SHAPES[name], contexts[:num_rows], CUDA))
        assert torch.equal(out, all_rows[:num_rows])


@pytest.mark.gpu
def test_steps_of_many_rows_run_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphengine.attention import DecodeMetadata

    torch.zeros(1, device=CUDA)
    ran = []
    launch = row_attention.HopperLauncher.launch
    monkeypatch.setattr(
        row_attention.HopperLauncher,
        "launch",
        lambda self, *arguments: (ran.append(arguments[2]), launch(self, *arguments)),
    )
    for num_rows in (64, 65):
        case = Case(SHAPES["llama-8b"], [70] * num_rows, CUDA)
        metadata = DecodeMetadata(
            slot_mapping=torch.zeros(0), block_tables=case.tables, context_lens=case.lens
        )
        caches = case.k_cache, case.v_cache
        case.check(FlashAttention().decode(case.q, *caches, metadata, window=None))
    assert ran == [65 * 8]
