"""Does the demo model add up, however it is run, and on a GPU in the shape of big models too?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import reference_model
from launches import record_launches
from paged import skip_without_flash4
from safetensors.torch import load_file
from widened import Width, make_copies, widen_demo

from graphengine import LLM, FinishReason, SamplingParams
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.flash4_kernels import Kind, Launch
from graphengine.demo.sums import answer, heldout_pairs, prompt
from graphengine.hub import resolve_model

SUMS = SamplingParams(temperature=0.0)


def sums(count: int, model: str | Path = "demo", **options: Any) -> list[str]:
    """Answers to so many sums that its training has never seen."""
    prompts = [prompt(*pair) for pair in heldout_pairs()[:count]]
    with LLM(str(model), **options) as llm:
        outputs = llm.generate(prompts, SUMS)
        if options.get("num_gpu_blocks_override", 100) < 100:
            assert llm.stats().num_preemptions > 0
        assert all(output.outputs[0].finish_reason is FinishReason.STOP for output in outputs)
        return [output.outputs[0].text for output in outputs]


def wrong(model: str | Path = "demo", **options: Any) -> list[str]:
    """Those of 1,000 sums that come out wrong: five are 99.5 %."""
    pairs = heldout_pairs()[:1000]
    answers = zip(pairs, sums(1000, model, **options), strict=True)
    return [prompt(*pair) + text for pair, text in answers if text != answer(*pair)]


def test_unseen_sums_are_right() -> None:
    assert len(wrong(device="cpu")) <= 5


@pytest.fixture(scope="module")
def hundred_sums() -> list[str]:
    return sums(100, device="cpu", max_num_seqs=100)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 3},
        {"max_num_seqs": 8},
        {"max_num_seqs": 32},
        {"max_num_seqs": 8, "async_scheduling": False},
        {"max_num_seqs": 8, "max_num_batched_tokens": 5},
        {"max_num_seqs": 16, "num_gpu_blocks_override": 33, "block_size": 2},
        {"max_num_seqs": 16, "num_gpu_blocks_override": 64, "block_size": 1},
        {
            "max_num_seqs": 9,
            "num_gpu_blocks_override": 17,
            "block_size": 4,
            "async_scheduling": False,
        },
        {"max_num_seqs": 8, "block_size": 3, "max_num_batched_tokens": 7},
        {"max_num_seqs": 5, "dtype": "bfloat16"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_sums_are_the_same_however_they_are_run(
    hundred_sums: list[str], options: dict[str, Any]
) -> None:
    """Peaked logits: a wrong answer points at the engine."""
    assert sums(100, device="cpu", **options) == hundred_sums


def test_chat_and_text_are_answered_alike() -> None:
    with LLM("demo", device="cpu") as llm:
        by_text, by_chat = llm.generate(
            ["123+456=", {"messages": [{"role": "user", "content": "123+456="}]}], SUMS
        )
    assert by_text.outputs[0].text == by_chat.outputs[0].text == "579"


# --- in the shape of other models

WIDTHS = {
    # As a Qwen3-0.6B, a Llama-3.2-1B (heads of 64) and a Llama-3.1-8B are wide.
    "0.6B": Width(1024, 3072, 16, 8, 128, 151936),
    "1B": Width(2048, 8192, 32, 8, 64, 128256),
    "8B": Width(4096, 14336, 32, 8, 128, 128256),
}
SMALL = Width(256, 768, 16, 4, 64, 48)


@pytest.mark.parametrize(
    "width", [SMALL, Width(128, 256, 4, 2, 128, 17)], ids=["all is wider", "head_dim alone"]
)
def test_wide_demo_has_the_logits_of_the_demo(tmp_path: Path, width: Width) -> None:
    prompts = [prompt(*pair) + answer(*pair) for pair in heldout_pairs()[:64]]
    with LLM("demo", device="cpu") as llm:
        ids = [llm.tokenizer.encode(text) for text in prompts]
    wide = reference_model(widen_demo(tmp_path, width))
    demo = reference_model(resolve_model("demo"))
    for row in ids:
        expected = demo(torch.tensor([row])).logits
        actual = wide(torch.tensor([row])).logits
        # Weights are rounded to bfloat16 once more, as shares.
        assert (actual[..., :16] - expected).norm() < 5e-3 * expected.norm()
        assert int(actual.argmax(-1).max()) < 16


def test_wide_demo_has_no_two_tiles_alike(tmp_path: Path) -> None:
    copies = make_copies(128, 1024, torch.Generator().manual_seed(1))
    sums = torch.zeros(128).index_add_(0, copies.of, copies.shares)
    torch.testing.assert_close(sums, torch.ones(128))
    assert len(copies.shares.unique()) == 1024
    state = load_file(widen_demo(tmp_path, SMALL) / "model.safetensors")
    for name, weight in state.items():
        if "_proj" in name:
            # The copies' columns differ by their shares, all of a row's by what they are of.
            assert len(weight.unique(dim=1).T) == weight.shape[1], name
        if "q_proj" in name:
            q = weight.unflatten(0, (SMALL.num_key_value_heads, -1, SMALL.head_dim))
            k = state[name.replace("q_proj", "k_proj")].unflatten(0, (-1, SMALL.head_dim))
            assert ((q[:, 0] != 0).any(-1) | (k != 0).any(-1)).all(), name


def test_wide_demo_adds_up_on_the_cpu(tmp_path: Path) -> None:
    assert len(wrong(widen_demo(tmp_path, SMALL), device="cpu", max_num_seqs=64)) <= 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        *({"dtype": "float32", "max_num_seqs": rows} for rows in (1, 3, 32)),
        {"dtype": "bfloat16", "max_num_seqs": 32},
    ],
    ids=str,
)
def test_unseen_sums_are_right_on_a_gpu(options: dict[str, Any]) -> None:
    settings = {"device": "cuda", "attention": "reference", "num_gpu_blocks_override": 300}
    assert len(wrong(**settings, **options)) <= 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"max_num_seqs": 32}, {"max_num_seqs": 256}, {"enforce_eager": True}], ids=str
)
def test_demo_as_shipped_adds_up_by_flash_attn(options: dict[str, Any]) -> None:
    flash_attn = pytest.importorskip("flash_attn")
    heads = torch.zeros(1, 1, 2, 32, dtype=torch.bfloat16, device="cuda")
    try:
        flash_attn.flash_attn_func(heads, heads, heads)
    except RuntimeError as error:
        pytest.skip(f"flash-attn was built without heads of 32: {error}")
    assert len(wrong(device="cuda", num_gpu_blocks_override=300, **options)) <= 5


@pytest.fixture(scope="module", params=WIDTHS)
def wide_demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    return widen_demo(path, WIDTHS[request.param], device="cuda")


@pytest.fixture(scope="module")
def tuning_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The products that a first start measures are kept there, not in the user's folder."""
    with pytest.MonkeyPatch.context() as context:
        path = tmp_path_factory.mktemp("products")
        context.setattr("graphengine.tuning.CACHE", path)
        yield path


