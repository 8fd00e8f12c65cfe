"""Does the chain of kernels between two attentions compute what the single kernels compute?

Tolerances: against a float32 reference of the same bfloat16 weights the chain may be as far off as
rounding of its intermediate values to bfloat16 takes it: 1e-2 of a tensor's norm (2e-2 is the bound
of the whole model's logits). Between two numbers of rows nothing may differ.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata
from graphengine.kernels import reference
from graphengine.layers import rope_table
from graphengine.model_config import ModelConfig
from graphengine.rope_config import RopeConfig

if sys.platform != "linux":
    pytest.skip("cuda-bindings is for Linux here, as in torch", allow_module_level=True)

from cpu_launcher import CpuLauncher, layout_claims, static_asserts

from graphengine.kernels import decode_chain, nvrtc  # after the skip: imports cuda-bindings
from graphengine.kernels.decode_chain import DecodeChain, Launcher

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Multiprocessors of an H100 SXM or an H200.
NUM_BLOCKS_OF_GRID = 132
BLOCK_SIZE = 256
NUM_BLOCKS = 3
LENGTH = 512
EPS = 1e-5
ROWS = (1, 5, 8, 9, 16, 17, 31, 32)


def config(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": 999,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 3,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": EPS,
        "rope": RopeConfig("default", 10000.0),
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": LENGTH,
        "dtype": "bfloat16",
        "eos_token_ids": (0,),
        "bos_token_id": None,
    }
    fields |= changes
    windows = (None,) * int(str(fields["num_layers"]))
    return ModelConfig(**fields, sliding_windows=windows)  # type: ignore[arg-type]


CONFIGS = {
    "qwen3-0.6b": config(),
    "llama-8b": config(
        hidden_size=4096, intermediate_size=14336, num_heads=32, num_layers=2, qk_norm=False
    ),
    "qwen3-1.7b": config(hidden_size=2048, intermediate_size=6144, num_layers=1),
    "qwen2-bias-d64": config(
        hidden_size=2048,
        intermediate_size=5632,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        num_layers=1,
        qk_norm=False,
        qkv_bias=True,
    ),
}


# Two tiles of gate and up by whole features in each block. Too large to run in a test.
LARGE = config(hidden_size=5120, intermediate_size=27648, num_heads=40, num_layers=1, qk_norm=False)


@dataclass
class Layer:
    input_norm: Tensor
    qkv_proj: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Tensor
    post_norm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    window: int | None = None


@dataclass
class Case:
    """Random weights and inputs of a model; attention is replaced by a fixed function of q."""

    config: ModelConfig
    num_rows: int
    device: torch.device = CUDA
    seed: int = 0
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        c = self.config
        device = self.device
        generator = torch.Generator(device=device).manual_seed(self.seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device) * scale
            return values.to(torch.bfloat16)

        def weight(features: int, depth: int) -> Tensor:
            return randn(features, depth, scale=depth**-0.5)

        e, i, d = c.hidden_size, c.intermediate_size, c.head_dim
        features = (c.num_heads + 2 * c.num_kv_heads) * d
        for _ in range(c.num_layers):
            self.layers.append(
                Layer(
                    input_norm=1 + randn(e, scale=0.1),
                    qkv_proj=weight(features, e),
                    qkv_bias=randn(features) if c.qkv_bias else None,
                    q_norm=1 + randn(d, scale=0.1) if c.qk_norm else None,
                    k_norm=1 + randn(d, scale=0.1) if c.qk_norm else None,
                    o_proj=weight(e, c.num_heads * d),
                    post_norm=1 + randn(e, scale=0.1),
                    gate_up_proj=weight(2 * i, e),
                    down_proj=weight(e, i),
                )
            )
        self.norm = 1 + randn(e, scale=0.1)
        self.embedding = randn(c.vocab_size, e)
        shape = (c.num_layers, 2, NUM_BLOCKS, BLOCK_SIZE, c.num_kv_heads, d)
        self.kv = randn(*shape)
        host = torch.Generator().manual_seed(self.seed)
        count = decode_chain.MAX_ROWS  # of any case, so that a row is the same in each
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=host)[:count]
        n = self.num_rows
        self.slots = slots[:n].to(device)
        # Only read ahead: any blocks that there are.
        tables = torch.randint(NUM_BLOCKS, (count, LENGTH // BLOCK_SIZE), generator=host)
        lens = torch.randint(1, LENGTH, (count,), generator=host)
        self.step = DecodeMetadata(
            slot_mapping=self.slots,
            block_tables=tables[:n].to(device, torch.int32),
            context_lens=lens[:n].to(device, torch.int32),
        )
        self.positions = torch.randint(LENGTH, (count,), generator=host)[:n].to(device)
        self.token_ids = torch.randint(c.vocab_size, (count,), generator=host)[:n].to(device)
        self.cos_sin = rope_table(c.rope, head_dim=d, num_positions=LENGTH, device=device)

    def chain(self) -> tuple[list[Tensor], Tensor]:
        """Of each layer q, [N, H, D], and the last hidden states, by the chain."""
        assert DecodeChain.takes(self.config, dtype=torch.bfloat16, device=CUDA)
        return self.run(self.make())

    def make(self, launcher: Launcher | None = None, block_size: int = BLOCK_SIZE) -> DecodeChain:
        return DecodeChain(
            self.config,
            cos_sin=self.cos_sin,
            block_size=block_size,
            device=self.device,
            launcher=launcher,
        )

    def run(self, chain: DecodeChain) -> tuple[list[Tensor], Tensor]:
        layers, kv = self.layers, self.kv
        q = chain.begin(
            self.token_ids, self.positions, self.embedding, layers[0], *kv[0], self.step
        )
        qs = [q.clone()]
        for index in range(len(layers) - 1):
            q = chain.between(
                index,
                attended(q),
                self.positions,
                layers[index],
                layers[index + 1],
                *kv[index + 1],
                self.step,
            )
            qs.append(q.clone())
        return qs, chain.end(attended(q), layers[-1], self.norm)

    def reference(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The same in float32 by the plain twins, and the cache."""
        c = self.config
        kv = self.kv.float()
        residual = self.embedding[self.token_ids].float()
        qs: list[Tensor] = []
        added: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if added is None:
                normed = reference.rms_norm(residual, layer.input_norm.float(), EPS)
            else:
                normed = reference.add_rms_norm(added, residual, layer.input_norm.float(), EPS)
            bias = None if layer.qkv_bias is None else layer.qkv_bias.float()
            q, _, _ = reference.rope_and_cache(
                reference.linear(normed, layer.qkv_proj.float(), bias),
                self.positions,
                self.cos_sin,
                *kv[index],
                self.slots,
                num_heads=c.num_heads,
                num_kv_heads=c.num_kv_heads,
                q_weight=None if layer.q_norm is None else layer.q_norm.float(),
                k_weight=None if layer.k_norm is None else layer.k_norm.float(),
                eps=EPS,
            )
            qs.append(q.clone())
            hidden = reference.linear(attended(q).flatten(1), layer.o_proj.float(), None)
            normed = reference.add_rms_norm(hidden, residual, layer.post_norm.float(), EPS)
            activated = reference.linear_silu_mul(normed, layer.gate_up_proj.float(), None)
            added = reference.linear(activated, layer.down_proj.float(), None)
        assert added is not None
        return qs, reference.add_rms_norm(added, residual, self.norm.float(), EPS), kv


