"""Is a token drawn from the right distribution, by its row alone?

Every test of a meaning runs on the plain twin, and on the Triton kernels where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shapes import random_shapes
from torch import Tensor

from graphengine.kernels import kernels_for, reference
from graphengine.sampler import SamplingTensors, sample

# Token ids int64 [B] of logits [B, V]; options are one value for all rows or a list, one a row.
Sample = Callable[..., list[int]]

FIELDS = {
    "temperature": (torch.float32, 1.0),
    "top_k": (torch.int32, 0),
    "top_p": (torch.float32, 1.0),
    "min_p": (torch.float32, 0.0),
    "seeds": (torch.int64, 0),
    "suppress_stops": (torch.int32, 0),
}


def tensors(num_rows: int, device: torch.device, options: dict[str, Any]) -> SamplingTensors:
    fields = {}
    for name, (dtype, default) in FIELDS.items():
        value = torch.as_tensor(options.get(name, default), dtype=dtype)
        fields[name] = value.expand(num_rows).contiguous().to(device)
    stop_ids = torch.as_tensor(options.get("stop_ids", [[0]]), dtype=torch.int64)
    return SamplingTensors(**fields, stop_ids=stop_ids.expand(num_rows, -1).contiguous().to(device))


def sampler_on(device: torch.device) -> Sample:
    def run(logits: Tensor, *, positions: Any = 0, **options: Any) -> list[int]:
        num_rows = logits.shape[0]
        places = torch.as_tensor(positions, dtype=torch.int64).expand(num_rows).contiguous()
        params = tensors(num_rows, device, options)
        out = torch.full((num_rows,), -1, device=device)
        seq_indices = torch.randperm(num_rows + 3)[:num_rows].to(device)
        last_token_ids = torch.full((num_rows + 3,), -1, device=device)
        sample(
            kernels_for(device),
            logits.to(device),
            params,
            places.to(device),
            out=out,
            seq_indices=seq_indices,
            last_token_ids=last_token_ids,
        )
        assert torch.equal(last_token_ids[seq_indices], out)
        assert int((last_token_ids == -1).sum()) == 3
        return out.tolist()

    return run


@pytest.fixture(
    scope="module",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
    ids=["twin", "fused"],
)
def draw(request: pytest.FixtureRequest) -> Sample:
    return sampler_on(torch.device(request.param))


# An independent reference: numpy, float64, Philox in uint64, filters by their definitions.


def philox_numpy(counter: list[int], key: list[int]) -> list[int]:
    """Random123's Philox4x32-10, word by word in Python integers."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def gumbel_numpy(seed: int, position: int, vocab_size: int) -> np.ndarray:
    words = [
        philox_numpy(
            [token_id, position % 2**32, position // 2**32, 0], [seed % 2**32, seed // 2**32]
        )[0]
        for token_id in range(vocab_size)
    ]
    return -np.log(-np.log1p(-(np.array(words) + 0.5) / 2**32))


def kept_numpy(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[np.ndarray, float]:
    """Which tokens are kept, and how near the nearest one is to the border of top_p or min_p."""
    kept = np.full(len(logits), True)
    if 0 < top_k < len(logits):
        kept &= logits >= np.sort(logits)[-top_k]
    weights = np.exp((logits - logits.max()) / temperature)
    probs = np.where(kept, weights, 0) / weights[kept].sum()
    greater = np.array([probs[logits > logit].sum() for logit in logits])
    margin = 1.0
    if top_p < 1:
        margin = np.abs(greater - top_p).min()
        kept &= greater < top_p
    if min_p > 0:
        margin = min(margin, np.abs(weights - min_p)[weights < 1].min(initial=1.0))
        kept &= weights >= min_p
    return kept, margin


@settings(max_examples=60)
@given(
    rng_seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([2, 7, 64, 150]),
    decimals=st.sampled_from([0, 1, 6]),  # 0: many ties
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 20, 64, 10**6]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(0, 2**40),
)
def test_token_is_the_argmax_of_kept_logits_plus_noise(
    draw: Sample,
    rng_seed: int,
    vocab_size: int,
    decimals: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    num_rows = 8
    rng = np.random.default_rng(rng_seed)
    logits = (3 * rng.standard_normal(vocab_size)).round(decimals).astype(np.float32)
    # The options as the kernels see them, in float32.
    temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
    kept, margin = kept_numpy(logits.astype(np.float64), temperature, top_k, top_p, min_p)
    # Nearer to a border, float32 may fall on the other side of it; 150 terms err by 1e-5 at most.
    assume(margin > 1e-5)
    tokens = draw(
        torch.from_numpy(logits).expand(num_rows, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seed,
        positions=range(position, position + num_rows),
    )
    for row, token in enumerate(tokens):
        noise = gumbel_numpy(seed, position + row, vocab_size)
        scores = np.where(kept, logits.astype(np.float64) / temperature + noise, -np.inf)
        assert kept[token]
        # 1e-4: float32 scores up to about 300 are rounded by 2e-5.
        assert scores[token] > scores.max() - 1e-4


@pytest.mark.parametrize("varied", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 8), ({"temperature": 0.6}, 8), ({"top_k": 4}, 4), ({"top_k": 5, "top_p": 0.75}, 3)],
)
def test_frequencies_follow_the_softmax(
    draw: Sample, varied: str, options: dict[str, float], kept: int
) -> None:
    num_draws = 20_000
    logits = torch.tensor([0.3, 1.2, -0.5, 2.0, 0.0, 1.1, -1.5, 0.8])
    tokens = draw(logits.expand(num_draws, -1), **{varied: range(num_draws)}, **options)
    counts = np.bincount(tokens, minlength=8)
    probs = torch.softmax(logits.double() / options.get("temperature", 1.0), -1).numpy()
    probs[np.argsort(-probs)[kept:]] = 0
    expected = num_draws * probs / probs.sum()
    assert np.array_equal(counts > 0, expected > 0)
    with np.errstate(invalid="ignore"):
        chi_square = np.nansum((counts - expected) ** 2 / expected)
    # The 0.9999 quantile of chi-square with 7 degrees of freedom; the draws are fixed ones.
    assert chi_square < 29.9


def test_draws_of_neighbouring_seeds_and_positions_are_independent(draw: Sample) -> None:
    # Two equal logits: a coin. Pairs of draws one apart must agree half of the time.
    num_draws = 20_000
    coin = torch.zeros(num_draws, 2)
    for varied in ("seeds", "positions"):
        draws = np.array(draw(coin, **{varied: range(num_draws)}))
        agree = (draws[1:] == draws[:-1]).mean()
        assert abs(agree - 0.5) < 4 * 0.5 / num_draws**0.5  # four standard deviations


def mixed_rows() -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(3)
    logits = 3 * torch.randn(9, 5000)
    return logits, {
        "temperature": [0.0, 1.0, 1.0, 0.7, 1.5, 1.0, 0.0, 2.0, 1.0],
        "top_k": [0, 0, 50, 0, 3, 0, 5, 400, 0],
        "top_p": [1.0, 1.0, 1.0, 0.9, 0.8, 1.0, 0.5, 0.95, 0.999],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.05, 0.0],
        "seeds": [7, 7, 8, 9, 2**62 + 5, 11, 12, 13, 14],
        "stop_ids": [[i, i + 1] for i in range(9)],
        "suppress_stops": [0, 1, 0, 1, 0, 1, 0, 1, 0],
        "positions": [5, 5, 6, 2**33, 8, 9, 10, 11, 12],
    }


