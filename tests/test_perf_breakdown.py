"""Does the account of a profiled step add up, with kernels that overlap, and floors that are known?

Events are made up, of a model with two layers; the profiler itself needs a GPU.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import perf.step_breakdown
from graphengine import LLM
from graphengine.errors import ConfigError
from graphengine.model_config import ModelConfig, load_model_config
from perf.kernel_accounts import KernelEvent, StepFloors, account, part_of
from perf.shapes import SHAPES, write_shape
from perf.step_breakdown import breakdown, point, table, trace_events
from perf.step_probe import StepProbe
from perf.workloads import GRID_STEPS

MAIN, COPIES = 7, 9
NORM, FLASH = "_add_rms_norm_kernel", "void flash::flash_fwd_splitkv_kernel<T<cutlass::half>>(P)"
LAYER = (NORM, "_linear_kernel", "_rope_and_cache_kernel", FLASH, "nvjet_tst_64x8_64x16_4x1")
LAYER += ("_linear_kernel", "_wide_linear_kernel")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_model_config(write_shape("tiny", tmp_path_factory.mktemp("shape")))


def in_turn(names: tuple[str, ...], *, us: float, every_us: float) -> list[KernelEvent]:
    """One kernel starts every `every_us` and takes `us`."""
    return [
        KernelEvent(name, MAIN, i * every_us, i * every_us + us) for i, name in enumerate(names)
    ]


def step_names(config: ModelConfig) -> tuple[str, ...]:
    return (*LAYER * config.num_layers, "gemvNSP_kernel", "_split_kernel", "_combine_kernel")


def test_kernels_that_overlap_are_counted_once(config: ModelConfig) -> None:
    """10 us each, one every 8: each but the first waits 2 us for the one before it."""
    floors = StepFloors(config, 4, 100, 1e12)
    found = account(in_turn((NORM,) * 5, us=10.0, every_us=8.0), 1, floors)
    assert found.span_us == found.busy_us == 42.0
    assert found.gap_us == 0.0
    (row,) = found.rows
    assert (row.count, row.own_us, row.raw_us) == (5, 42.0, 50.0)


def test_kernel_inside_another_has_no_time_of_its_own(config: ModelConfig) -> None:
    events = [KernelEvent(NORM, MAIN, 0.0, 10.0), KernelEvent("_split_kernel", MAIN, 2.0, 5.0)]
    events.append(KernelEvent("_combine_kernel", MAIN, 8.0, 12.0))
    found = account(events, 1, StepFloors(config, 4, 100, 1e12))
    assert [row.own_us for row in found.rows] == [10.0, 0.0, 2.0]
    assert found.busy_us == found.span_us == 12.0


def test_gaps_belong_to_the_kernel_that_ends_them(config: ModelConfig) -> None:
    events = [KernelEvent(NORM, MAIN, 0.0, 10.0), KernelEvent("_split_kernel", MAIN, 13.0, 14.0)]
    found = account(events, 2, StepFloors(config, 4, 100, 1e12))
    assert [row.gap_us for row in found.rows] == [0.0, 3.0]
    assert found.busy_us + found.gap_us == found.span_us == 14.0
    assert found.per_step()["gap_us"] == 1.5


def test_copies_of_other_streams_run_beside(config: ModelConfig) -> None:
    events = in_turn((NORM, "Memcpy DtoD (Device -> Device)"), us=10.0, every_us=10.0)
    events.append(KernelEvent("Memcpy HtoD (Pinned -> Device)", COPIES, 12.0, 40.0))
    found = account(events, 1, StepFloors(config, 4, 100, 1e12))
    assert found.busy_us == found.span_us == 20.0
    assert [row.kernel for row in found.beside] == ["Memcpy HtoD (Pinned -> Device)"]
    assert found.beside[0].raw_us == 28.0


def test_products_are_told_apart_by_their_place_in_the_step(config: ModelConfig) -> None:
    names = step_names(config) * 3
    floors = StepFloors(config, 4, 100, 1e12)
    per_step = account(in_turn(names, us=1.0, every_us=1.0), 3, floors).per_step()
    products = {
        row["part"]: (row["kernel"], row["count"])
        for row in per_step["rows"]
        if row["part"] in ("qkv", "o", "gate_up", "down", "lm_head", "product")
    }
    assert products == {
        "qkv": ("_linear_kernel", 2.0),
        "o": ("nvjet_tst_64x8_64x16_4x1", 2.0),
        "gate_up": ("_linear_kernel", 2.0),
        "down": ("_wide_linear_kernel", 2.0),
        "lm_head": ("gemvNSP_kernel", 1.0),
    }
    assert {row["part"] for row in per_step["rows"]} - products.keys() == {
        *("norm", "rope and cache", "attention", "sampler", "sampler's end")
    }


def test_products_of_another_number_have_no_floor(config: ModelConfig) -> None:
    names = ("_linear_kernel", *step_names(config))
    found = account(in_turn(names, us=1.0, every_us=1.0), 1, StepFloors(config, 4, 100, 1e12))
    unknown = [row for row in found.rows if row.part == "product"]
    assert sum(row.count for row in unknown) == 4 * config.num_layers + 2
    assert all(row.floor_us is None for row in unknown)


def test_chains_have_the_floor_of_all_their_products(config: ModelConfig) -> None:
    floors = StepFloors(config, 4, 100, 1e12)
    names = (*("decode_chain", "decode_attention") * 2, "decode_chain")
    events = in_turn((*names, "nvjet_x", "_split_kernel"), us=5.0, every_us=5.0)
    found = account(events, 1, floors)
    assert [row.part for row in found.rows] == ["chain", "attention", "lm_head", "sampler"]
    floor_us = sum(row.floor_us or 0.0 for row in found.rows if row.part != "sampler")
    assert floor_us == pytest.approx(floors.step_us)


@pytest.mark.parametrize(
    ("shape", "rows", "context", "floor_ms"),
    [
        # The floors of issue 4, at the bandwidth it was measured with.
        ("llama-8b", 32, 256, 3.6),
        ("llama-8b", 32, 4096, 7.2),
        ("llama-8b", 256, 1024, 12.6),
        ("llama-8b", 1, 1024, 3.4),
        ("qwen3-0.6b", 32, 640, 0.82),
        ("qwen3-0.6b", 256, 512, 3.8),
        ("qwen3-0.6b", 1, 256, 0.27),
    ],
)
def test_floor_of_a_step_is_the_one_its_limits_were_set_by(
    tmp_path: Path, shape: str, rows: int, context: int, floor_ms: float
) -> None:
    """Within 4 %: those count no activations, and are rounded to two digits."""
    floors = StepFloors(load_model_config(write_shape(shape, tmp_path)), rows, context, 4.47e12)
    assert 1e-3 * floors.step_us == pytest.approx(floor_ms, rel=0.04)


def test_window_bounds_what_attention_must_read(config: ModelConfig) -> None:
    whole = StepFloors(config, 32, 4096, 1e12).of("attention")
    windowed = replace(config, sliding_windows=(None, 1024))
    half = StepFloors(windowed, 32, 4096, 1e12).of("attention")
    assert whole is not None
    assert half is not None
    assert half / whole == pytest.approx((4096 + 1024) / (2 * 4096), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (FLASH, "attention"),
        ("void flash::flash_fwd_splitkv_combine_kernel<T<cutlass::half>>()", "split reduction"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(P)", "split reduction"),
        ("_rms_norm_kernel", "norm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>(P)", "product"),
        ("void at::native::index_elementwise_kernel<128, 4>()", "other"),
        ("Memset (Device)", "beside the kernels"),
    ],
)
def test_kernel_belongs_to_a_part_by_its_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_profile_without_kernels_is_refused(config: ModelConfig) -> None:
    events = [KernelEvent("Memcpy HtoD (Pinned -> Device)", COPIES, 0.0, 1.0)]
    with pytest.raises(ValueError, match="no kernels"):
        account(events, 1, StepFloors(config, 1, 1, 1e12))


def test_device_work_alone_is_read_from_a_trace() -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "ts": 5.5, "dur": 2.0}
    host = {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1.0, "dur": 1.0}
    marks = [{"ph": "M", "name": "thread_name"}, {"ph": "f", "cat": "ac2g", "name": "ac2g"}]
    trace = {"traceEvents": [*marks, host, kernel | {"args": {"stream": 7, "device": 0}}]}
    assert trace_events(trace) == [KernelEvent("k", 7, 5.5, 7.5)]


def test_point_is_measured_and_accounted_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the profiler: its events are made up, after the steps have run."""
    with LLM(
        str(write_shape("tiny", tmp_path)),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_model_len=64,
    ) as llm:

        def made_up(run: object) -> list[KernelEvent]:
            assert callable(run)
            assert len(run()) == GRID_STEPS
            return in_turn(step_names(llm.model_config) * GRID_STEPS, us=3.0, every_us=4.0)

        monkeypatch.setattr(perf.step_breakdown, "profiled", made_up)
        found = breakdown(llm, StepProbe(llm), 3, 20, 1e12)
    assert found["step_ms"] >= found["device_ms"] > 0.0
    num_kernels = len(step_names(llm.model_config))
    assert found["busy_us"] == pytest.approx(3.0 * num_kernels)
    text = table("tiny", found)
    assert text.startswith("tiny, 3x20: step ")
    assert len(text.splitlines()) == 2 + len(found["rows"])