def attended(q: Tensor) -> Tensor:
    return (q.roll(1, dims=1) * 0.75).contiguous()


def error(ours: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return float((ours.float() - exact).norm() / exact.norm())


def takes(model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> bool:
    return DecodeChain.takes(model, dtype=dtype, device=CUDA, num_blocks=NUM_BLOCKS_OF_GRID)


@pytest.mark.parametrize("name", CONFIGS)
def test_chain_takes_models_in_bfloat16_only_and_on_hopper_only(name: str) -> None:
    assert takes(CONFIGS[name])
    assert not takes(CONFIGS[name], torch.float16)
    assert not takes(CONFIGS[name], torch.float32)
    cpu = torch.device("cpu")
    assert not DecodeChain.takes(CONFIGS[name], dtype=torch.bfloat16, device=cpu)


@pytest.mark.parametrize(
    "changes",
    [
        {"o_bias": True},
        {"mlp_bias": True},
        {"head_dim": 80},
        {"head_dim": 256},
        {"hidden_size": 1024 + 64},  # 8.5 tiles
        {"intermediate_size": 3072 + 32},  # gate and up: 48.5 tiles
        {"num_heads": 15, "head_dim": 64, "num_kv_heads": 5},  # q, k and v: 12.5 tiles
        {"hidden_size": 512},  # o_proj: 4 tiles of 32 units, for 132 blocks
    ],
)
def test_chain_refuses_what_its_kernel_cannot_cut(changes: dict[str, object]) -> None:
    assert not takes(config(**changes))


def test_chain_takes_a_model_whose_units_are_just_enough() -> None:
    few = config(hidden_size=512)
    for num_blocks, is_taken in ((128, True), (129, False)):
        given = {"dtype": torch.bfloat16, "device": CUDA, "num_blocks": num_blocks}
        assert DecodeChain.takes(few, **given) == is_taken  # type: ignore[arg-type]


# What ptxas says of products that it lets wait for each other: C7510 to C7515 and C7517 to C7519.
SERIALIZED = r"\(C75\d\d\)|wgmma.mma_async instructions are serialized"


def included() -> dict[str, str]:
    return {decode_chain.HEADER.name: decode_chain.HEADER.read_text("utf-8")}


def compile_chain(model: ModelConfig, num_rows: int, added: str = "") -> str:
    """The compiler's log of decode_chain.cu with `added` at its end."""
    source = decode_chain.SOURCE.read_text("utf-8") + added
    defines = decode_chain.defines_for(model, num_rows=num_rows, num_blocks=NUM_BLOCKS_OF_GRID)
    options = nvrtc.options_for(decode_chain.ARCHITECTURE, defines)
    options += ["--ptxas-options=-v"]
    _, log = nvrtc.compile_source(source, "decode_chain.cu", options, included())
    return log


# Half a second or more each: every number of rows, and the most registers of every model.
@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("qwen3-0.6b", 8),
        ("qwen3-0.6b", 32),
        ("llama-8b", 16),
        ("llama-8b", 32),
        ("qwen2-bias-d64", 16),
        ("qwen2-bias-d64", 32),
        ("qwen3-1.7b", 32),
        ("qwen2.5-32b", 32),
    ],
)
def test_kernel_compiles_without_spills_and_with_products_in_flight(
    name: str, num_rows: int
) -> None:
    log = compile_chain(CONFIGS.get(name, LARGE), num_rows)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spills == ["0", "0"], log
    assert not re.search(SERIALIZED, log), log


