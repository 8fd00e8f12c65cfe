# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""How is a token sampled on a GPU? Two Triton launches, no sort; `reference.sample` says what.

The first launch splits each row over many programs: the largest logit of each split, or, for a row
without filters, the largest logit / temperature + noise. The second has one program a row: it
combines the splits, and is done unless the row uses top-k, top-p or min-p.

Such a row needs the smallest kept logit, a threshold. Both filters have the form "the largest t
whose weight above it, of the logits >= t, reaches a target" (weight: 1 each, or the softmax mass).
Weights only grow as t falls, so t is found by search over the float's bits, read as integers in
float order: 16 bits for a 16-bit dtype. The row is in the L2 cache by then.

Sums are float32 in a fixed order, with no atomics: a row's token depends on the row alone. The sums
of `reference` are in another order, so at the very border of top_p the two may differ by one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphengine.kernels import reference
from graphengine.kernels.ahead import launch
from graphengine.kernels.launch import early_launch, enter_early

_MIN_TEMPERATURE = tl.constexpr(reference.MIN_TEMPERATURE)
_SPLIT = 2048
# Tokens whose noise a program of a split makes at a time, and its warps. Many programs: few
# registers each, so that more of them are under way. Few, which all are: none waits for itself.
_FEW_PROGRAMS = 640
_FEW_CUT, _MANY_CUT = (_SPLIT, 4), (256, 2)
# A scan of a row by one program mostly waits for its loads, so several blocks are in flight.
_SCAN_BLOCK = 4096
_STAGES = tl.constexpr(4)
# Low bits of a float32 that are always 0 in a value that came from the dtype.
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stop_ids: Tensor,
    suppress_stops: Tensor,
    out: Tensor,
    seq_indices: Tensor,
    last_token_ids: Tensor,
) -> None:
    """`reference.sample`. Two launches; the last dimension of the logits and all else is dense."""
    num_rows, vocab_size = logits.shape
    num_splits = triton.cdiv(vocab_size, _SPLIT)
    device = logits.device
    partial_scores = torch.empty((num_rows, num_splits), dtype=torch.float32, device=device)
    partial_ids = torch.empty((num_rows, num_splits), dtype=torch.int32, device=device)
    assert out.shape == (num_rows,)
    assert out.dtype == torch.int64
    assert out.is_contiguous()
    rows = (
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        stop_ids,
        suppress_stops,
        partial_scores,
        partial_ids,
    )
    sizes = (logits.stride(0), stop_ids.stride(0), vocab_size)
    chunk, num_warps = _FEW_CUT if num_rows * num_splits <= _FEW_PROGRAMS else _MANY_CUT
    launch(
        _split_kernel,
        (num_rows, num_splits),
        *rows,
        *sizes,
        NUM_STOPS=stop_ids.shape[1],
        BLOCK=_SPLIT,
        CHUNK=chunk,
        num_warps=num_warps,
        **early_launch(logits, num_rows),
    )
    launch(
        _combine_kernel,
        (num_rows,),
        *rows,
        out,
        seq_indices,
        last_token_ids,
        *sizes,
        num_splits,
        NUM_STOPS=stop_ids.shape[1],
        ZERO_BITS=_ZERO_BITS[logits.dtype],
        SPLITS_PADDED=triton.next_power_of_2(num_splits),
        BLOCK=_SCAN_BLOCK,
        num_warps=16,
        **early_launch(logits, num_rows, follows_ours=True),
    )


@triton.jit
def _split_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    stop_ids_ptr: tl.tensor,
    suppress_ptr: tl.tensor,
    partial_scores_ptr: tl.tensor,
    partial_ids_ptr: tl.tensor,
    logits_stride: tl.tensor,
    stops_stride: tl.tensor,
    vocab_size: tl.tensor,
    NUM_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    suppress = tl.load(suppress_ptr + row)
    enter_early(EARLY)
    row_ptr = logits_ptr + row * logits_stride
    stops_ptr = stop_ids_ptr + row * stops_stride
    partial = row * tl.num_programs(1) + split
    first = split * BLOCK
    if (temperature < _MIN_TEMPERATURE) | _is_filtered(top_k, top_p, min_p, vocab_size):
        lanes = tl.arange(0, BLOCK)
        scores = _load_logits(row_ptr, first + lanes, vocab_size, stops_ptr, suppress, NUM_STOPS)
        score = tl.max(scores, axis=0)
        # The lowest of equal ones; half of what it takes to carry the index along.
        lane = tl.min(tl.where(scores == score, lanes, BLOCK), axis=0)
        tl.store(partial_scores_ptr + partial, score)
        tl.store(partial_ids_ptr + partial, first + lane)
    else:
        # In pieces, for the registers: the fewer, the more programs have loads under way.
        seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
        best = tl.full([CHUNK], -float("inf"), dtype=tl.float32)
        best_ids = first + tl.arange(0, CHUNK)
        for start in range(0, BLOCK, CHUNK):
            ids = first + start + tl.arange(0, CHUNK)
            logits = _load_logits(row_ptr, ids, vocab_size, stops_ptr, suppress, NUM_STOPS)
            noisy = tl.div_rn(logits, temperature) + _gumbel_noise(seed, position, ids)
            best_ids = tl.where(noisy > best, ids, best_ids)
            best = tl.maximum(best, noisy)
        score = tl.max(best, axis=0)
        tl.store(partial_scores_ptr + partial, score)
        best_id = tl.min(tl.where(best == score, best_ids, first + BLOCK), axis=0)
        tl.store(partial_ids_ptr + partial, best_id)


