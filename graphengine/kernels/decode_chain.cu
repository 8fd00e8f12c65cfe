// Everything of a decode step between one attention and the next, as one launch that never leaves
// the multiprocessors: o_proj, residual and norm, gate and up, SiLU, down, residual and norm, qkv,
// q/k norm, RoPE and the KV cache. See decode_chain.py for what it computes and when it is used.
//
// A product of few rows is bound by the reading of its weights, and what a kernel of its own loses
// is its start and its drain. Here one warp of every block does nothing but stream weights into a
// ring of shared memory, through all products of the launch: while the blocks wait for each other
// the next product's weights keep coming.
//
// A product [N, C] x [F, C] is cut into units of 128 features by 64 of C, and every block takes an
// equal, contiguous share of the units in feature-major order. So the features of a tile may be
// summed by several blocks, each over its part of C; the parts are written out in float32 and added
// in their order. The cut does not depend on N: neither does any bit of a row's result.
//
// Who adds parts waits for each by looking at its place, which is EMPTY until the part is there and
// again when it was read: no fence, no counter. Inputs of a product, which the copy engine reads,
// are counted. Since blocks wait for each other all must be resident: the grid is one block a
// multiprocessor. PTX ISA 8: mbarrier, cp.async.bulk.tensor, wgmma, griddepcontrol; the
// layout of wgmma's accumulators and of its shared-memory descriptors is from there.
//
// Set when compiled: NR (rows, padded: 8, 16 or 32), GRID, HIDDEN, INTER, HEADS, KV_HEADS,
// HEAD_DIM. Letters: N rows, F output features, C input features.

#include <hopper.cuh>

constexpr int TILE_F = 128;
constexpr int UNIT_C = 64;
constexpr int W_BYTES = TILE_F * UNIT_C * 2;
constexpr int X_BYTES = NR * UNIT_C * 2;
constexpr int X_STAGES = 8;
constexpr int W_STAGES = NR == 32 ? 12 : 13;
constexpr int CONSUMERS = 256;  // two warpgroups, 64 features of a tile each
constexpr int WARPS = CONSUMERS / 32;
constexpr int COUNTER_STRIDE = 32;  // a 128-byte line each
constexpr int SLOT = TILE_F * NR;   // floats of one partial sum

enum Phase { O_PROJ, GATE_UP, DOWN, QKV, NUM_PHASES };

struct Params {
    TensorMap weights[NUM_PHASES];
    TensorMap attended, normed_map, activated_map;
    float* partials;  // EMPTY everywhere, before and after
    float* squares;  // [NR, HIDDEN / TILE_F]: sums of squares of the residual
    u32* counters;   // zeros; [NUM_PHASES, COUNTER_STRIDE]: blocks that wrote a product's input
    bf16* residual;  // [NR, HIDDEN]
    bf16* normed;    // [NR, HIDDEN]: residual times norm weight, not yet divided by its RMS
    bf16* activated; // [NR, INTER]
    float* unscaled; // [NR, HIDDEN]: `normed` in float32, of the last norm
    bf16* hidden;    // [N, HIDDEN]: the output of the last norm
    bf16* q;         // [N, HEADS, HEAD_DIM]
    const bf16* post_norm;
    const bf16* next_norm;
    const bf16* qkv_bias;  // or null, as are the two below
    const bf16* q_norm;
    const bf16* k_norm;
    bf16* k_cache;
    bf16* v_cache;
    const long long* slots;
    const long long* positions;
    const float* cos_sin;
    const long long* token_ids;
    const bf16* embedding;
    const int* block_tables;  // or null, if the next attention does not begin at the first token
    const int* context_lens;
    long long k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, table_stride;
    float eps;
    int num_rows, block_size, first_phase, last_phase, is_first, is_last;
};

// --- the cut

template <int PHASE>
struct Cut {
    static constexpr int F = PHASE == GATE_UP ? 2 * INTER
                             : PHASE == QKV   ? (HEADS + 2 * KV_HEADS) * HEAD_DIM
                                              : HIDDEN;
    static constexpr int C = PHASE == O_PROJ ? HEADS * HEAD_DIM : PHASE == DOWN ? INTER : HIDDEN;
    static constexpr int DEPTH = C / UNIT_C;  // units of a tile
    static constexpr int UNITS = F / TILE_F * DEPTH;
    static_assert(F % TILE_F == 0 && C % UNIT_C == 0 && UNITS >= GRID, "see decode_chain.py");