@pytest.mark.gpu
@pytest.mark.usefixtures("tuning_cache")
@pytest.mark.parametrize(
    "options",
    [
        *({"max_num_seqs": rows} for rows in (1, 3, 8, 16, 32, 64, 128, 192, 256)),
        {"max_num_seqs": 256, "max_num_batched_tokens": 300},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"tuning": "off"},
        {"attention": "reference", "max_num_seqs": 32},
    ],
    ids=str,
)
def test_wide_demo_adds_up_by_every_setting_of_speed(
    wide_demo: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels of a Llama so wide, which do not take the demo's own shape; contexts are of a
    dozen tokens."""
    launched = record_launches(monkeypatch)
    settings = {"attention": "flash", "num_gpu_blocks_override": 300, **options}
    assert len(wrong(wide_demo, device="cuda", **settings)) <= 5
    if torch.cuda.get_device_capability()[0] == 9:
        assert "decode_chain" in launched
        assert ("decode_attention" in launched) == (settings["attention"] == "flash")


@pytest.mark.gpu
@pytest.mark.usefixtures("tuning_cache")
def test_wide_demo_adds_up_by_flash_attn_4(
    wide_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_flash4()
    # Prompts of eight tokens too.
    monkeypatch.setattr("graphengine.attention.flash4.MIN_MEAN_LENGTH", 1)
    launches: list[Launch | None] = []
    original = FlashAttention4._launch

    def launch(self: FlashAttention4, kind: Kind) -> Launch | None:
        launches.append(original(self, kind))
        return launches[-1]

    monkeypatch.setattr(FlashAttention4, "_launch", launch)
    settings = {"attention": "flash4", "num_gpu_blocks_override": 300}
    assert len(wrong(wide_demo, device="cuda", **settings)) <= 5
    assert launches
    assert None not in launches
