"""Is attention "flash4" chosen where it can be had, and what does it leave to "flash"?"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paged import CPU, HEAD_DIM, Cache, borders, random_queries
from torch import Tensor

from graphengine import LLM, SamplingParams
from graphengine.attention import PrefillMetadata, flash4, flash4_kernels, make_attention
from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.flash4_kernels import Kind, Launch
from graphengine.attention.reference import ReferenceAttention
from graphengine.config import EngineConfig
from graphengine.errors import BackendError, ConfigError
from graphengine.hub import resolve_model
from graphengine.kernels import kernels_for, linked
from graphengine.kernels.ahead import compiled_ahead
from graphengine.kernels.linked import LinkError
from graphengine.kernels.ways import Product
from graphengine.metrics import Laps
from graphengine.model_config import load_model_config
from graphengine.plan import _working_bytes
from graphengine.resolve import Resolved, keep_attention, own_tuning_file, resolve
from graphengine.scheduler import PrefillBatch
from graphengine.step_inputs import prefill_metadata
from graphengine.tuning_file import Choices

CUDA = torch.device("cuda")
CHOOSE = 'choose attention "flash"'
INSTALL = rf'pip install -e "\.\[flash4\]", or {CHOOSE}'
REFERENCE = ReferenceAttention()
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="links for Linux, by a C compiler"
)


def reference_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> Tensor:
    """Stands in for a kernel of flash-attn 4: each sequence alone, its keys packed."""
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
        parts.append(REFERENCE.prefill(q[own], k_own, v_own, k_own, v_own, metadata, window=window))
    return torch.cat(parts)


class World:
    """A Hopper GPU with all packages. calls: those that went to flash-attn 2. compiled: kinds of
    kernels, as they were wanted. error: of compiling them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.compiled: list[Kind] = []
        self.tried: list[Kind] = []
        self.error: Exception | None = None

    def kept(self, kind: Kind) -> Launch:
        self.compiled.append(kind)
        if self.error is not None:
            raise self.error
        return reference_launch


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    def recorder(name: str) -> Callable[..., Any]:
        def call(q: Tensor, *_: Tensor, **__: Any) -> Any:
            world.calls.append(name)
            return (torch.zeros(q.shape),) if name == "varlen" else torch.zeros(q.shape)

        return call

    two = ModuleType("flash_attn.flash_attn_interface")
    two.__dict__["_flash_attn_varlen_forward"] = recorder("varlen")
    two.__dict__["flash_attn_with_kvcache"] = recorder("with_kvcache")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", two)
    monkeypatch.setattr(flash4_kernels, "version", lambda _: flash4_kernels.VERSION)
    monkeypatch.setattr(flash4, "kept", world.kept)
    monkeypatch.setattr(flash4, "_try", lambda _launch, kind, _device: world.tried.append(kind))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    return world


@pytest.fixture
def flash_calls(world: World) -> list[str]:
    return world.calls


def of_any_length(**options: Any) -> FlashAttention4:
    """One that runs short chunks too."""
    attention = FlashAttention4(CUDA, **options)
    attention.min_mean_length = 1
    return attention