@triton.jit
def _combine_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    stop_ids_ptr: tl.tensor,
    suppress_ptr: tl.tensor,
    partial_scores_ptr: tl.tensor,
    partial_ids_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    seq_indices_ptr: tl.tensor,
    last_token_ids_ptr: tl.tensor,
    logits_stride: tl.tensor,
    stops_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_splits: tl.tensor,
    NUM_STOPS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    seq_index = tl.load(seq_indices_ptr + row)
    enter_early(EARLY)
    scores_ptr = partial_scores_ptr + row * num_splits
    splits = tl.arange(0, SPLITS_PADDED)
    scores = tl.load(scores_ptr + splits, mask=splits < num_splits, other=-float("inf"))
    largest, split = tl.max(scores, axis=0, return_indices=True)
    token_id = tl.load(partial_ids_ptr + row * num_splits + split)

    if (temperature >= _MIN_TEMPERATURE) & _is_filtered(top_k, top_p, min_p, vocab_size):
        row_ptr = logits_ptr + row * logits_stride
        stops_ptr = stop_ids_ptr + row * stops_stride
        suppress = tl.load(suppress_ptr + row)
        low = _key(tl.full((), -float("inf"), tl.float32), ZERO_BITS)
        high = _key(largest, ZERO_BITS)
        if (top_k > 0) & (top_k < vocab_size):
            if top_k <= num_splits:
                # The k-th largest of the splits' largest logits is a lower bound, cheaply had.
                low = _threshold(
                    scores_ptr, num_splits, stops_ptr, 0, low, high, top_k,
                    largest, temperature, False, NUM_STOPS, ZERO_BITS, SPLITS_PADDED,
                )  # fmt: skip
            low = _threshold(
                row_ptr, vocab_size, stops_ptr, suppress, low, high, top_k,
                largest, temperature, False, NUM_STOPS, ZERO_BITS, BLOCK,
            )  # fmt: skip
        if top_p < 1.0:
            total = _mass(
                row_ptr, vocab_size, stops_ptr, suppress, _value(low, ZERO_BITS),
                largest, temperature, NUM_STOPS, BLOCK,
            )  # fmt: skip
            # All logits below this bound weigh less than 1 - top_p together (of a total of at
            # least 1, what the largest weighs), so the threshold is above it. 2 is slack.
            dropped = tl.log(tl.maximum(1.0 - top_p, 1e-7) / vocab_size) - 2.0
            low = tl.maximum(low, _key(largest + temperature * dropped, ZERO_BITS))
            low = _threshold(
                row_ptr, vocab_size, stops_ptr, suppress, low, high, top_p * total,
                largest, temperature, True, NUM_STOPS, ZERO_BITS, BLOCK,
            )  # fmt: skip
        token_id = _sample_above(
            row_ptr, vocab_size, stops_ptr, suppress, _value(low, ZERO_BITS), tl.log(min_p),
            largest, temperature, tl.load(seeds_ptr + row), tl.load(positions_ptr + row),
            NUM_STOPS, BLOCK,
        )  # fmt: skip
    tl.store(token_ids_ptr + row, token_id.to(tl.int64))
    tl.store(last_token_ids_ptr + seq_index, token_id.to(tl.int64))


@triton.jit
def _is_filtered(
    top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor, vocab_size: tl.tensor
) -> tl.tensor:
    return ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _load_logits(
    row_ptr: tl.tensor,
    ids: tl.tensor,
    vocab_size: tl.tensor,
    stops_ptr: tl.tensor,
    suppress: tl.tensor,
    NUM_STOPS: tl.constexpr,
) -> tl.tensor:
    """float32 logits; -inf where NaN, suppressed, or past the vocabulary."""
    logits = tl.load(row_ptr + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, -float("inf"))
    if suppress != 0:
        for i in range(NUM_STOPS):
            logits = tl.where(ids == tl.load(stops_ptr + i), -float("inf"), logits)
    return logits