    static constexpr int TILES = F / TILE_F;
    static constexpr int MOST = (UNITS + GRID - 1) / GRID;  // units of a block

    static constexpr __device__ int begin(int block) { return (int)((long long)block * UNITS / GRID); }
    // The block that has a unit.
    static constexpr __device__ int owner(int unit) {
        return (int)(((long long)(unit + 1) * GRID - 1) / UNITS);
    }
    static constexpr __device__ int parts(int tile) {
        return owner((tile + 1) * DEPTH - 1) - owner(tile * DEPTH) + 1;
    }
    static constexpr __device__ int max_parts() {
        int most = 0;
        for (int tile = 0; tile < TILES; tile++) most = parts(tile) > most ? parts(tile) : most;
        return most;
    }
    static constexpr int MAX_PARTS = max_parts();
};

__device__ __forceinline__ u32* input_written(const Params& p, int phase) {
    return p.counters + phase * COUNTER_STRIDE;
}

struct alignas(8) Four {
    bf16 values[4];
};
__device__ __forceinline__ Four load_four(const Four* from) {
    const uint2 words = __ldcg((const uint2*)from);
    return *(const Four*)&words;
}

struct alignas(4) Two {
    bf16 values[2];
};

// --- shared memory

// Loads of weights under way at once. More would not come sooner, and whatever the blocks tell each
// other would have to queue behind them: half of the time of a small model's step.
#ifndef W_AHEAD
#define W_AHEAD (Cut<O_PROJ>::MOST + Cut<GATE_UP>::MOST + Cut<DOWN>::MOST < 3 * W_STAGES ? 2 : 4)
#endif