@pytest.mark.usefixtures("world")
def test_auto_is_flash4_where_it_runs_the_model() -> None:
    good: dict[str, Any] = {"head_dim": 128, "dtype": torch.bfloat16}
    attention = make_attention("auto", CUDA, **good)
    assert (attention.name, attention.default_block_size) == ("flash4", 256)
    changes = (
        {"head_dim": 96},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"dtype": None},
    )
    for change in (*changes, {"head_dim": None}):
        assert make_attention("auto", CUDA, **(good | change)).name == "flash"
    assert make_attention("flash", CUDA, **good).name == "flash"
    assert make_attention("auto", CPU, **good).name == "reference"


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_auto_is_flash_on_other_generations(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert make_attention("auto", CUDA, head_dim=128, dtype=torch.bfloat16).name == "flash"


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("version", [absent, lambda _: "4.0.0b35", lambda _: "4.0.0"])
def test_auto_is_flash_without_exactly_the_version_it_is_written_for(
    monkeypatch: pytest.MonkeyPatch, version: Callable[[str], str]
) -> None:
    monkeypatch.setattr(flash4_kernels, "version", version)
    assert make_attention("auto", CUDA, head_dim=128, dtype=torch.bfloat16).name == "flash"


def test_flash4_on_the_cpu_is_an_error() -> None:
    with pytest.raises(BackendError, match='"flash4" runs on CUDA, the device is cpu'):
        make_attention("flash4", CPU)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_generations_are_refused_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(flash4, "FlashAttention", lambda: pytest.fail("flash-attn was imported"))
    said = rf'needs compute capability 9\.x, this GPU has {capability[0]}\.0; choose .* "flash"'
    with pytest.raises(BackendError, match=said):
        make_attention("flash4", CUDA)


@pytest.mark.usefixtures("world")
def test_flash4_that_is_not_installed_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 2 has a folder flash_attn/cute of its own, which must not pass for it."""
    monkeypatch.setattr(flash4_kernels, "version", absent)
    with pytest.raises(BackendError, match=f"flash-attn-4 is not installed; .*{INSTALL}"):
        make_attention("flash4", CUDA)


def prefill(attention: FlashAttention4, *, window: int | None = None) -> Tensor:
    length = 30
    cache = Cache([length])
    metadata = cache.prefill_metadata([length], has_context=False)
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    q = random_queries(length)
    return attention.prefill(q, k, v, cache.k_cache, cache.v_cache, metadata, window=window)


def test_flash4_that_does_not_compile_is_an_error_that_says_why(world: World) -> None:
    world.error = BackendError("a kernel cannot be compiled (no CTK flavor)")
    with pytest.raises(BackendError, match=rf"compiled \(no CTK flavor\); {CHOOSE}$") as caught:
        prefill(of_any_length())
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is world.error


def test_auto_whose_kernel_does_not_compile_is_flash_from_then_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.error = BackendError("a kernel cannot be compiled (no CTK flavor)")
    attention = of_any_length(or_flash=True)
    assert (attention.name, attention.reads_key_slots) == ("flash4", True)
    for _ in range(3):
        prefill(attention)
    assert (attention.name, attention.reads_key_slots) == ("flash", False)
    assert world.calls == ["varlen"] * 3
    assert len(world.compiled) == 1
    (warning,) = caplog.messages
    assert re.search(r'compiled \(no CTK flavor\)\), it is "flash" here', warning)
    assert "install" not in warning
    another = of_any_length(or_flash=True)
    assert another.name == "flash4", "it is no matter of the class"


def test_auto_whose_kernel_cannot_be_launched_is_flash(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise BackendError("a kernel of flash-attn 4 cannot be launched (old driver)")

    monkeypatch.setattr(flash4, "_try", refused)
    attention = of_any_length(or_flash=True)
    prefill(attention)
    assert (attention.name, world.calls) == ("flash", ["varlen"])
    with pytest.raises(BackendError, match="old driver"):
        prefill(of_any_length())


def test_kernel_that_cannot_be_kept_is_an_error_that_says_why(world: World) -> None:
    """To import flash-attn 4 instead would cost each start ten seconds."""
    world.error = LinkError("there is no C compiler")
    said = r"cannot be kept: there is no C compiler; choose attention .flash.$"
    with pytest.raises(BackendError, match=said):
        prefill(of_any_length())


def test_auto_whose_kernel_cannot_be_kept_is_flash(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.error = LinkError("there is no C compiler")
    attention = of_any_length(or_flash=True)
    prefill(attention)
    assert (attention.name, world.calls) == ("flash", ["varlen"])
    (warning,) = caplog.messages
    assert re.search('cannot be kept: there is no C compiler.* it is "flash" here', warning)


@needs_compiler
def test_auto_whose_cache_cannot_be_written_is_flash_with_a_warning(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()

    def kept(kind: Kind) -> Launch:
        linked.load_or_make(tmp_path / "file" / "x.so", lambda _: None, longest_s=1.0)
        return reference_launch

    monkeypatch.setattr(flash4, "kept", kept)
    attention = of_any_length(or_flash=True)
    prefill(attention)
    assert (attention.name, world.calls) == ("flash", ["varlen"])
    (warning,) = caplog.messages
    assert f"{tmp_path}/file cannot be written" in warning


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is compiled by it, or needs the GPU that its threads are told of."""
    mode = SimpleNamespace(__enter__=lambda: None)
    triton = SimpleNamespace(AsyncCompileMode=lambda _executor: mode)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)