@pytest.mark.parametrize("text", ["32", "32x", "x256", "0x256", "32x-1", "32x256x2"])
def test_point_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rows x context"):
        point(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_machine_without_a_device_is_told() -> None:
    with pytest.raises(ConfigError, match="CUDA device"):
        perf.step_breakdown.run("tiny", ((1, 8),), None)


def test_points_that_do_not_fit_are_told_before_any_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one was found when the first had been measured. The device is made up."""
    made: list[str] = []

    class Probe:
        def __init__(self, llm: object) -> None: ...

        def fits(self, rows: int, context: int) -> bool:
            return rows == 1

    def make_llm(path: str, *arguments: object) -> None:
        made.append(Path(path).name)

    monkeypatch.setattr(perf.step_breakdown.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(perf.step_breakdown, "read_bandwidth", lambda: 1e12)
    monkeypatch.setattr(perf.step_breakdown, "environment", dict)
    monkeypatch.setattr(perf.step_breakdown, "make_llm", make_llm)
    monkeypatch.setattr(perf.step_breakdown, "StepProbe", Probe)
    longest = SHAPES["tiny"]["max_position_embeddings"] - GRID_STEPS
    with pytest.raises(ConfigError, match=rf"1x{longest + 1} is too long .* {longest} or less"):
        perf.step_breakdown.run("tiny", ((1, 8), (1, longest + 1)), None)
    assert made == []
    with pytest.raises(ConfigError, match=rf"2x{longest} does not fit the KV cache"):
        perf.step_breakdown.run("tiny", ((1, longest), (2, longest)), None)
    assert len(made) == 1


@pytest.mark.gpu
def test_profile_holds_every_kernel_of_every_step(tmp_path: Path) -> None:
    output = tmp_path / "breakdown.json"
    perf.step_breakdown.run("tiny", ((4, 64),), output)
    (found,) = json.loads(output.read_text())["points"]
    assert 0.0 < found["busy_us"] <= found["span_us"]
    for row in found["rows"]:
        assert row["count"] == round(row["count"]), row
    assert "lm_head" in {row["part"] for row in found["rows"]}