struct Ring {
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void advance(u32 num_stages) {
        if (++stage == num_stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Shared {
    u32 w, x;                          // data: 1,024-byte aligned
    u32 w_full, w_empty, x_full, x_empty;  // barriers of 8 bytes
    float* scale;                          // [NR]: 1 / RMS of each row
};

constexpr int BARRIERS = 2 * (W_STAGES + X_STAGES);
constexpr int SHARED_BYTES =
    1024 + W_STAGES * W_BYTES + X_STAGES * X_BYTES + BARRIERS * 8 + NR * 4;

// --- who loads

template <int PHASE>
__device__ __forceinline__ void stream_weights(
    const Params& p, const Shared& s, Ring& ring, Ring& landed, int block, u64 policy) {
    using cut = Cut<PHASE>;
    const TensorMap* map = &p.weights[PHASE];
    const int end = cut::begin(block + 1);
    for (int unit = cut::begin(block); unit < end; unit++) {
        const int tile = unit / cut::DEPTH, c = unit % cut::DEPTH * UNIT_C;
        const int row = PHASE == GATE_UP ? tile * 64 : tile * TILE_F;
        const u32 full = s.w_full + ring.stage * 8, to = s.w + ring.stage * W_BYTES;
        if ((ring.stage + W_STAGES - landed.stage) % W_STAGES == W_AHEAD) {
            barrier_wait(s.w_full + landed.stage * 8, landed.parity);
            landed.advance(W_STAGES);
        }
        barrier_wait(s.w_empty + ring.stage * 8, ring.parity ^ 1);
        barrier_expect(full, W_BYTES);
        load_box(to, map, c, row, full, policy);
        // Of gate and up each warpgroup has one, and the same features of it.
        load_box(to + W_BYTES / 2, map, c, PHASE == GATE_UP ? INTER + row : row + 64, full, policy);
        ring.advance(W_STAGES);
    }
}

// Of the context that the attention after this launch reads, what is asked for into the L2 cache:
// between its last weights and the launch's end the memory has nothing else to do. CONTEXT_AHEAD
// pieces of at most 16 KiB a block, CONTEXT_PACE cycles apart, since whatever the blocks tell each
// other queues behind them; every second piece of a row, so that the rest comes from memory
// meanwhile.
constexpr int CONTEXT_AHEAD = 8;
constexpr int CONTEXT_PACE = 900;

// Tokens of a piece: a power of 2, of which a block of the cache has a whole number.
constexpr __device__ int piece_tokens() {
    int tokens = 1;
    while (tokens * 2 * KV_HEADS * HEAD_DIM * 2 <= 16 << 10) tokens *= 2;
    return tokens;
}

// Only old tokens: the newest is being written.
__device__ __forceinline__ void prefetch_context(const Params& p, int block) {
    constexpr int TOKENS = piece_tokens();
    if (!p.block_tables || p.block_size % TOKENS != 0) return;
    u32 last = clock_now() - CONTEXT_PACE;
    for (int i = 0; i < CONTEXT_AHEAD; i++) {
        const int piece = (i * GRID + block) / 2, row = piece % p.num_rows;
        const int token = piece / p.num_rows * 2 * TOKENS;
        if (token + TOKENS >= p.context_lens[row]) continue;
        const long long id = p.block_tables[row * p.table_stride + token / p.block_size];
        const int slot = token % p.block_size;
        while (clock_now() - last < CONTEXT_PACE) {}
        last = clock_now();
        if ((i * GRID + block) % 2 == 0)
            prefetch(p.k_cache + id * p.k_block_stride + slot * p.k_slot_stride,
                     TOKENS * p.k_slot_stride * 2);
        else
            prefetch(p.v_cache + id * p.v_block_stride + slot * p.v_slot_stride,
                     TOKENS * p.v_slot_stride * 2);
    }
}

template <int PHASE>
__device__ __forceinline__ void stream_inputs(
    const Params& p, const Shared& s, Ring& ring, int block, u64 policy) {
    using cut = Cut<PHASE>;
    const TensorMap* map = PHASE == O_PROJ ? &p.attended
                           : PHASE == DOWN ? &p.activated_map
                                           : &p.normed_map;
    if (PHASE != O_PROJ) grid_wait(input_written(p, PHASE));
    publish_to_copy_engine();
    const int end = cut::begin(block + 1);
    for (int unit = cut::begin(block); unit < end; unit++) {
        const u32 full = s.x_full + ring.stage * 8;
        barrier_wait(s.x_empty + ring.stage * 8, ring.parity ^ 1);
        barrier_expect(full, X_BYTES);
        load_box(s.x + ring.stage * X_BYTES, map, unit % cut::DEPTH * UNIT_C, 0, full, policy);
        ring.advance(X_STAGES);
    }
}

// --- who computes

// This block's share of a product, into `partials`.
template <int PHASE>
__device__ __forceinline__ void multiply_units(
    const Params& p, const Shared& s, Ring& w_ring, Ring& x_ring, int block, int thread) {
    using cut = Cut<PHASE>;
    const int lane = thread % 32, group = thread / 128;
    const int end = cut::begin(block + 1);
    for (int unit = cut::begin(block); unit < end;) {
        const int tile = unit / cut::DEPTH;
        const int stop = min(end, (tile + 1) * cut::DEPTH);
        float sums[NR / 2];
#pragma unroll
        for (int i = 0; i < NR / 2; i++) sums[i] = 0.0f;
        u32 w_used = 0, x_used = 0;
        for (; unit < stop; unit++) {
            barrier_wait(s.w_full + w_ring.stage * 8, w_ring.parity);
            barrier_wait(s.x_full + x_ring.stage * 8, x_ring.parity);
            const u64 w = descriptor(s.w + w_ring.stage * W_BYTES + group * (W_BYTES / 2));
            const u64 x = descriptor(s.x + x_ring.stage * X_BYTES);
            multiply_begin();
#pragma unroll
            for (int k = 0; k < UNIT_C / 16; k++)
                multiply(sums, w + 2 * k, x + 2 * k);  // 32 bytes further in a row
            multiply_commit();
            if (w_used != 0) {
                multiply_wait_but_last();
                if (lane == 0) {
                    barrier_arrive(w_used);
                    barrier_arrive(x_used);
                }
            }
            w_used = s.w_empty + w_ring.stage * 8;
            x_used = s.x_empty + x_ring.stage * 8;
            w_ring.advance(W_STAGES);
            x_ring.advance(X_STAGES);
        }
        multiply_wait(sums);
        if (lane == 0) {
            barrier_arrive(w_used);
            barrier_arrive(x_used);
        }
        const int part = block - cut::owner(tile * cut::DEPTH);
        float* to = p.partials + (long long)(tile * cut::MAX_PARTS + part) * SLOT;
        const int column = lane % 4 * 2;
        to += column * TILE_F + group * 64 + thread % 128 / 32 * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < NR / 4; j++) {
            const int row = j / 2 * 8 + j % 2;
            if (row + column >= p.num_rows) continue;  // nobody would read it, and clear its place
            put_part(to + row * TILE_F, sums[j / 2 * 4 + j % 2]);
            put_part(to + row * TILE_F + 8, sums[j / 2 * 4 + 2 + j % 2]);
        }
    }
}

__device__ __forceinline__ void add(float& sum, uint1 part) { sum += __uint_as_float(part.x); }
__device__ __forceinline__ void add(float2& sum, uint2 part) {
    sum.x += __uint_as_float(part.x);
    sum.y += __uint_as_float(part.y);
}
__device__ __forceinline__ void add(float4& sum, uint4 part) {
    sum.x += __uint_as_float(part.x);
    sum.y += __uint_as_float(part.y);
    sum.z += __uint_as_float(part.z);
    sum.w += __uint_as_float(part.w);
}

// sums[i] = the sum over a tile's parts [MAX_PARTS, NR, TILE_F], in their order, of what stands at
// offsets[i]. Looks for all that is missing at once, as long as something is, and clears the places.
template <int PHASE, typename Bits, typename Sum, int COUNT>
__device__ __forceinline__ void add_parts(
    Sum (&sums)[COUNT], const Params& p, int tile, const int (&offsets)[COUNT]) {
    using cut = Cut<PHASE>;
    float* from = p.partials + (long long)tile * cut::MAX_PARTS * SLOT;
    const int num_parts = cut::parts(tile);
    Bits parts[cut::MAX_PARTS][COUNT];
    bool is_missing[cut::MAX_PARTS];
#pragma unroll
    for (int part = 0; part < cut::MAX_PARTS; part++) is_missing[part] = part < num_parts;
    bool is_complete;
    do {
#pragma unroll
        for (int part = 0; part < cut::MAX_PARTS; part++)
            if (is_missing[part])
#pragma unroll
                for (int i = 0; i < COUNT; i++)
                    parts[part][i] = look_at((const Bits*)(from + part * SLOT + offsets[i]));
        is_complete = true;
#pragma unroll
        for (int part = 0; part < cut::MAX_PARTS; part++) {
            if (!is_missing[part]) continue;
            bool is_here = true;
#pragma unroll
            for (int i = 0; i < COUNT; i++) is_here &= is_there(parts[part][i]);
            is_missing[part] = !is_here;
            is_complete &= is_here;
        }
    } while (!is_complete);
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = {};
#pragma unroll
    for (int part = 0; part < cut::MAX_PARTS; part++) {
        if (part >= num_parts) break;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            clear((Bits*)(from + part * SLOT + offsets[i]));
            add(sums[i], parts[part][i]);
        }
    }
}

// Of a value in each lane: to all lanes, and always in the same order.
__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// s.scale = 1 / RMS of each row of the residual, whose sums of squares are older than the inputs
// that this block has multiplied.
__device__ __forceinline__ void take_scales(const Params& p, const Shared& s, int thread) {
    constexpr int TILES = HIDDEN / TILE_F;
    const int lane = thread % 32;
#pragma unroll
    for (int n = thread / 32; n < NR; n += WARPS) {
        if (n >= p.num_rows) break;
        float square = 0.0f;
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 32)
            if (tile + lane < TILES) square += __ldcg(p.squares + n * TILES + tile + lane);
        const float scale = rsqrtf(add_lanes(square) / HIDDEN + p.eps);
        if (lane == 0) s.scale[n] = scale;
    }
}