@triton.jit
def _gumbel_noise(seed: tl.tensor, position: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """`reference.gumbel_noise`; triton's philox takes the same words in the same places."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, ids, low, high, 0)
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    small = uniform + uniform * uniform * 0.5
    exponential = tl.where(uniform < 2.0**-12, small, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _key(value: tl.tensor, ZERO_BITS: tl.constexpr) -> tl.tensor:
    """A float32 as an int64 of the same order, without the bits that its dtype leaves 0."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> ZERO_BITS).to(tl.int64)


@triton.jit
def _value(key: tl.tensor, ZERO_BITS: tl.constexpr) -> tl.tensor:
    """The least float32 of that key. Keys are int64: the distance of two may pass 2^31."""
    # The maximum is -inf's own: the bits below it, left out of its key, would make a NaN.
    bits = tl.maximum(key << ZERO_BITS, -0x7F800001).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _below_largest(logits: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """(logits - largest) / temperature, 0 at the largest even where it is infinite."""
    return tl.where(logits == largest, 0.0, (logits - largest) / temperature)


@triton.jit
def _mass(
    row_ptr: tl.tensor,
    vocab_size: tl.tensor,
    stops_ptr: tl.tensor,
    suppress: tl.tensor,
    least: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    NUM_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Softmax mass of the logits >= least, in units of the largest one's."""
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=_STAGES):
        ids = start + tl.arange(0, BLOCK)
        logits = _load_logits(row_ptr, ids, vocab_size, stops_ptr, suppress, NUM_STOPS)
        weights = tl.exp(_below_largest(logits, largest, temperature))
        mass += tl.where(logits >= least, weights, 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _threshold(
    row_ptr: tl.tensor,
    size: tl.tensor,
    stops_ptr: tl.tensor,
    suppress: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    target: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    IS_MASS: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest key in [low, high] whose logits, from it up, weigh at least `target`: their
    softmax mass or their number (exact in float32, being below 2^24). `low` is taken to do so."""
    while low < high:
        # Three pivots a pass quarter the range: half the passes of one pivot, and a pass costs
        # mostly the wait for its loads.
        step = (high - low) // 4 + 1
        pivot1 = _value(low + step, ZERO_BITS)
        pivot2 = _value(low + 2 * step, ZERO_BITS)
        pivot3 = _value(low + 3 * step, ZERO_BITS)
        sum1 = tl.zeros([BLOCK], dtype=tl.float32)
        sum2 = tl.zeros([BLOCK], dtype=tl.float32)
        sum3 = tl.zeros([BLOCK], dtype=tl.float32)
        for start in tl.range(0, size, BLOCK, num_stages=_STAGES):
            ids = start + tl.arange(0, BLOCK)
            logits = _load_logits(row_ptr, ids, size, stops_ptr, suppress, NUM_STOPS)
            if IS_MASS:
                weights = tl.exp(_below_largest(logits, largest, temperature))
            else:
                weights = tl.full([BLOCK], 1.0, dtype=tl.float32)
            sum1 += tl.where(logits >= pivot1, weights, 0.0)
            sum2 += tl.where(logits >= pivot2, weights, 0.0)
            sum3 += tl.where(logits >= pivot3, weights, 0.0)
        # Float sums of non-negative terms in one order are monotone too, so these are a prefix.
        reached = (tl.sum(sum1, axis=0) >= target).to(tl.int64)
        reached += (tl.sum(sum2, axis=0) >= target).to(tl.int64)
        reached += (tl.sum(sum3, axis=0) >= target).to(tl.int64)
        low += reached * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def _sample_above(
    row_ptr: tl.tensor,
    vocab_size: tl.tensor,
    stops_ptr: tl.tensor,
    suppress: tl.tensor,
    least: tl.tensor,
    least_below: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    NUM_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Argmax of logits / temperature + noise over the logits >= least that are at most
    -least_below under the largest after the division."""
    best = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    best_ids = tl.arange(0, BLOCK)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=_STAGES):
        ids = start + tl.arange(0, BLOCK)
        logits = _load_logits(row_ptr, ids, vocab_size, stops_ptr, suppress, NUM_STOPS)
        below = _below_largest(logits, largest, temperature)
        kept = (ids < vocab_size) & (logits >= least) & (below >= least_below)
        # Noise is what this pass costs, and most blocks keep no token.
        if tl.max(kept.to(tl.int32), axis=0) != 0:
            noisy = tl.div_rn(logits, temperature) + _gumbel_noise(seed, position, ids)
            scores = tl.where(kept, noisy, -float("inf"))
            best_ids = tl.where(scores > best, ids, best_ids)
            best = tl.maximum(best, scores)
    # A lane holds its lowest best id; the lowest of all wins a tie, and 0 where all are -inf.
    return tl.min(tl.where(best == tl.max(best, axis=0), best_ids, vocab_size), axis=0)