def test_token_depends_on_its_row_only(draw: Sample) -> None:
    logits, options = mixed_rows()
    tokens = draw(logits, **options)
    num_rows = len(tokens)

    def pick(rows: list[int]) -> list[int]:
        return draw(logits[rows], **{name: [v[i] for i in rows] for name, v in options.items()})

    for row in range(num_rows):
        assert pick([row]) == [tokens[row]]
        assert pick([row] * 3) == [tokens[row]] * 3
    order = [4, 8, 0, 2, 6, 1, 3, 5, 7]
    assert pick(order) == [tokens[row] for row in order]
    # So many that the sampler on a GPU cuts them otherwise.
    assert pick(list(range(num_rows)) * 80) == tokens * 80


def test_greedy_takes_the_lowest_id_of_a_tie(draw: Sample) -> None:
    logits = torch.zeros(3, 10_000)
    logits[0, [4_321, 77, 9_999]] = 2.0
    logits[1, [9_999, 6_000]] = 1.0
    # The options of sampling are there and must not matter, nor how the logits' sign is written.
    logits[2, 0] = -0.0
    tokens = draw(logits, temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    assert tokens == [77, 6_000, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}])
def test_suppressed_stops_are_never_drawn(
    draw: Sample, temperature: float, filters: dict[str, int]
) -> None:
    logits = torch.tensor([0.0, 1.0, 30.0, 0.5, 40.0]).expand(64, -1)
    options = {"temperature": temperature, "positions": range(64), **filters}
    stop_ids = [[2, 4, 4]]
    assert set(draw(logits, stop_ids=stop_ids, suppress_stops=0, **options)) == {4}
    tokens = set(draw(logits, stop_ids=stop_ids, suppress_stops=1, **options))
    assert tokens <= {0, 1, 3}
    assert tokens <= {1, 3} or not filters
    # Only the rows that ask for it; ids that no row uses may be anything.
    flags = [1, 0] * 32
    rows = [[4, 2, 2], [-1, 5, 10**9]] * 32
    tokens_by_row = draw(logits, stop_ids=rows, suppress_stops=flags, **options)
    assert all((token in (2, 4)) != flag for token, flag in zip(tokens_by_row, flags, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-4},
        {"temperature": 1e-30},
        {"temperature": 5.0, "top_k": 1},
        {"temperature": 5.0, "top_p": 1e-9},
        {"temperature": 5.0, "min_p": 1.0},
        {"temperature": 5.0, "top_k": 100, "top_p": 1e-9, "min_p": 1.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_the_argmax(
    draw: Sample, options: dict[str, float], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 3000).round(decimals=1).to(dtype)
    largest = torch.randint(3000, (16,))
    logits[torch.arange(16), largest] = 5.0
    assert draw(logits, positions=range(16), **options) == largest.tolist()
    # All negative and larger, where bfloat16 is coarse but leaves the largest alone.
    assert draw(logits - 64, positions=range(16), **options) == largest.tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_infinite_and_nan_logits(draw: Sample, options: dict[str, float]) -> None:
    inf, nan = float("inf"), float("nan")
    for temperature in (0.0, 1.0):

        def tokens_of(values: list[float], temperature: float = temperature) -> set[int]:
            rows = torch.tensor(values).expand(200, -1)
            return set(draw(rows, temperature=temperature, positions=range(200), **options))

        assert tokens_of([-inf, 0.0, -inf, 0.1, -inf]) <= {1, 3}
        assert tokens_of([nan, 0.0, nan, 0.1, nan]) <= {1, 3}
        assert tokens_of([0.0, inf, -inf, 1.0]) == {1}
        for hopeless in (-inf, nan):
            assert tokens_of([hopeless] * 5) <= set(range(5))


def test_all_tokens_kept_when_filters_are_off(draw: Sample) -> None:
    torch.manual_seed(1)
    logits = torch.randn(500, 300)
    plain = draw(logits, positions=range(500))
    for options in ({"top_k": 300}, {"top_k": 301}, {"top_k": -1}, {"top_k": 2**31 - 1}):
        assert draw(logits, positions=range(500), **options) == plain
    # Filters that keep everything, but make the fused kernel search and sum.
    assert draw(logits, positions=range(500), min_p=1e-30) == plain


def test_noise_is_finite_at_both_ends_of_its_words() -> None:
    words = torch.tensor([0, 1, 2**20, 2**31, 2**32 - 2, 2**32 - 1])
    exact = -np.log(-np.log1p(-(words.double().numpy() + 0.5) / 2**32))
    noise = reference.gumbel_from_words(words).double().numpy()
    # Largest words: float32 ends at 1 - 2^-24, where the noise is -2.81 and not -3.1.
    np.testing.assert_allclose(noise[:4], exact[:4], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(noise[4:], -np.log(24 * np.log(2)), rtol=1e-6)


def test_philox_gives_the_published_words() -> None:
    # Known answers of Random123 1.14, kat_vectors, philox4x32 with 10 rounds.
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        words = reference.philox(
            tuple(torch.tensor([word]) for word in counter),
            tuple(torch.tensor([word]) for word in key),
        )
        assert [int(word) for word in words] == expected
        assert philox_numpy(counter, key) == expected


@pytest.fixture
def fused() -> ModuleType:
    """The Triton kernels, imported when a test runs: a CPU machine has no Triton."""
    from graphengine.kernels import fused

    return fused


def random_options(num_rows: int, vocab_size: int, *, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "temperature": rng.choice([0, 0.5, 1, 1.3], num_rows),
        "top_k": rng.choice([0, 0, 1, 20, 50, 1000, vocab_size], num_rows),
        "top_p": rng.choice([1, 1, 0.95, 0.5, 0.999], num_rows),
        "min_p": rng.choice([0, 0, 0, 0.05], num_rows),
        "seeds": rng.integers(0, 2**63 - 1, num_rows),
        "positions": rng.integers(0, 2**20, num_rows),
        "stop_ids": rng.integers(0, vocab_size, (num_rows, 4)),
        "suppress_stops": rng.integers(0, 2, num_rows),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"),
    [
        *((1, 5), (64, 777), (33, 32_000), (256, 128_256), (8, 151_936), (40, 151_936)),
        *random_shapes(8, range(1, 100), range(2, 60_000)),
    ],
)
def test_fused_draws_what_its_twin_draws(
    num_rows: int, vocab_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_rows)
    logits = (4 * torch.randn(num_rows, vocab_size)).to(dtype)
    options = random_options(num_rows, vocab_size, seed=num_rows)
    tokens = sampler_on(torch.device("cuda"))(logits, **options)
    expected = sampler_on(torch.device("cpu"))(logits, **options)
    differing = sum(a != b for a, b in zip(tokens, expected, strict=True))
    # Last-bit differences of log, exp and of sums in another order move a token only at a border:
    # none is expected of so few rows, and one of them would be no error.
    assert differing <= (1 if num_rows > 1 else 0)


@pytest.mark.gpu
def test_captured_sample_follows_its_inputs(fused: ModuleType) -> None:
    cuda = torch.device("cuda")
    num_rows, vocab_size = 48, 32_000
    batches = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        logits = (4 * torch.randn(num_rows, vocab_size)).bfloat16().to(cuda)
        options = random_options(num_rows, vocab_size, seed=seed)
        positions = torch.from_numpy(options["positions"]).to(cuda)
        batches.append((logits, tensors(num_rows, cuda, options), positions))
    static = (
        torch.zeros_like(batches[0][0]),
        tensors(num_rows, cuda, {"stop_ids": [[0] * 4]}),
        torch.zeros_like(batches[0][2]),
    )
    # The host reads what the device writes to its memory.
    out = torch.zeros(num_rows, dtype=torch.int64, pin_memory=True)
    expected = torch.zeros(num_rows, dtype=torch.int64, device=cuda)
    last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=cuda)
    fed_back = {
        "seq_indices": torch.arange(num_rows, device=cuda).flip(0),
        "last_token_ids": last_token_ids,
    }
    sample(fused, *static, out=out, **fed_back)  # compiles, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(fused, *static, out=out, **fed_back)
    for batch in (*batches, batches[0]):
        static[0].copy_(batch[0])
        for name, value in vars(batch[1]).items():
            getattr(static[1], name).copy_(value)
        static[2].copy_(batch[2])
        graph.replay()
        torch.cuda.synchronize()
        seen, fed = out.clone(), last_token_ids.flip(0).cpu()
        sample(fused, *batch, out=expected, **fed_back)
        assert torch.equal(seen, expected.cpu())
        assert torch.equal(fed, seen)