// A warp's place in a loop over items: few items are spread over all blocks.
__device__ __forceinline__ int first_item(int block, int thread) {
    return thread / 32 * GRID + block;
}

// residual += the product (of phase FROM; NUM_PHASES: residual = the embeddings), and its sums of
// squares; `normed` gets it times the norm's weight. A warp takes a tile of a row. `prepare` loads
// what is there before the product is.
template <int FROM>
struct AddToResidual {
    static constexpr int TILES = HIDDEN / TILE_F;
    Four before, weights;

    __device__ __forceinline__ void prepare(const Params& p, int item, int lane) {
        if (item >= TILES * p.num_rows) return;
        const int n = item / TILES, f = item % TILES * TILE_F + lane * 4;
        const bf16* from = FROM == NUM_PHASES ? p.embedding + p.token_ids[n] * HIDDEN
                                              : p.residual + n * HIDDEN;
        before = load_four((const Four*)(from + f));
        weights = load_four((const Four*)((FROM == O_PROJ ? p.post_norm : p.next_norm) + f));
    }

    __device__ __forceinline__ void run(const Params& p, int block, int thread) {
        const int lane = thread % 32;
        int item = first_item(block, thread);
        while (item < TILES * p.num_rows) {
            const int n = item / TILES, tile = item % TILES, f = tile * TILE_F + lane * 4;
            float4 sum[1] = {};
            if constexpr (FROM != NUM_PHASES)
                add_parts<FROM, uint4>(sum, p, tile, {n * TILE_F + lane * 4});
            const float sums[4] = {sum[0].x, sum[0].y, sum[0].z, sum[0].w};
            Four after, normed;
            float unscaled[4], squares[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float total = to_float(before.values[i]) + sums[i];
                squares[i] = total * total;
                unscaled[i] = total * to_float(weights.values[i]);
                after.values[i] = to_bf16(total);
                normed.values[i] = to_bf16(unscaled[i]);
            }
            *(Four*)(p.residual + n * HIDDEN + f) = after;
            if (p.is_last && FROM == DOWN) {
                *(float4*)(p.unscaled + n * HIDDEN + f) =
                    make_float4(unscaled[0], unscaled[1], unscaled[2], unscaled[3]);
            } else {
                *(Four*)(p.normed + n * HIDDEN + f) = normed;
            }
            const float square = add_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
            if (lane == 0) p.squares[n * TILES + tile] = square;
            item += WARPS * GRID;
            prepare(p, item, lane);
        }
    }
};