@pytest.mark.usefixtures("no_triton")
def test_rehearsal_compiles_and_launches_nothing(world: World) -> None:
    attention = of_any_length()
    launched: list[Tensor] = []

    def steps() -> None:
        launched.extend(prefill(attention) for _ in range(3))

    with compiled_ahead(CPU, steps):
        assert [out.shape for out in launched] == [random_queries(30).shape] * 3
        assert world.tried == []
    assert len(world.compiled) == len(world.tried) == 1
    prefill(attention)
    assert len(world.compiled) == len(world.tried) == 1
    assert world.calls == []


@pytest.mark.usefixtures("no_triton")
def test_error_of_a_rehearsed_kernel_is_raised_when_the_rehearsal_is_left(world: World) -> None:
    world.error = BackendError("a kernel cannot be compiled (no CTK flavor)")
    attentions = of_any_length(), of_any_length(or_flash=True)

    def start(attention: FlashAttention4) -> None:
        with compiled_ahead(CPU, lambda: prefill(attention).shape and None):
            assert attention.name == "flash4"

    with pytest.raises(BackendError, match="no CTK flavor"):
        start(attentions[0])
    start(attentions[1])
    assert attentions[1].name == "flash"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([256], []),
        ([255], ["varlen"]),
        ([500, 12], []),
        ([500, 11], ["varlen"]),
        ([1000, 1, 1], []),
    ],
)
def test_short_chunks_run_by_flash(
    flash_calls: list[str], lengths: list[int], expected: list[str]
) -> None:
    """By the mean of those that are prefilled together."""
    cache = Cache(lengths)
    metadata = cache.prefill_metadata(lengths, has_context=False)
    q, k, v = random_queries(sum(lengths)), torch.cat(cache.k), torch.cat(cache.v)
    FlashAttention4(CUDA).prefill(q, k, v, cache.k_cache, cache.v_cache, metadata, window=None)
    assert flash_calls == expected


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
    out = of_any_length().prefill(*inputs, window=window)
    torch.testing.assert_close(out, REFERENCE.prefill(*inputs, window=window))
    assert flash_calls == []


def test_without_context_the_cache_is_not_read(flash_calls: list[str]) -> None:
    lengths = [1, 14, 30]
    cache = Cache(lengths)
    q = random_queries(sum(lengths))
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    nothing = torch.full_like(cache.k_cache, float("nan"))
    metadata = cache.prefill_metadata(lengths, has_context=False)
    out = of_any_length().prefill(q, k, v, nothing, nothing, metadata, window=None)
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
    of_any_length().prefill(q, k, v, cache.k_cache, cache.v_cache, metadata, window=None)
    assert flash_calls == expected


