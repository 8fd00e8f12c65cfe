"""Are our logits transformers'? Every family and variant, through a scattered paged cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    VARIANTS,
    VOCAB_SIZE,
    WINDOW,
    hf_config,
    reference_model,
    write_checkpoint,
)
from paged import last_rows
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from captures import BucketLadder, CpuStreams
from graphengine.attention import (
    AttentionBackend,
    DecodeMetadata,
    PrefillMetadata,
    make_attention,
)
from graphengine.attention.reference import ReferenceAttention
from graphengine.kernels import kernels_for, reference
from graphengine.kv_cache import KVCache
from graphengine.layers import rope_table
from graphengine.model import DecoderModel
from graphengine.model_config import ModelConfig, load_model_config
from graphengine.prefill_graphs import PrefillGraphs
from graphengine.weights import load_weights

CPU = torch.device("cpu")
# float32 in another order of summation; logits have a standard deviation of about 3.
TOLERANCE = 1e-4
BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
LENGTHS = (1, 4, 37, 18)  # one token, one full block, past the window and past llama3's 24
NUM_DECODE_STEPS = 6


def empty_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    max_model_len: int = MAX_MODEL_LEN,
    attention: AttentionBackend | None = None,
    device: torch.device = CPU,
) -> DecoderModel:
    return DecoderModel(
        config,
        dtype=dtype,
        device=device,
        kernels=kernels_for(device),
        attention=attention or make_attention("reference", device),
        max_model_len=max_model_len,
        block_size=BLOCK_SIZE,
    )


def load_model(path: Path, *, dtype: torch.dtype = torch.float32) -> DecoderModel:
    config = load_model_config(path)
    model = empty_model(config, dtype=dtype)
    load_weights(model, path, config)
    return model


class NotingKernels:
    """The twins; notes whether products say that they are of a decode step."""

    def __init__(self) -> None:
        self.decode: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def linear(self, *args: Any, decode: bool = False, **options: Any) -> Tensor:
        self.decode.append(decode)
        return reference.linear(*args, **options)

    def add_linear(self, *args: Any) -> None:
        self.decode.append(False)
        reference.add_linear(*args)

    def linear_silu_mul(self, *args: Any, decode: bool = False) -> Tensor:
        self.decode.append(decode)
        return reference.linear_silu_mul(*args)


@dataclass
class Paged:
    """A model with sequences in randomly scattered blocks; feeds them token by token."""

    model: DecoderModel
    graphs: PrefillGraphs | None = None

    def __post_init__(self) -> None:
        blocks_each = -(-MAX_MODEL_LEN // BLOCK_SIZE)
        num_blocks = 1 + len(LENGTHS) * blocks_each
        self.kv = KVCache(
            self.model.config,
            num_blocks,
            block_size=BLOCK_SIZE,
            dtype=self.model.embed_tokens.dtype,
            device=CPU,
        )
        for cache in (*self.kv.k, *self.kv.v):
            cache[1:] = float("nan")  # a slot never written must never show
        ids = list(range(1, num_blocks))
        random.Random(0).shuffle(ids)
        self.tables = torch.tensor(ids, dtype=torch.int32).view(len(LENGTHS), blocks_each)
        self.written = [0] * len(LENGTHS)

    def prefill(self, chunks: dict[int, list[int]]) -> Tensor:
        """Next tokens of some sequences -> logits after the last of each, [S, V]."""
        seqs = list(chunks)
        starts = [self.written[s] for s in seqs]
        lengths = [len(chunk) for chunk in chunks.values()]
        positions = [start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)]
        owners = [s for s, n in zip(seqs, lengths, strict=True) for _ in range(n)]
        totals = [start + n for start, n in zip(starts, lengths, strict=True)]
        metadata = PrefillMetadata(
            slot_mapping=self.slots(owners, positions),
            cu_seqlens_q=borders(lengths),
            cu_seqlens_k=borders(totals),
            last_rows=last_rows(lengths),
            block_tables=self.tables[seqs],
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(totals),
            has_context=any(starts),
        )
        for s, total in zip(seqs, totals, strict=True):
            self.written[s] = total
        tokens = [token for chunk in chunks.values() for token in chunk]
        return self.run(tokens, positions, metadata)

    def decode(self, tokens: dict[int, int], *, num_padding: int = 2) -> Tensor:
        """Next token of some sequences -> logits [rows, V]. Padding rows use the null block."""
        seqs = list(tokens)
        positions = [self.written[s] for s in seqs]
        tables = torch.zeros(len(seqs) + num_padding, self.tables.shape[1], dtype=torch.int32)
        tables[: len(seqs)] = self.tables[seqs]
        context_lens = [position + 1 for position in positions] + [1] * num_padding
        padding = torch.zeros(num_padding, dtype=torch.int64)
        metadata = DecodeMetadata(
            slot_mapping=torch.cat((self.slots(seqs, positions), padding)),
            block_tables=tables,
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
        )
        for s in seqs:
            self.written[s] += 1
        ids = list(tokens.values()) + [0] * num_padding
        logits = self.run(ids, positions + [0] * num_padding, metadata)
        assert logits.isfinite().all()
        return logits[: len(seqs)]

    def slots(self, seqs: list[int], positions: list[int]) -> Tensor:
        blocks = [
            int(self.tables[s, p // BLOCK_SIZE]) for s, p in zip(seqs, positions, strict=True)
        ]
        return torch.tensor(
            [b * BLOCK_SIZE + p % BLOCK_SIZE for b, p in zip(blocks, positions, strict=True)]
        )

    @torch.inference_mode()
    def run(
        self, tokens: list[int], positions: list[int], metadata: DecodeMetadata | PrefillMetadata
    ) -> Tensor:
        ids, places = torch.tensor(tokens), torch.tensor(positions)
        if self.graphs is None or isinstance(metadata, DecodeMetadata):
            return self.model.logits(self.model(ids, places, self.kv, metadata))
        bucket = self.graphs.ladder.pick(len(tokens))
        inputs = {"input_ids": ids, "positions": places, "slot_mapping": metadata.slot_mapping}
        padded = {
            name: torch.nn.functional.pad(tensor, (0, bucket - len(tokens)))
            for name, tensor in inputs.items()
        }
        return self.model.logits(self.graphs.run(padded, len(tokens), metadata))


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_prompts() -> list[list[int]]:
    """One list of tokens a sequence, prompt and the tokens to decode after it."""
    rng = random.Random(1)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n + NUM_DECODE_STEPS)] for n in LENGTHS]


@torch.inference_mode()
def expected_logits(reference: Any, sequences: list[list[int]]) -> list[Tensor]:
    return [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= TOLERANCE


@dataclass
class Case:
    paged: Paged
    sequences: list[list[int]]
    expected: list[Tensor]

    def decode_and_compare(self) -> None:
        for step in range(NUM_DECODE_STEPS):
            at = [n + step for n in LENGTHS]
            logits = self.paged.decode({s: self.sequences[s][p] for s, p in enumerate(at)})
            for s, p in enumerate(at):
                assert_close(logits[s], self.expected[s][p])


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DecoderModel, list[Tensor]]:
    path = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return load_model(path), expected_logits(reference_model(path), random_prompts())


@pytest.fixture
def case(loaded: tuple[DecoderModel, list[Tensor]]) -> Case:
    model, expected = loaded
    return Case(Paged(model), random_prompts(), expected)


def test_logits_are_large_enough_for_the_tolerance_to_mean_something(case: Case) -> None:
    assert 1.0 < torch.cat(case.expected).std().item() < 10.0


def test_ragged_prefill_then_decode_matches_transformers(case: Case) -> None:
    prompts = {s: tokens[: LENGTHS[s]] for s, tokens in enumerate(case.sequences)}
    for s, logits in enumerate(case.paged.prefill(prompts)):
        assert_close(logits, case.expected[s][LENGTHS[s] - 1])
    case.decode_and_compare()


def test_last_layer_of_a_prefill_runs_for_last_tokens_alone(case: Case) -> None:
    """In pieces and without."""
    paged = case.paged
    rows: list[int] = []
    layer = paged.model.layers[-1]
    end = layer.end

    def noted(attended: Tensor, residual: Tensor, *, decode: bool) -> Tensor | None:
        rows.append(len(attended))
        return end(attended, residual, decode=decode)

    prompts = {s: case.sequences[s][: LENGTHS[s]] for s in (1, 2, 3)}
    graphs = PrefillGraphs(paged.model, paged.kv, CpuStreams(), BucketLadder([64]), captures=False)
    layer.end = noted
    try:
        for paged.graphs in (None, graphs):
            paged.written = [0] * len(LENGTHS)
            paged.prefill(prompts)
    finally:
        del layer.end
    assert rows == [3, 3]


def test_products_are_told_whether_the_step_is_a_decode_step(case: Case) -> None:
    """A prefill is launched anew each time: its products run in what the host launches quickly."""
    kernels = NotingKernels()
    for layer in case.paged.model.layers:
        layer._kernels = kernels  # type: ignore[assignment]
    try:
        case.paged.prefill({0: case.sequences[0][: LENGTHS[0]]})
        num_products = 4 * len(case.paged.model.layers)
        assert kernels.decode == [False] * num_products
        case.paged.decode({0: 1})
        assert kernels.decode[num_products:] == [True] * num_products
    finally:
        for layer in case.paged.model.layers:
            layer._kernels = kernels_for(CPU)


def test_chunked_prefill_then_decode_matches_transformers(case: Case) -> None:
    """The second step mixes sequences with and without context, and cuts within a block."""
    cuts = {2: 21, 3: 9}
    first = {s: case.sequences[s][:cut] for s, cut in cuts.items()}
    second = {s: case.sequences[s][cuts.get(s, 0) : LENGTHS[s]] for s in (3, 0, 2, 1)}
    for s, logits in zip(first, case.paged.prefill(first), strict=True):
        assert_close(logits, case.expected[s][cuts[s] - 1])
    for s, logits in zip(second, case.paged.prefill(second), strict=True):
        assert_close(logits, case.expected[s][LENGTHS[s] - 1])
    case.decode_and_compare()


def test_prefill_in_pieces_matches_transformers(case: Case) -> None:
    """Padded, in buckets that are used again, of sequences with and without context."""
    paged = case.paged
    paged.graphs = PrefillGraphs(
        paged.model, paged.kv, CpuStreams(), BucketLadder([33, 64]), captures=True
    )
    cuts = {2: 21, 3: 9}
    first = {s: case.sequences[s][:cut] for s, cut in cuts.items()}
    second = {s: case.sequences[s][cuts.get(s, 0) : LENGTHS[s]] for s in (3, 0, 2, 1)}
    for s, logits in zip(first, paged.prefill(first), strict=True):
        assert_close(logits, case.expected[s][cuts[s] - 1])
    for s, logits in zip(second, paged.prefill(second), strict=True):
        assert_close(logits, case.expected[s][LENGTHS[s] - 1])
    case.decode_and_compare()


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["llama_bias", "qwen3"])
def test_stored_dtype_and_shards_do_not_matter(
    tmp_path: Path, variant: str, dtype: torch.dtype, max_shard_size: str
) -> None:
    path = write_checkpoint(tmp_path, variant, dtype=dtype, max_shard_size=max_shard_size)
    assert len(list(path.glob("*.safetensors"))) == 1 or max_shard_size == "40KB"
    assert (path / "model.safetensors.index.json").exists() == (max_shard_size == "40KB")
    sequences = random_prompts()
    paged = Paged(load_model(path))
    expected = expected_logits(reference_model(path), sequences)
    prompts = {s: tokens[: LENGTHS[s]] for s, tokens in enumerate(sequences)}
    for s, logits in enumerate(paged.prefill(prompts)):
        assert_close(logits, expected[s][LENGTHS[s] - 1])


def test_bfloat16_model_stays_near_float32(tmp_path: Path) -> None:
    """bfloat16 rounds to 3 digits; over three layers that leaves a tenth of a deviation."""
    path = write_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    sequences = random_prompts()
    prompts = {s: tokens[: LENGTHS[s]] for s, tokens in enumerate(sequences)}
    exact = Paged(load_model(path)).prefill(prompts)
    rounded = Paged(load_model(path, dtype=torch.bfloat16)).prefill(prompts)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).std() < 0.1 * exact.std()


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path, "llama_tied"))
    assert model.lm_head is model.embed_tokens
    assert "lm_head" not in dict(model.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_parameters_is_the_models(tmp_path: Path, variant: str) -> None:
    hf_config(variant, architectures=[architecture(variant)]).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    model = empty_model(config, max_model_len=8)
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_window_no_position_reaches_past_is_dropped(tmp_path: Path) -> None:
    """flash-attn is faster without one."""
    asked: list[int | None] = []

    class Recorder(ReferenceAttention):
        def decode(self, *args: Any, window: int | None) -> Tensor:
            asked.append(window)
            return super().decode(*args, window=window)

    path = write_checkpoint(tmp_path, "qwen2_layer_types")
    config = load_model_config(path)
    for max_model_len in (WINDOW, WINDOW + 1):
        model = empty_model(config, max_model_len=max_model_len, attention=Recorder())
        load_weights(model, path, config)
        Paged(model).decode({0: 5})
    assert asked == [None, None, None, None, WINDOW, None]


def test_steps_without_a_window_go_where_the_backend_says(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    calls: list[str] = []

    class Planned:
        max_rows = 0

        def plan(self, block_tables: Tensor, context_lens: Tensor) -> None:
            assert block_tables.dtype == context_lens.dtype == torch.int32
            calls.append(f"plan of {len(context_lens)}")

        def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
            calls.append("planned")
            return torch.zeros_like(q)

    class Recorder(ReferenceAttention):
        def planned_decode(self, **shape: Any) -> Planned:  # type: ignore[override]
            made.append(shape)
            return Planned()

        def decode(self, *args: Any, window: int | None) -> Tensor:
            calls.append(f"window {window}")
            num_rows.add(args[0].shape[0])
            return super().decode(*args, window=window)

    num_rows: set[int] = set()
    path = write_checkpoint(tmp_path, "qwen2_layer_types")
    config = load_model_config(path)
    model = empty_model(config, max_model_len=WINDOW + 1, attention=Recorder())
    load_weights(model, path, config)
    shape = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    shape |= {"head_dim": config.head_dim, "block_size": BLOCK_SIZE}
    assert made == [{**shape, "dtype": torch.float32, "device": CPU}]

    def goes_to() -> list[str]:
        calls.clear()
        Paged(model).decode({0: 5})
        return calls

    plain = ["window None", f"window {WINDOW}", "window None"]
    assert goes_to() == plain
    (rows,) = num_rows
    Planned.max_rows = rows - 1
    assert goes_to() == plain
    Planned.max_rows = rows
    assert goes_to() == [f"plan of {rows}", "planned", f"window {WINDOW}", "planned"]


@pytest.mark.parametrize("variant", ["llama", "llama_linear", "llama_gqa_llama3", "qwen3"])
def test_rope_table_is_transformers_at_late_positions(tmp_path: Path, variant: str) -> None:
    hf = hf_config(variant, architectures=[architecture(variant)])
    hf.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    table = rope_table(config.rope, head_dim=config.head_dim, num_positions=100_000, device=CPU)
    assert table.dtype == torch.float32
    positions = torch.tensor([[0, 1, 23, 8191, 99_999]])
    rotary = LlamaRotaryEmbedding(hf)  # all families compute alike
    cos, sin = rotary(torch.zeros(1), positions)
    half = config.head_dim // 2
    torch.testing.assert_close(table[positions[0], :half], cos[0, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[positions[0], half:], sin[0, :, :half], rtol=0, atol=1e-6)


def test_kv_cache_takes_the_bytes_it_says_and_zeroes_the_null_block(tmp_path: Path) -> None:
    hf_config("qwen3", architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    kv = KVCache(config, 5, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=CPU)
    per_block = BLOCK_SIZE * config.kv_bytes_per_token(torch.bfloat16.itemsize)
    assert per_block == 2 * 3 * BLOCK_SIZE * 2 * 32 * 2  # k and v, layers, tokens, heads, D, bytes
    assert kv.num_bytes == 5 * per_block == sum(t.nbytes for t in (*kv.k, *kv.v))
    assert all(t.shape == (5, BLOCK_SIZE, 2, 32) for t in (*kv.k, *kv.v))
    assert not any(t[0].any() for t in (*kv.k, *kv.v))


def architecture(variant: str) -> str:
    return VARIANTS[variant][0].replace("Config", "ForCausalLM")