__device__ __forceinline__ bf16 silu_times(float gate, float up, float scale) {
    // Rounded as they are where they are stored between two kernels.
    const float g = to_float(to_bf16(gate * scale)), u = to_float(to_bf16(up * scale));
    return to_bf16(g / (1.0f + __expf(-g)) * u);
}

// Half a warp takes 64 features of gate and up of each of ROWS rows.
__device__ __forceinline__ void activate(const Params& p, const Shared& s, int block, int thread) {
    constexpr int ROWS = NR >= 32 && Cut<GATE_UP>::MAX_PARTS <= 3 ? 2 : 1;
    constexpr int GROUPS = NR / (2 * ROWS), ITEMS = INTER / 64 * GROUPS;
    const int lane = thread % 32, half = lane / 16, f = lane % 16 * 4;
    for (int item = first_item(block, thread); item < ITEMS; item += WARPS * GRID) {
        const int tile = item / GROUPS, first = item % GROUPS * 2 * ROWS + half;
        if (first >= p.num_rows) continue;
        // A row past the end is never written: the first is looked at again instead.
        float4 sums[2 * ROWS];
        int offsets[2 * ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int n = first + 2 * i < p.num_rows ? first + 2 * i : first;
            offsets[2 * i] = n * TILE_F + f;
            offsets[2 * i + 1] = offsets[2 * i] + 64;
        }
        add_parts<GATE_UP, uint4>(sums, p, tile, offsets);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int n = first + 2 * i;
            if (n >= p.num_rows) continue;
            const float4 gate = sums[2 * i], up = sums[2 * i + 1];
            const float scale = s.scale[n];
            *(Four*)(p.activated + n * INTER + tile * 64 + f) = {
                {silu_times(gate.x, up.x, scale), silu_times(gate.y, up.y, scale),
                 silu_times(gate.z, up.z, scale), silu_times(gate.w, up.w, scale)}};
        }
    }
}

// q/k norm, RoPE, q out, k and v into the cache. A warp takes a head of a row, a lane PAIRS pairs
// of dimensions that turn together. `prepare` loads what is there before the product is.
struct RotateAndCache {
    static constexpr int PAIRS = HEAD_DIM / 64, HALF = HEAD_DIM / 2;
    bf16* to;
    float cosines[PAIRS], sines[PAIRS], biases[2][PAIRS], weights[2][PAIRS];

    __device__ __forceinline__ static int num_items(const Params& p) {
        return (HEADS + 2 * KV_HEADS) * p.num_rows;
    }