@pytest.mark.parametrize("has_context", [False, True])
def test_single_queries_stay_with_flash(flash_calls: list[str], has_context: bool) -> None:
    cache = Cache([5, 9])
    metadata = cache.prefill_metadata([5, 9], has_context=has_context).of_last_tokens()
    k, v = torch.cat(cache.k), torch.cat(cache.v)
    of_any_length().prefill(
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


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
def test_trial_of_a_start_copies_as_many_keys_as_any_step(
    max_num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a long prompt beside whole ones."""
    copied = []
    prefill = ReferenceAttention.prefill

    def record(self: ReferenceAttention, *args: Any, **kwargs: Any) -> Tensor:
        if args[5].has_context:
            copied.append(len(args[5].key_slots))
        return prefill(self, *args, **kwargs)

    monkeypatch.setattr(ReferenceAttention, "prefill", record)
    monkeypatch.setattr(ReferenceAttention, "reads_key_slots", True)
    options = {"max_model_len": 64, "max_num_batched_tokens": 32, "max_num_seqs": max_num_seqs}
    with LLM("demo", device="cpu", **options) as llm:
        with llm._runner.exclusive():
            llm._runner.run_largest_steps(llm._table, max_context=64)
        tried = max(copied)
        copied.clear()
        prompts = ["1+" * (length // 2) for length in (62, 30, 62, 44, 62, 2, 50, 60) * 4]
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1))
    assert max(copied) <= tried
    assert tried == 64 + (31 if max_num_seqs > 1 else 0)


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


# --- what goes on with a folder of tuning goes on with its attention


def resolved_on_hopper(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Resolved:
    """As an engine with a model of 128 dims a head would."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    path = resolve_model("demo")
    model = replace(load_model_config(path), head_dim=128)
    config = EngineConfig("demo", dtype="bfloat16", **options)
    return resolve(config, path, model, laps=Laps())


def begin(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> str:
    """Starts with the folder as a build does; gives the attention."""
    resolved = resolved_on_hopper(monkeypatch, tuning=str(folder), **options)
    keep_attention(resolved)
    return resolved.attention.name


@pytest.mark.usefixtures("world")
def test_auto_of_an_engine_is_flash4_and_of_one_without_tuning_is_flash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ "off": nothing depends on what a machine has, as a job with it could not go on elsewhere."""
    for tuning, expected in (("auto", "flash4"), ("off", "flash")):
        resolved = resolved_on_hopper(monkeypatch, tuning=tuning)
        assert (resolved.attention.name, resolved.block_size) == (expected, 256)
    named = resolved_on_hopper(monkeypatch, tuning="off", attention="flash4")
    assert named.attention.name == "flash4"


@pytest.mark.usefixtures("world")
def test_what_began_with_flash4_goes_on_with_it_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: World
) -> None:
    assert begin(monkeypatch, tmp_path) == "flash4"
    assert begin(monkeypatch, tmp_path) == "flash4"
    # Not by flash in the end either, as "auto" would.
    world.error = BackendError("a kernel cannot be compiled (no CTK flavor)")
    attention = resolved_on_hopper(monkeypatch, tuning=str(tmp_path)).attention
    assert isinstance(attention, FlashAttention4)
    attention.min_mean_length = 1
    with pytest.raises(BackendError, match=r"no CTK flavor.*begin anew.* says that this began"):
        prefill(attention)
    monkeypatch.setattr(flash4_kernels, "version", absent)
    said = r'flash-attn-4 is not installed; install it .*, or begin anew.*another output.*"flash4"'
    with pytest.raises(BackendError, match=said):
        begin(monkeypatch, tmp_path)
    assert begin(monkeypatch, tmp_path, attention="flash") == "flash", "who asks for it gets it"


@pytest.mark.usefixtures("world")
def test_what_began_with_flash_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever has been installed meanwhile."""
    with monkeypatch.context() as patch:
        patch.setattr(flash4_kernels, "version", absent)
        assert begin(patch, tmp_path) == "flash"
    assert begin(monkeypatch, tmp_path) == "flash"


@pytest.mark.usefixtures("world")
def test_what_began_before_there_was_a_choice_goes_on_with_flash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder has ways of products alone, which stay."""
    resolved = resolved_on_hopper(monkeypatch, tuning=str(tmp_path))
    path = own_tuning_file(resolved.config, resolved.model_config, resolved.device, resolved.dtype)
    assert path is not None
    before = {"made_for": {}, "ways": {"64x128x128": "cublas"}}
    path.write_text(json.dumps(before))
    assert begin(monkeypatch, tmp_path) == "flash"
    assert json.loads(path.read_text()) == before


@pytest.mark.usefixtures("world")
def test_attention_that_fell_back_is_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: World
) -> None:
    world.error = BackendError("a kernel cannot be compiled (no CTK flavor)")
    resolved = resolved_on_hopper(monkeypatch, tuning=str(tmp_path))
    assert isinstance(resolved.attention, FlashAttention4)
    resolved.attention.min_mean_length = 1
    prefill(resolved.attention)
    keep_attention(resolved)
    world.error = None
    assert begin(monkeypatch, tmp_path) == "flash"


@pytest.mark.usefixtures("world")
def test_processes_that_come_to_two_attentions_do_not_go_on_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = (resolved_on_hopper(monkeypatch, tuning=str(tmp_path)) for _ in range(2))
    first.attention.name = "flash"
    keep_attention(first)
    with pytest.raises(BackendError, match=r'"flash4" here, and "flash" in .*; start this'):
        keep_attention(second)


@pytest.mark.usefixtures("world")
def test_attention_of_another_kind_of_gpu_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A job's workers may run on two kinds."""
    assert begin(monkeypatch, tmp_path) == "flash4"
    resolved = resolved_on_hopper(monkeypatch, tuning=str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    other = resolve(resolved.config, resolved.model_path, resolved.model_config, laps=Laps())
    keep_attention(other)
    assert other.attention.name == "flash"
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("named", ["flash", "flash4"])
def test_named_attention_is_kept_in_a_fresh_folder_and_refused_in_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    assert begin(monkeypatch, tmp_path, attention=named) == named
    assert begin(monkeypatch, tmp_path) == named
    for other in ("flash", "flash4"):
        assert begin(monkeypatch, tmp_path, attention=other) == other
    assert begin(monkeypatch, tmp_path) == named, "what it began with stands there"


@pytest.mark.usefixtures("world")
def test_reference_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert begin(monkeypatch, tmp_path, attention="reference") == "reference"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("written", ["reference", "auto", "flash5", "x" * 10_000, "\x1b[2J"])
def test_folder_that_says_what_no_start_wrote_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str
) -> None:
    begin(monkeypatch, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({"ways": {"attention": written}}))
    with pytest.raises(BackendError) as caught:
        begin(monkeypatch, tmp_path)
    said = str(caught.value)
    assert f"{path} says that this began with attention {written[:40]!r}" in said
    assert said.isprintable()
    assert len(said) < 500 + len(str(path))


def test_attention_of_another_name_is_refused() -> None:
    with pytest.raises(BackendError, match="attention is 'flash5'; choose one of auto, flash,"):
        make_attention("flash5", CUDA)


def test_attention_is_kept_before_products_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a start that comes between takes the folder for one from before there was a choice."""
    done: list[str] = []
    tuning = SimpleNamespace(
        kernels=kernels_for(CPU), measure=lambda _model, _streams: done.append("products")
    )
    monkeypatch.setattr("graphengine.build._make_tuning", lambda _resolved: tuning)
    monkeypatch.setattr("graphengine.build.keep_attention", lambda _: done.append("attention"))
    with LLM("demo", device="cpu"):
        assert done == ["attention", "products"]


@pytest.mark.usefixtures("world")
def test_products_that_are_measured_leave_the_attention(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert begin(monkeypatch, tmp_path) == "flash4"
    (path,) = tmp_path.glob("*.json")
    product = Product(64, 128, 128, silu=False)
    choices = Choices({product: {"rule": None}}, {}, own=path, cache=None)  # type: ignore[dict-item]
    assert list(choices.missing) == [product]
    choices.complete(lambda missing: dict.fromkeys(missing, "rule"))
    assert json.loads(path.read_text())["ways"] == {"attention": "flash4", str(product): "rule"}
    assert begin(monkeypatch, tmp_path) == "flash4"