def test_ptxas_tells_of_products_in_turn() -> None:
    """The log that the test above reads does hold the warning where it is due."""
    added = """
        extern "C" __global__ void in_turn(float* out, u64 w, u64 x) {
            float sums[NR / 2] = {};
            for (int i = 0; i < 9; i++) {
                multiply_begin();
                multiply(sums, w + i, x);
                multiply_commit();
                sums[0] *= 2;  // while it is being added to
                multiply_wait(sums);
            }
            out[0] = sums[0];
        }"""
    log = compile_chain(CONFIGS["qwen3-0.6b"], 8, added)
    assert re.search(SERIALIZED, log), log


def cut_claims(most: int, has_whole: bool) -> Iterator[str]:
    """most: the partial sums of the product that has the most. has_whole: gate and up have none."""
    phases = ("O_PROJ", "DOWN", "QKV") if has_whole else ("O_PROJ", "GATE_UP", "DOWN", "QKV")
    places = [f"Cut<{phase}>::TILES * Cut<{phase}>::MAX_PARTS * SLOT" for phase in phases]
    yield from (f"{place} <= {most}" for place in places)
    yield " || ".join(f"{place} == {most}" for place in places)
    yield from (f"owners_are_right<{phase}>()" for phase in phases)


OWNERS_ARE_RIGHT = """
template <int PHASE>
constexpr __device__ bool owners_are_right() {
    using cut = Cut<PHASE>;
    if (cut::begin(0) != 0 || cut::begin(GRID) != cut::UNITS) return false;
    for (int block = 0; block < GRID; block++)
        for (int unit = cut::begin(block); unit < cut::begin(block + 1); unit++)
            if (cut::owner(unit) != block) return false;
    return true;
}
constexpr __device__ bool all_features_are_loaded() {
    for (int block = 0; block < GRID; block++) {
        const int count = GateUp::begin(block + 1) - GateUp::begin(block);
        if (count <= 0 || count > GateUp::MOST) return false;
        if (count > GateUp::TILES * GateUp::ROWS) return false;
    }
    return !GateUp::IS_WHOLE || GateUp::ROWS <= 128 && GateUp::BYTES % 1024 == 0;
}"""