    __device__ __forceinline__ void prepare(const Params& p, int item, int lane) {
        if (item >= num_items(p)) return;
        const int n = item % p.num_rows, head = item / p.num_rows, d = lane * PAIRS;
        const u32 slot = (u32)p.slots[n];
        const long long at = slot / p.block_size, in_block = slot % p.block_size;
        const float* cos = p.cos_sin + p.positions[n] * HEAD_DIM + d;
        const bf16* weight = head < HEADS ? p.q_norm : head < HEADS + KV_HEADS ? p.k_norm : nullptr;
        const bf16* bias = p.qkv_bias;
        if (bias) bias += head * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            cosines[i] = cos[i];
            sines[i] = cos[HALF + i];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = half * HALF + d + i;
                weights[half][i] = weight ? to_float(weight[dim]) : 1.0f;
                biases[half][i] = bias ? to_float(bias[dim]) : 0.0f;
            }
        }
        to = head < HEADS ? p.q + (long long)(n * HEADS + head) * HEAD_DIM
             : head < HEADS + KV_HEADS
                 ? p.k_cache + at * p.k_block_stride + in_block * p.k_slot_stride +
                       (head - HEADS) * HEAD_DIM
                 : p.v_cache + at * p.v_block_stride + in_block * p.v_slot_stride +
                       (head - HEADS - KV_HEADS) * HEAD_DIM;
    }

    __device__ __forceinline__ void run(
        const Params& p, const Shared& s, int block, int thread) {
        const int lane = thread % 32, d = lane * PAIRS;
        int item = first_item(block, thread);
        while (item < num_items(p)) {
            const int n = item % p.num_rows, head = item / p.num_rows, f = head * HEAD_DIM;
            const int offset = n * TILE_F + f % TILE_F + d;
            float x[PAIRS], y[PAIRS];
            if constexpr (PAIRS == 2) {
                float2 sums[2];
                add_parts<QKV, uint2>(sums, p, f / TILE_F, {offset, offset + HALF});
                x[0] = sums[0].x, x[1] = sums[0].y, y[0] = sums[1].x, y[1] = sums[1].y;
            } else {
                float sums[2];
                add_parts<QKV, uint1>(sums, p, f / TILE_F, {offset, offset + HALF});
                x[0] = sums[0], y[0] = sums[1];
            }
            const float scale = s.scale[n];
            float square = 0.0f;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                x[i] = x[i] * scale + biases[0][i];
                y[i] = y[i] * scale + biases[1][i];
                square += x[i] * x[i] + y[i] * y[i];
            }
            if (head < HEADS + KV_HEADS) {
                float head_scale = 1.0f;
                if (p.q_norm) head_scale = rsqrtf(add_lanes(square) / HEAD_DIM + p.eps);
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    const float a = x[i] * head_scale * weights[0][i];
                    const float b = y[i] * head_scale * weights[1][i];
                    x[i] = a * cosines[i] - b * sines[i];
                    y[i] = b * cosines[i] + a * sines[i];
                }
            }
            if constexpr (PAIRS == 2) {
                *(Two*)(to + d) = {{to_bf16(x[0]), to_bf16(x[1])}};
                *(Two*)(to + d + HALF) = {{to_bf16(y[0]), to_bf16(y[1])}};
            } else {
                to[d] = to_bf16(x[0]);
                to[d + HALF] = to_bf16(y[0]);
            }
            item += WARPS * GRID;
            prepare(p, item, lane);
        }
    }
};

// What this block has written of the input of PHASE is there for all.
template <int PHASE>
__device__ __forceinline__ void give_input(const Params& p, int thread) {
    publish_to_copy_engine();
    consumers_meet();
    if (thread == 0) grid_arrive(input_written(p, PHASE));
}

template <int PHASE>
__device__ __forceinline__ void consume(
    const Params& p, const Shared& s, Ring& w_ring, Ring& x_ring, int block, int thread) {
    const int item = first_item(block, thread), lane = thread % 32;
    if constexpr (PHASE == O_PROJ || PHASE == DOWN) {
        AddToResidual<PHASE> add;
        add.prepare(p, item, lane);
        multiply_units<PHASE>(p, s, w_ring, x_ring, block, thread);
        add.run(p, block, thread);
        give_input<PHASE + 1>(p, thread);
    } else if constexpr (PHASE == GATE_UP) {
        multiply_units<PHASE>(p, s, w_ring, x_ring, block, thread);
        take_scales(p, s, thread);
        consumers_meet();
        activate(p, s, block, thread);
        give_input<PHASE + 1>(p, thread);
    } else {
        RotateAndCache rotate;
        rotate.prepare(p, item, lane);
        multiply_units<PHASE>(p, s, w_ring, x_ring, block, thread);
        take_scales(p, s, thread);
        consumers_meet();
        rotate.run(p, s, block, thread);
    }
}

