"""What does each kernel compute? Plain torch: the oracle of `fused` and the CPU path.

Letters: N tokens, B decode rows, E hidden, H query heads, K kv heads, D head dim, I intermediate,
V vocab, M stop ids a row, P table positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphengine.model_config import ModelConfig

if TYPE_CHECKING:
    from graphengine.kernels.decode_chain import DecodeChain

# A temperature below this is greedy: logits / temperature would drown the noise, then overflow.
MIN_TEMPERATURE = 1e-6

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_PHILOX_ROUNDS = 10
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_U32 = 0xFFFFFFFF


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row times `weight`, float32 until the end. x: [N, E], weight: [E];
    the result is a new tensor [N, E] of x's dtype."""
    return _normed(x.float(), weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, and the RMSNorm of the sum. residual: [N, E]; x: [N, E], or the
    partial sums of a product, float32 [S, N, E].

    The norm is taken of the float32 sum, not of the sum as rounded to residual's dtype."""
    total = _summed(x).float() + residual.float()
    residual.copy_(total)
    return _normed(total, weight, eps).to(residual.dtype)


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (where a weight is given) and RoPE of q and k in place, and k and v into the caches.

    qkv: [N, (H + 2K) * D], q | k | v; its rows may be strided. Or as `linear` gives it,
        [S, N, (H + 2K) * D]; then the result may be a new tensor, of the caches' dtype.
    positions: int64 [N].
    cos_sin: float32 [P, D], cos then sin of the D/2 angles. Rotation pairs d with d + D/2, as
        Hugging Face's Llama does.
    k_cache, v_cache: [num_blocks, block_size, K, D] of qkv's dtype, the last two dims dense.
    slot_mapping: int64 [N], block * block_size + offset. Tokens that share a slot (padding rows in
        the null block) leave the K/V of any one of them there.
    q_weight, k_weight: [D] or None.
    Returns q [N, H, D], k [N, K, D], v [N, K, D]: views of qkv, or of the new tensor.
    """
    if qkv.dim() == 3:
        qkv = _summed(qkv).to(k_cache.dtype)
    num_tokens, head_dim = qkv.shape[0], cos_sin.shape[1]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [N, 1, D/2]
    for part, weight in ((q, q_weight), (k, k_weight)):
        part.copy_(_rotated(_normed(part.float(), weight, eps), cos, sin))
    block_size = k_cache.shape[1]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, offsets] = k
    v_cache[blocks, offsets] = v
    return q, k, v


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    whole: bool = False,
    decode: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x [N, C] times weight [F, C] transposed, plus bias [F]: [N, F] of x's dtype; or, unless
    `whole`, its partial sums over parts of C, float32 [S, N, F], or [1, N, F] of x's dtype.

    decode: of a decode step, mostly replayed from a graph: it, and what is `whole`, may run in
    kernels that are the best for few rows or take the host long to launch. How sums round may
    differ. out: gets the result, [N, F] of x's dtype, and is what is returned."""
    product = torch.nn.functional.linear(x, weight, bias)
    return product if out is None else out.copy_(product)


def add_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """residual [N, F] += x [N, C] times weight [F, C] transposed, plus bias [F], in place. Of a
    prefill: many rows."""
    residual += torch.nn.functional.linear(x, weight, bias)


def linear_silu_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, decode: bool = False
) -> Tensor:
    """silu(gate) * up, float32 inside, of the product with weight [2I, C], gate over up, plus bias
    [2I]: [N, I]. The product is rounded to x's dtype first. decode: as in `linear`."""
    gate, up = linear(x, weight, bias).float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def decode_chain(
    config: ModelConfig,
    *,
    cos_sin: Tensor,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeChain | None:
    """What runs all between two attentions of a decode step at once, for the models and devices
    that have it; None: the functions above, one by one. cos_sin: float32 [P, D]."""
    return None


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
    """out = last_token_ids[seq_indices] = one token id per row: a function of that row's arguments
    and of nothing else.

    logits: [B, V], any float dtype. NaN counts as -inf.
    temperature: float32 [B]. Below MIN_TEMPERATURE the row is greedy: the largest logit, the lowest
        id on ties; the four below are not read. Otherwise the logits are filtered, in this order:
    top_k: int32 [B], keeps logits >= the k-th largest; <= 0 or >= V keeps all.
    top_p: float32 [B], keeps a token if the mass of strictly greater ones, in the softmax of
        logits / temperature over what top-k left, is < top_p; >= 1 keeps all.
    min_p: float32 [B], keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
    seeds, positions: int64 [B]. They and the token id determine the noise: the token is the argmax
        of the kept logits / temperature + Gumbel noise, which is a draw from their softmax.
    stop_ids: int64 [B, M]. Where suppress_stops, int32 [B], is not 0 they count as -inf.

    out: int64 [B], on the device or in pinned host memory. seq_indices: int64 [B], lines of
        last_token_ids, int64; of rows that share one any one's token is left there.

    Ties are kept or dropped together, so a filter may keep more tokens than its number.
    """
    token_ids = _sampled(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        suppressed=_suppressed(stop_ids, suppress_stops, logits.shape[1]),
    )
    out.copy_(token_ids)
    last_token_ids[seq_indices] = token_ids


def _sampled(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    suppressed: Tensor,
) -> Tensor:
    """Token ids, int64 [B]. suppressed: bool [B, V]."""
    vocab_size = logits.shape[1]
    ids = torch.arange(vocab_size, device=logits.device)
    scores = logits.float()
    scores = scores.masked_fill(scores.isnan() | suppressed, -torch.inf)
    greedy = temperature < MIN_TEMPERATURE
    greedy_ids = scores.argmax(dim=-1)
    # On the CPU reading a value costs nothing, the noise of a large vocabulary much.
    if logits.device.type == "cpu" and bool(greedy.all()):
        return greedy_ids
    divisor = temperature.masked_fill(greedy, 1.0).unsqueeze(1)
    kept = _kept(scores, divisor, top_k=top_k, top_p=top_p, min_p=min_p)
    noisy = scores / divisor + gumbel_noise(seeds.unsqueeze(1), positions.unsqueeze(1), ids)
    sampled_ids = noisy.masked_fill(~kept, -torch.inf).argmax(dim=-1)
    return torch.where(greedy, greedy_ids, sampled_ids)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of int64 tensors that broadcast together.

    Counter-based: key = the seed's two words, counter = (token id, the position's two words, 0)."""
    words = philox(
        (token_ids, positions & _U32, positions >> 32 & _U32, torch.zeros_like(token_ids)),
        (seeds & _U32, seeds >> 32 & _U32),
    )
    return gumbel_from_words(words[0])


def gumbel_from_words(words: Tensor) -> Tensor:
    """Gumbel noise, float32 in [-2.82, 22.88], of uniform int64 words in [0, 2^32); the smaller
    the word, the larger the noise."""
    # In (0, 1): float32 holds 1 - 2^-24, and would round the largest words to 1.
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    # -log(1 - v) is exponential. Small v make the largest noise, where 1 - v would round v away.
    small = uniform + uniform * uniform * 0.5
    exponential = torch.where(uniform < 2.0**-12, small, -torch.log(1.0 - uniform))
    return -torch.log(exponential)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of four counter words and two key words, each an int64 tensor of
    values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # An int64 product may wrap; its 64 bits are still those of the unsigned product.
        product0, product1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = (
            (product1 >> 32 & _U32) ^ c1 ^ k0,
            product1 & _U32,
            (product0 >> 32 & _U32) ^ c3 ^ k1,
            product0 & _U32,
        )
        k0, k1 = (k0 + _PHILOX_W0) & _U32, (k1 + _PHILOX_W1) & _U32
    return c0, c1, c2, c3


def _summed(x: Tensor) -> Tensor:
    """A product whose partial sums x may be."""
    return x.sum(dim=0) if x.dim() == 3 else x


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _suppressed(stop_ids: Tensor, suppress_stops: Tensor, vocab_size: int) -> Tensor:
    """bool [B, V]: the stop ids of the rows that suppress them. Other rows may hold any id; an id
    that is not used goes to a column past the vocabulary."""
    used = (suppress_stops.unsqueeze(1) != 0) & (stop_ids >= 0) & (stop_ids < vocab_size)
    mask = torch.zeros(
        (stop_ids.shape[0], vocab_size + 1), dtype=torch.bool, device=stop_ids.device
    )
    return mask.scatter_(1, stop_ids.masked_fill(~used, vocab_size), True)[:, :vocab_size]


def _kept(
    scores: Tensor, temperature: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """bool [B, V]: what top-k, then top-p, then min-p keep of scores: float32 [B, V]."""
    vocab_size = scores.shape[1]
    descending, order = scores.sort(dim=-1, descending=True)
    all_k = (top_k <= 0) | (top_k >= vocab_size)
    last = top_k.long().masked_fill(all_k, vocab_size).unsqueeze(1) - 1
    kth = descending.gather(1, last)
    # 0 at the largest even where it is infinite. The difference comes first: it loses no bits.
    largest = descending[:, :1]
    below = ((scores - largest) / temperature).masked_fill(scores == largest, 0.0)
    weights = below.gather(1, order).exp().masked_fill(descending < kth, 0.0)
    mass = weights.cumsum(dim=-1)
    # The first token whose mass with all before it reaches top_p is the last kept value. The total
    # is the cumsum's own end: sum() adds up in an order that depends on B.
    reached = mass >= top_p.unsqueeze(1) * mass[:, -1:]
    last = reached.int().argmax(dim=-1, keepdim=True)
    nucleus = torch.where(top_p.unsqueeze(1) < 1.0, descending.gather(1, last), kth)
    return (scores >= nucleus) & (below >= min_p.log().unsqueeze(1))