@pytest.mark.parametrize("num_blocks", [78, 114, NUM_BLOCKS_OF_GRID])  # H20, H100 PCIe, H100 SXM
@pytest.mark.parametrize("name", CONFIGS)
def test_host_and_kernel_agree_on_the_params_and_the_cut(name: str, num_blocks: int) -> None:
    model = CONFIGS[name]
    head, found, _ = decode_chain.SOURCE.read_text("utf-8").partition("// --- shared memory")
    assert found
    rows = decode_chain.whole_rows(model, num_blocks)
    most = decode_chain.num_partials(model, num_blocks)
    claims = [*cut_claims(most, rows is not None)]
    claims += [f"(GateUp::IS_WHOLE ? GateUp::ROWS : 0) == {rows or 0}"]
    claims += [f"PIECE == {decode_chain.PIECE}", "GateUp::begin(GRID) == INTER"]
    claims += ["all_features_are_loaded()"]
    asserts = layout_claims(decode_chain.Params, alignment=64) + static_asserts(claims)
    defines = decode_chain.defines_for(model, num_rows=decode_chain.MAX_ROWS, num_blocks=num_blocks)
    options = nvrtc.options_for(decode_chain.ARCHITECTURE, defines)
    nvrtc.compile_source(head + OWNERS_ARE_RIGHT + asserts, "claims.cu", options, included())


def check_against_float32(case: Case, chain: DecodeChain) -> None:
    exact_qs, exact_hidden, exact_kv = case.reference()
    before = case.kv.clone()
    qs, hidden = case.run(chain)
    for q, exact in zip(qs, exact_qs, strict=True):
        assert error(q, exact) < 1e-2
    assert error(hidden, exact_hidden) < 1e-2
    shape = (case.config.num_layers, 2, NUM_BLOCKS * BLOCK_SIZE, -1)
    written, old = case.kv.view(shape), before.view(shape)
    assert error(written[:, :, case.slots], exact_kv.view(shape)[:, :, case.slots]) < 1e-2
    others = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool, device=case.device)
    others[case.slots] = False
    assert torch.equal(written[:, :, others], old[:, :, others])


# Three blocks share each product; tiles of one part and of two. Of gate and up they have parts or,
# in "bias-d64" and "two-tiles", up to 108 and 214 whole features each; the latter goes through the
# ring of inputs more than once.
TINY = {
    "norms": config(
        vocab_size=50,
        hidden_size=256,
        intermediate_size=448,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
    ),
    "bias-d64": config(
        vocab_size=50,
        hidden_size=384,
        intermediate_size=320,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        qk_norm=False,
        qkv_bias=True,
    ),
    "two-tiles": config(
        vocab_size=50,
        hidden_size=640,
        intermediate_size=640,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
    ),
}