// The last norm's division, for the head. Each thread reads what it wrote itself.
__device__ __forceinline__ void finish(const Params& p, const Shared& s, int block, int thread) {
    constexpr int TILES = HIDDEN / TILE_F;
    const int lane = thread % 32;
    if (thread == 0) grid_wait(input_written(p, QKV));
    consumers_meet();
    take_scales(p, s, thread);
    consumers_meet();
    for (int item = first_item(block, thread); item < TILES * p.num_rows; item += WARPS * GRID) {
        const int n = item / TILES, f = item % TILES * TILE_F + lane * 4;
        const float scale = s.scale[n];
        const float4 unscaled = *(const float4*)(p.unscaled + n * HIDDEN + f);
        *(Four*)(p.hidden + n * HIDDEN + f) = {
            {to_bf16(unscaled.x * scale), to_bf16(unscaled.y * scale),
             to_bf16(unscaled.z * scale), to_bf16(unscaled.w * scale)}};
    }
}

extern "C" __constant__ int shared_bytes = SHARED_BYTES;

extern "C" __global__ void __launch_bounds__(CONSUMERS + 64, 1)
    decode_chain(const __grid_constant__ Params p) {
    SHARED_MEMORY(dynamic);
    const int block = blockIdx.x, thread = threadIdx.x;
    Shared s;
    s.w = (shared_address(dynamic) + 1023) & ~1023u;
    s.x = s.w + W_STAGES * W_BYTES;
    s.w_full = s.x + X_STAGES * X_BYTES;
    s.w_empty = s.w_full + W_STAGES * 8;
    s.x_full = s.w_empty + W_STAGES * 8;
    s.x_empty = s.x_full + X_STAGES * 8;
    s.scale = (float*)(dynamic + (s.x_empty + X_STAGES * 8 - shared_address(dynamic)));
    if (thread == 0) {
        for (int i = 0; i < W_STAGES; i++) {
            barrier_init(s.w_full + i * 8, 1);
            barrier_init(s.w_empty + i * 8, WARPS);
        }
        for (int i = 0; i < X_STAGES; i++) {
            barrier_init(s.x_full + i * 8, 1);
            barrier_init(s.x_empty + i * 8, WARPS);
        }
        publish_barriers();
    }
    __syncthreads();

    if (thread == CONSUMERS) {  // weights: no kernel writes them, so no wait for the one before
        const u64 policy = policy_evict_first();
        Ring ring, landed;
        if (p.first_phase <= O_PROJ) {
            stream_weights<O_PROJ>(p, s, ring, landed, block, policy);
            stream_weights<GATE_UP>(p, s, ring, landed, block, policy);
            stream_weights<DOWN>(p, s, ring, landed, block, policy);
        }
        if (p.last_phase >= QKV) {
            stream_weights<QKV>(p, s, ring, landed, block, policy);
            prefetch_context(p, block);
        }
        return;
    }
    if (thread > CONSUMERS && thread != CONSUMERS + 32) return;
    wait_for_kernel_before();
    if (thread == CONSUMERS + 32) {
        const u64 policy = policy_evict_last();
        Ring ring;
        if (p.first_phase <= O_PROJ) {
            stream_inputs<O_PROJ>(p, s, ring, block, policy);
            stream_inputs<GATE_UP>(p, s, ring, block, policy);
            stream_inputs<DOWN>(p, s, ring, block, policy);
        }
        if (p.last_phase >= QKV) stream_inputs<QKV>(p, s, ring, block, policy);
        return;
    }

    Ring w_ring, x_ring;
    if (p.is_first) {
        AddToResidual<NUM_PHASES> add;
        add.prepare(p, first_item(block, thread), thread % 32);
        add.run(p, block, thread);
        give_input<QKV>(p, thread);
    }
    if (p.first_phase <= O_PROJ) {
        consume<O_PROJ>(p, s, w_ring, x_ring, block, thread);
        consume<GATE_UP>(p, s, w_ring, x_ring, block, thread);
        consume<DOWN>(p, s, w_ring, x_ring, block, thread);
    }
    let_next_kernel_start();
    if (p.last_phase >= QKV) consume<QKV>(p, s, w_ring, x_ring, block, thread);
    if (p.is_last) finish(p, s, block, thread);
}