@pytest.fixture(scope="module", params=TINY)
def on_cpu(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelConfig, CpuLauncher]:
    model = TINY[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return model, CpuLauncher(model, num_blocks=3, folder=folder)


@pytest.mark.parametrize("num_rows", [1, 8, 13, 32])
def test_kernel_on_a_cpu_agrees_with_float32(
    on_cpu: tuple[ModelConfig, CpuLauncher], num_rows: int
) -> None:
    model, launcher = on_cpu
    case = Case(model, num_rows, CPU)
    check_against_float32(case, case.make(launcher))


def test_kernel_on_a_cpu_gives_a_row_alike_in_any_order_of_threads_and_number_of_rows(
    on_cpu: tuple[ModelConfig, CpuLauncher],
) -> None:
    """One chain throughout: whatever a step leaves behind, the next must not see."""
    model, launcher = on_cpu
    cases = [Case(model, num_rows, CPU) for num_rows in (13, 2, 32, 8, 13, 1)]
    chain = cases[0].make(launcher)
    _, first = cases[0].run(chain)
    for case in cases[1:]:
        _, hidden = case.run(chain)
        num_rows = min(case.num_rows, cases[0].num_rows)
        assert torch.equal(hidden[:num_rows], first[:num_rows])


def test_sums_of_many_parts_agree_with_float32(tmp_path: Path) -> None:
    """Twelve blocks have parts of the one tile of o_proj and down: lanes then take two features."""
    model = config(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=768,
        num_layers=1,
        num_heads=8,
        num_kv_heads=1,
    )
    case = Case(model, 7, CPU)
    launcher = CpuLauncher(model, num_blocks=12, folder=tmp_path)
    check_against_float32(case, case.make(launcher))


def test_old_tokens_of_the_next_attention_are_asked_for_ahead(
    on_cpu: tuple[ModelConfig, CpuLauncher],
) -> None:
    model, launcher = on_cpu
    case = Case(model, 3, CPU)
    case.step.slot_mapping[:] = torch.arange(3)  # within a block of any size
    case.step.context_lens[:] = torch.tensor([64, 65, 200])
    case.step.block_tables[:] = torch.tensor([[1, 1], [2, 2], [0, 0]])
    token_bytes = model.num_kv_heads * model.head_dim * 2
    old: dict[int, tuple[int, int, int]] = {}
    for part, cache in enumerate(case.kv[0]):
        for row, blocks in enumerate(case.step.block_tables.tolist()):
            for token in range(int(case.step.context_lens[row]) - 1):
                slot = blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE
                old[cache.data_ptr() + slot * token_bytes] = (part, row, token)
    layer = case.layers[0]

    def asked_for(block_size: int = BLOCK_SIZE) -> list[tuple[int, int]]:
        case.make(launcher, block_size).begin(
            case.token_ids, case.positions, case.embedding, layer, *case.kv[0], case.step
        )
        return launcher.prefetched

    # 16 KiB, and every second piece; all of them only if the block has the time.
    piece = 64
    launcher.seed = 0
    found = set()
    for _ in range(20):
        for place, num_bytes in asked_for():
            assert num_bytes == piece * token_bytes == 16 << 10
            assert all(place + i * token_bytes in old for i in range(piece))
            found.add(old[place])
    assert found == {(part, *at) for part in (0, 1) for at in ((1, 0), (2, 0), (2, 2 * piece))}
    assert asked_for(block_size=piece // 2) == []  # a piece would end in another block
    layer.window = 100
    assert asked_for() == []


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_chain_agrees_with_float32(name: str, num_rows: int) -> None:
    case = Case(CONFIGS[name], num_rows)
    check_against_float32(case, case.make())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_does_not_depend_on_how_many_there_are(name: str) -> None:
    qs, hidden = Case(CONFIGS[name], ROWS[-1]).chain()
    for num_rows in ROWS[:-1]:
        fewer_qs, fewer_hidden = Case(CONFIGS[name], num_rows).chain()
        assert torch.equal(fewer_hidden, hidden[:num_rows])
        for fewer, q in zip(fewer_qs, qs, strict=True):
            assert torch.equal(fewer, q[:num_rows])


@pytest.mark.gpu
def test_captured_chain_gives_the_same_each_time() -> None:
    case = Case(CONFIGS["qwen3-0.6b"], 31)
    chain = case.make()
    _, first = case.run(chain)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, hidden = case.run(chain)
    for _ in range(200):
        hidden.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(hidden, first)


@pytest.mark.gpu
def test_one_chain_serves_any_numbers_of_rows_in_any_order() -> None:
    """The places of partial sums lie elsewhere for each number of rows: none may be left over."""
    cases = {n: Case(CONFIGS["qwen3-0.6b"], n) for n in (32, 1, 17, 12, 8, 32, 5, 16, 2)}
    case = cases[32]
    chain = case.make()
    _, all_hidden = case.run(chain)
    for _ in range(3):
        for num_rows, fewer in cases.items():
            _, hidden = fewer.run(chain)
            assert torch.equal(hidden, all_hidden[:num_rows])
