// Everything of a decode step between one attention and the next, as one launch that never leaves
// the multiprocessors: o_proj, residual and norm, gate and up, SiLU, down, residual and norm, qkv,
// q/k norm, RoPE and the KV cache. See decode_chain.py for what it computes and when it is used.
//
// A product of few rows is bound by the reading of its weights, and what a kernel of its own loses
// is its start and its drain. Here one warp of every block does nothing but stream weights into a
// ring of shared memory, through all products of the launch: while the blocks wait for each other
// the next product's weights keep coming. Eight warps multiply, and six or eight others add up.
//
// A product [N, C] x [F, C] is cut into units of 128 features by 64 of C, and every block takes an
// equal, contiguous share of the units in feature-major order. So the features of a tile may be
// summed by several blocks, each over its part of C; the parts are written out in float32 and added
// in their order. Of gate and up, where there are enough of them, every block has whole features
// instead: nothing is to be added, and what waits for them waits 4 us less. Neither cut depends on
// N: neither does any bit of a row's result.
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
constexpr int GROUP_BYTES = W_BYTES / 2;  // weights of a warpgroup: 64 features
constexpr int MULTIPLIERS = 256;          // two warpgroups
constexpr int MULTIPLIER_WARPS = MULTIPLIERS / 32;
constexpr int COUNTER_STRIDE = 32;             // a 128-byte line each
constexpr int SLOT = TILE_F * NR;              // floats of one partial sum
constexpr int PIECE = 64;                      // features that some lanes add to the residual

enum Phase { O_PROJ, GATE_UP, DOWN, QKV, NUM_PHASES };

struct Params {
    TensorMap weights[NUM_PHASES];
    TensorMap attended, normed_map, activated_map;
    float* partials;  // EMPTY everywhere, before and after
    float* squares;  // [NR, HIDDEN / PIECE]: sums of squares of the residual
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
    static constexpr int TILES = F / TILE_F;
    static constexpr int UNITS = TILES * DEPTH;
    static_assert(F % TILE_F == 0 && C % UNIT_C == 0 && UNITS >= GRID, "see decode_chain.py");

    static constexpr int MOST = (UNITS + GRID - 1) / GRID;  // units of a block

    static constexpr __device__ int begin(int block) {
        return (int)((long long)block * UNITS / GRID);
    }
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

// Gate and up by whole features: pairs of them, as even as can be.
struct GateUp {
    static constexpr int DEPTH = HIDDEN / UNIT_C;
    static constexpr __device__ int begin(int block) {
        return (int)((long long)block * (INTER / 2) / GRID) * 2;
    }
    static constexpr int MOST = (INTER / 2 + GRID - 1) / GRID * 2;  // features of a block
    static constexpr int TILES = (MOST + TILE_F - 1) / TILE_F;
    // Rows of a tile that are loaded, of gate or up, of any block: some may be the next block's.
    static constexpr int ROWS = ((MOST + TILES - 1) / TILES + 7) / 8 * 8;
    static constexpr int BYTES = ROWS * UNIT_C * 2;  // of a stage of the ring
    // Where they fill the stages. (Of fewer, two units of C a stage were 3 us slower than parts.)
    static constexpr bool IS_WHOLE = ROWS >= 96 && TILES <= 2;
};

// With 8 warps that add up all threads have 96 registers: enough for few parts, and for the sums of
// one tile of gate and up. With 6 they have 128.
constexpr bool ARE_PARTS_FEW = Cut<O_PROJ>::MAX_PARTS <= 6 && Cut<DOWN>::MAX_PARTS <= 6;
constexpr int ADDERS = GateUp::IS_WHOLE && GateUp::TILES == 1 && ARE_PARTS_FEW ? 256 : 192;
constexpr int WARPS = ADDERS / 32;
constexpr int LOADERS = MULTIPLIERS + ADDERS;  // the first of two warps
constexpr int THREADS = LOADERS + 64;

__device__ __forceinline__ void adders_meet() { meet<1, ADDERS>(); }
__device__ __forceinline__ void multipliers_meet() { meet<2, MULTIPLIERS>(); }

__device__ __forceinline__ u32* input_written(const Params& p, int phase) {
    return p.counters + phase * COUNTER_STRIDE;
}

template <int COUNT>
struct alignas(2 * COUNT) Rounded {
    bf16 values[COUNT];
};
__device__ __forceinline__ Rounded<4> load_rounded(const Rounded<4>* from) {
    const uint2 words = __ldcg((const uint2*)from);
    return *(const Rounded<4>*)&words;
}
__device__ __forceinline__ Rounded<2> load_rounded(const Rounded<2>* from) {
    const u32 word = __ldcg((const u32*)from);
    return *(const Rounded<2>*)&word;
}

// --- shared memory

// Loads of weights under way at once. More would not come sooner, and whatever the blocks tell each
// other would have to queue behind them: half of the time of a small model's step.
constexpr bool IS_SMALL =
    Cut<O_PROJ>::MOST + Cut<GATE_UP>::MOST + Cut<DOWN>::MOST < 3 * W_STAGES;
#ifndef W_AHEAD
#define W_AHEAD (!IS_SMALL ? 4 : NR == 32 ? 1 : 2)
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
    u32 w, x;                              // data: 1,024-byte aligned
    u32 w_full, w_empty, x_full, x_empty;  // barriers of 8 bytes
    u32 multiplied;                        // [NUM_PHASES]: this block's share
    u32 scaled;                            // that `scale` is gate and up's
    float* scale;                          // [NR]: 1 / RMS of each row
    volatile int* is_late;                 // to ask for anything ahead
};

constexpr int BARRIERS = 2 * (W_STAGES + X_STAGES) + NUM_PHASES + 1;
constexpr int SHARED_BYTES =
    1024 + W_STAGES * W_BYTES + X_STAGES * X_BYTES + BARRIERS * 8 + NR * 4 + 8;

// --- who loads

// Of weights: stages of the ring, one after the other.
struct WeightStream {
    const Shared& s;
    const u64 policy = policy_evict_first();
    Ring ring, landed;

    // Where the next stage's bytes go; its barrier waits for so many.
    __device__ __forceinline__ u32 begin(u32 num_bytes) {
        if ((ring.stage + W_STAGES - landed.stage) % W_STAGES == W_AHEAD) {
            barrier_wait(s.w_full + landed.stage * 8, landed.parity);
            landed.advance(W_STAGES);
        }
        barrier_wait(s.w_empty + ring.stage * 8, ring.parity ^ 1);
        barrier_expect(full(), num_bytes);
        return s.w + ring.stage * W_BYTES;
    }
    __device__ __forceinline__ u32 full() const { return s.w_full + ring.stage * 8; }
    __device__ __forceinline__ void end() { ring.advance(W_STAGES); }

    template <int PHASE>
    __device__ __forceinline__ void stream(const Params& p, int block) {
        if constexpr (PHASE == GATE_UP && GateUp::IS_WHOLE)
            stream_whole(p, block);
        else
            stream_units<PHASE>(p, block);
    }

    template <int PHASE>
    __device__ __forceinline__ void stream_units(const Params& p, int block) {
        using cut = Cut<PHASE>;
        const TensorMap* map = &p.weights[PHASE];
        const int last = cut::begin(block + 1);
        for (int unit = cut::begin(block); unit < last; unit++) {
            const int tile = unit / cut::DEPTH, c = unit % cut::DEPTH * UNIT_C;
            const int row = PHASE == GATE_UP ? tile * 64 : tile * TILE_F;
            // Of gate and up each warpgroup has one, and the same features of it.
            const int other_row = PHASE == GATE_UP ? INTER + row : row + 64;
            const u32 to = begin(W_BYTES);
            load_box(to, map, c, row, full(), policy);
            load_box(to + GROUP_BYTES, map, c, other_row, full(), policy);
            end();
        }
    }

    __device__ __forceinline__ void stream_whole(const Params& p, int block) {
        for (int unit = 0; unit < GateUp::DEPTH; unit++)
            for (int i = 0; i < 2 * GateUp::TILES; i++) {  // gate and up of each
                const int row = i % 2 * INTER + GateUp::begin(block) + i / 2 * GateUp::ROWS;
                const u32 to = begin(GateUp::BYTES);
                load_box(to, &p.weights[GATE_UP], unit * UNIT_C, row, full(), policy);
                end();
            }
    }
};

// Of the context that the attention after this launch reads, what is asked for into the L2 cache:
// between its last weights and the launch's end the memory has nothing else to do. CONTEXT_AHEAD
// pieces of at most 16 KiB a block, CONTEXT_PACE cycles apart, since whatever the blocks tell each
// other queues behind them; every second piece of a row, so that the rest comes from memory
// meanwhile.
constexpr int CONTEXT_AHEAD = 16;
constexpr int CONTEXT_PACE = 600;

// Tokens of a piece: a power of 2, of which a block of the cache has a whole number.
constexpr __device__ int piece_tokens() {
    int tokens = 1;
    while (tokens * 2 * KV_HEADS * HEAD_DIM * 2 <= 16 << 10) tokens *= 2;
    return tokens;
}

// Only old tokens: the newest is being written.
__device__ __forceinline__ void prefetch_context(
    const Params& p, const Shared& s, int block) {
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
        if (*s.is_late) return;  // what the block waits for comes first
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
    const TensorMap* map = PHASE == O_PROJ ? &p.attended
                           : PHASE == DOWN ? &p.activated_map
                                           : &p.normed_map;
    if (PHASE != O_PROJ) grid_wait(input_written(p, PHASE));
    publish_to_copy_engine();
    const auto load = [&](int unit_of_c) {
        const u32 full = s.x_full + ring.stage * 8;
        barrier_wait(s.x_empty + ring.stage * 8, ring.parity ^ 1);
        barrier_expect(full, X_BYTES);
        load_box(s.x + ring.stage * X_BYTES, map, unit_of_c * UNIT_C, 0, full, policy);
        ring.advance(X_STAGES);
    };
    if constexpr (PHASE == GATE_UP && GateUp::IS_WHOLE) {
        for (int unit = 0; unit < GateUp::DEPTH; unit++) load(unit);
    } else {
        using cut = Cut<PHASE>;
        for (int unit = cut::begin(block); unit < cut::begin(block + 1); unit++)
            load(unit % cut::DEPTH);
    }
}

// --- who multiplies

// Of a warp: barriers of stages that its products under way read; 0: none.
struct InUse {
    u32 w = 0, x = 0;

    __device__ __forceinline__ void release(int lane) const {
        if (lane != 0) return;
        if (w != 0) barrier_arrive(w);
        if (x != 0) barrier_arrive(x);
    }
};

struct Multiplier {
    const Shared& s;
    const int thread;
    Ring w_ring, x_ring;

    __device__ __forceinline__ int lane() const { return thread % 32; }
    __device__ __forceinline__ int group() const { return thread / 128; }
    __device__ __forceinline__ u32 weights(const Ring& ring) const {
        barrier_wait(s.w_full + ring.stage * 8, ring.parity);
        return s.w + ring.stage * W_BYTES;
    }
    __device__ __forceinline__ u32 inputs(const Ring& ring) const {
        barrier_wait(s.x_full + ring.stage * 8, ring.parity);
        return s.x + ring.stage * X_BYTES;
    }
    __device__ __forceinline__ u32 w_empty() const { return s.w_empty + w_ring.stage * 8; }
    __device__ __forceinline__ u32 x_empty() const { return s.x_empty + x_ring.stage * 8; }

    // sums += 64 features, whose weights begin at w, of one unit of C.
    static __device__ __forceinline__ void multiply_unit(float (&sums)[NR / 2], u32 w, u32 x) {
        const u64 a = descriptor(w), b = descriptor(x);
#pragma unroll
        for (int k = 0; k < UNIT_C / 16; k++) multiply(sums, a + 2 * k, b + 2 * k);  // 32 bytes on
    }

    // The products that were begun now are the last under way: what those before read is free.
    __device__ __forceinline__ void commit(InUse& before, const InUse& now) {
        multiply_commit();
        multiply_wait_but_last();
        before.release(lane());
        before = now;
    }

    // This block's share of a product.
    template <int PHASE>
    __device__ __forceinline__ void run(const Params& p, int block) {
        if constexpr (PHASE == GATE_UP && GateUp::IS_WHOLE)
            multiply_whole(p, block);
        else
            multiply_units<PHASE>(p, block);
    }
    template <int PHASE>
    __device__ __forceinline__ void multiply_units(const Params& p, int block);
    __device__ __forceinline__ void multiply_whole(const Params& p, int block);
};

// This block's part of a tile, into `partials`.
template <int PHASE>
__device__ __forceinline__ void put_parts(
    const Params& p, const float (&sums)[NR / 2], int tile, int block, int thread) {
    using cut = Cut<PHASE>;
    const int lane = thread % 32, group = thread / 128;
    const int part = block - cut::owner(tile * cut::DEPTH);
    const int column = lane % 4 * 2;
    float* to = p.partials + (long long)(tile * cut::MAX_PARTS + part) * SLOT;
    to += column * TILE_F + group * 64 + thread % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < NR / 4; j++) {
        const int row = j / 2 * 8 + j % 2;
        if (row + column >= p.num_rows) continue;  // nobody would read it, and clear its place
        put_part(to + row * TILE_F, sums[j / 2 * 4 + j % 2]);
        put_part(to + row * TILE_F + 8, sums[j / 2 * 4 + 2 + j % 2]);
    }
}

template <int PHASE>
__device__ __forceinline__ void Multiplier::multiply_units(const Params& p, int block) {
    using cut = Cut<PHASE>;
    const int end = cut::begin(block + 1);
    for (int unit = cut::begin(block); unit < end;) {
        const int tile = unit / cut::DEPTH;
        const int stop = min(end, (tile + 1) * cut::DEPTH);
        float sums[NR / 2];
#pragma unroll
        for (int i = 0; i < NR / 2; i++) sums[i] = 0.0f;
        InUse in_use;
        for (; unit < stop; unit++) {
            const u32 w = weights(w_ring) + group() * GROUP_BYTES, x = inputs(x_ring);
            multiply_begin();
            multiply_unit(sums, w, x);
            commit(in_use, {w_empty(), x_empty()});
            w_ring.advance(W_STAGES);
            x_ring.advance(X_STAGES);
        }
        multiply_wait(sums);
        in_use.release(lane());
        put_parts<PHASE>(p, sums, tile, block, thread);
    }
    if (lane() == 0) barrier_arrive(s.multiplied + PHASE * 8);
}

__device__ __forceinline__ bf16 silu_times(float gate, float up, float scale) {
    // Rounded as they are where they are stored between two kernels.
    const float g = to_float(to_bf16(gate * scale)), u = to_float(to_bf16(up * scale));
    return to_bf16(g / (1.0f + __expf(-g)) * u);
}

// SiLU of gate, times up, of features from `first` on, num_features of them, of this thread's 64.
__device__ __forceinline__ void activate(
    const Params& p, const Shared& s, const float (&gate)[NR / 2], const float (&up)[NR / 2],
    int first, int num_features, int thread) {
    const int lane = thread % 32;
#pragma unroll
    for (int j = 0; j < NR / 8; j++) {
        // The scales of rows that are not there are zeros.
        const float scale[2] = {s.scale[j * 8 + lane % 4 * 2], s.scale[j * 8 + lane % 4 * 2 + 1]};
        const int n = j * 8 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = j * 4 + half * 2;
            const u32 pair = silu_times(gate[i], up[i], scale[0]) |
                             (u32)silu_times(gate[i + 1], up[i + 1], scale[1]) << 16;
            const u32 two_features = transposed(pair);  // of one row, not of two
            const int f = thread % 128 / 32 * 16 + half * 8 + lane % 4 * 2;
            if (n < p.num_rows && f < num_features)
                *(u32*)(p.activated + n * INTER + first + f) = two_features;
        }
    }
}

// Of this block's gate and up: a warpgroup has 64 features of each tile.
__device__ __forceinline__ void Multiplier::multiply_whole(const Params& p, int block) {
    constexpr int COUNT = 2 * GateUp::TILES;
    float sums[COUNT][NR / 2];
#pragma unroll
    for (int i = 0; i < COUNT; i++)
#pragma unroll
        for (int j = 0; j < NR / 2; j++) sums[i][j] = 0.0f;
    InUse in_use;
    for (int unit = 0; unit < GateUp::DEPTH; unit++) {
        const u32 x = inputs(x_ring);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            // Rows past the features' end multiply what else is there: nobody reads their sums.
            const u32 w = weights(w_ring) + group() * GROUP_BYTES;
            multiply_begin();
            multiply_unit(sums[i], w, x);
            commit(in_use, {w_empty(), i + 1 == COUNT ? x_empty() : 0});
            w_ring.advance(W_STAGES);
        }
        x_ring.advance(X_STAGES);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) multiply_wait(sums[i]);
    in_use.release(lane());

    barrier_wait(s.scaled, 0);
    const int first = GateUp::begin(block), end = GateUp::begin(block + 1);
#pragma unroll
    for (int tile = 0; tile < GateUp::TILES; tile++) {
        const int begin = first + tile * GateUp::ROWS, stop = min(begin + GateUp::ROWS, end);
        const int of_group = begin + group() * 64;
        activate(p, s, sums[2 * tile], sums[2 * tile + 1], of_group, stop - of_group, thread);
    }
    publish_to_copy_engine();
    multipliers_meet();
    if (thread == 0) grid_arrive(input_written(p, DOWN));
}

// --- who adds up

// Until this block's multipliers have had all of a product, which they begin when all blocks have
// written its input. Before DOWN's parts that is more than a saving of looks: places of GATE_UP's
// parts that another block has yet to add up are not EMPTY, and would pass for DOWN's. It also
// keeps `normed`, `squares` and `scale` until the last of this block has read them.
__device__ __forceinline__ void wait_for_products(const Shared& s, int phase) {
    barrier_wait(s.multiplied + phase * 8, 0);
}

// Of a value in each of LANES lanes: to all of them, and always in the same order.
template <int LANES = 32>
__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// s.scale = 1 / RMS of each row of the residual, when PHASE's input is there; 0 of rows that are
// not.
template <int PHASE>
__device__ __forceinline__ void take_scales(const Params& p, const Shared& s, int thread) {
    constexpr int PIECES = HIDDEN / PIECE, LOADS = (PIECES + 31) / 32;
    constexpr int ROWS = (NR + WARPS - 1) / WARPS;
    const int lane = thread % 32;
    if (thread == 0) grid_wait(input_written(p, PHASE));
    adders_meet();
    float squares[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int n = thread / 32 + i * WARPS;
        squares[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            if (n < p.num_rows && j * 32 + lane < PIECES)
                squares[i] += __ldcg(p.squares + n * PIECES + j * 32 + lane);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float scale = rsqrtf(add_lanes(squares[i]) / HIDDEN + p.eps);
        const int n = thread / 32 + i * WARPS;
        if (lane == 0 && n < NR) s.scale[n] = n < p.num_rows ? scale : 0.0f;
    }
    adders_meet();
}

// What stands in COUNT places of partial sums, as bits and as floats.
template <int COUNT>
struct VectorOf;
template <>
struct VectorOf<2> {
    using Bits = uint2;
    using Sum = float2;
};
template <>
struct VectorOf<4> {
    using Bits = uint4;
    using Sum = float4;
};

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
__device__ __forceinline__ void unpack(float (&to)[2], float2 from) {
    to[0] = from.x, to[1] = from.y;
}
__device__ __forceinline__ void unpack(float (&to)[4], float4 from) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// sums[i] = the sum over a tile's parts [MAX_PARTS, NR, TILE_F], in their order, of what stands at
// offsets[i]. Looks for all that is missing at once, as long as something is, and clears the
// places: no two lanes may want the same. Zeros for a lane that wants none.
template <int PHASE, typename Bits, typename Sum, int COUNT>
__device__ __forceinline__ void add_parts(
    Sum (&sums)[COUNT], const Params& p, int tile, const int (&offsets)[COUNT],
    bool is_wanted = true) {
    using cut = Cut<PHASE>;
    float* from = p.partials + (long long)tile * cut::MAX_PARTS * SLOT;
    const int num_parts = is_wanted ? cut::parts(tile) : 0;
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

// A warp's place in a loop over items: few items are spread over all blocks.
__device__ __forceinline__ int first_item(int block, int thread) {
    return thread / 32 * GRID + block;
}

// residual += the product (of phase FROM; NUM_PHASES: residual = the embeddings), and its sums of
// squares; `normed` gets it times the norm's weight. A warp takes the same piece of one row, or of
// two. `prepare` loads what is there before the product is.
template <int FROM>
struct AddToResidual {
    // Features of a lane: fewer where it has many parts of each to hold.
    static constexpr int COUNT = ARE_PARTS_FEW ? 4 : 2;
    static constexpr int LANES = PIECE / COUNT, ROWS = 32 / LANES;
    static constexpr int PIECES = HIDDEN / PIECE;
    using Values = Rounded<COUNT>;
    using Vector = VectorOf<COUNT>;
    Values before, weights;

    __device__ __forceinline__ static int num_items(const Params& p) {
        return PIECES * ((p.num_rows + ROWS - 1) / ROWS);
    }
    __device__ __forceinline__ static int row_of(int item, int lane) {
        return item / PIECES * ROWS + lane / LANES;
    }
    __device__ __forceinline__ static int feature(int item, int lane) {
        return item % PIECES * PIECE + lane % LANES * COUNT;
    }

    __device__ __forceinline__ void prepare(const Params& p, int item, int lane) {
        const int n = row_of(item, lane), f = feature(item, lane);
        if (n >= p.num_rows) return;
        const bf16* from = FROM == NUM_PHASES ? p.embedding + p.token_ids[n] * HIDDEN
                                              : p.residual + n * HIDDEN;
        before = load_rounded((const Values*)(from + f));
        weights = load_rounded((const Values*)((FROM == O_PROJ ? p.post_norm : p.next_norm) + f));
    }

    __device__ __forceinline__ void run(const Params& p, int block, int thread) {
        const int lane = thread % 32;
        int item = first_item(block, thread);
        while (item < num_items(p)) {
            const int n = row_of(item, lane), f = feature(item, lane);
            const bool is_there = n < p.num_rows;
            typename Vector::Sum added[1] = {};
            if constexpr (FROM != NUM_PHASES)
                add_parts<FROM, typename Vector::Bits>(
                    added, p, f / TILE_F, {n * TILE_F + f % TILE_F}, is_there);
            alignas(16) float unscaled[COUNT];
            float sums[COUNT], square = 0.0f;
            unpack(sums, added[0]);
            Values after, normed;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const float total = to_float(before.values[i]) + sums[i];
                square += total * total;
                unscaled[i] = total * to_float(weights.values[i]);
                after.values[i] = to_bf16(total);
                normed.values[i] = to_bf16(unscaled[i]);
            }
            square = add_lanes<LANES>(square);
            if (is_there) {
                *(Values*)(p.residual + n * HIDDEN + f) = after;
                if (p.is_last && FROM == DOWN)
                    *(typename Vector::Sum*)(p.unscaled + n * HIDDEN + f) =
                        *(const typename Vector::Sum*)unscaled;
                else
                    *(Values*)(p.normed + n * HIDDEN + f) = normed;
                if (lane % LANES == 0) p.squares[n * PIECES + f / PIECE] = square;
            }
            item += WARPS * GRID;
            prepare(p, item, lane);
        }
    }
};

// Rows of which half a warp takes 64 features of gate and up, if they come in parts: so many that
// each warp has them at most once, and waits once for what comes from other blocks.
constexpr __device__ int rows_to_activate() {
    int rows = 1;
    while (4 * rows <= NR && INTER / 64 * (NR / (2 * rows)) > WARPS * GRID) rows *= 2;
    return Cut<GATE_UP>::MAX_PARTS * rows <= 6 ? rows : 1;
}

__device__ __forceinline__ void activate_parts(
    const Params& p, const Shared& s, int block, int thread) {
    constexpr int ROWS = rows_to_activate();
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
            *(Rounded<4>*)(p.activated + n * INTER + tile * 64 + f) = {
                {silu_times(gate.x, up.x, scale), silu_times(gate.y, up.y, scale),
                 silu_times(gate.z, up.z, scale), silu_times(gate.w, up.w, scale)}};
        }
    }
}

// q/k norm, RoPE, q out, k and v into the cache. Half a warp takes a head of a row, a lane PAIRS
// pairs of dimensions that turn together. `prepare` loads what is there before the product is.
struct RotateAndCache {
    static constexpr int LANES = 16, PAIRS = HEAD_DIM / 2 / LANES, HALF = HEAD_DIM / 2;
    using Values = Rounded<PAIRS>;
    using Vector = VectorOf<PAIRS>;
    bf16* to;
    float cosines[PAIRS], sines[PAIRS], biases[2][PAIRS], weights[2][PAIRS];

    __device__ __forceinline__ static int row_pairs(const Params& p) {
        return (p.num_rows + 1) / 2;
    }
    __device__ __forceinline__ static int num_items(const Params& p) {
        return (HEADS + 2 * KV_HEADS) * row_pairs(p);
    }
    __device__ __forceinline__ static int row_of(const Params& p, int item, int lane) {
        return item % row_pairs(p) * 2 + lane / LANES;
    }

    __device__ __forceinline__ void prepare(const Params& p, int item, int lane) {
        const int n = row_of(p, item, lane), head = item / row_pairs(p);
        const int d = lane % LANES * PAIRS;
        if (item >= num_items(p) || n >= p.num_rows) return;
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
        to += d;
    }

    __device__ __forceinline__ void run(
        const Params& p, const Shared& s, int block, int thread) {
        const int lane = thread % 32;
        int item = first_item(block, thread);
        while (item < num_items(p)) {
            const int n = row_of(p, item, lane), f = item / row_pairs(p) * HEAD_DIM;
            const bool is_there = n < p.num_rows;
            const int offset = n * TILE_F + f % TILE_F + lane % LANES * PAIRS;
            typename Vector::Sum sums[2];
            add_parts<QKV, typename Vector::Bits>(
                sums, p, f / TILE_F, {offset, offset + HALF}, is_there);
            float x[PAIRS], y[PAIRS];
            unpack(x, sums[0]);
            unpack(y, sums[1]);
            const float scale = is_there ? s.scale[n] : 0.0f;
            float square = 0.0f;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                x[i] = x[i] * scale + biases[0][i];
                y[i] = y[i] * scale + biases[1][i];
                square += x[i] * x[i] + y[i] * y[i];
            }
            if (f < (HEADS + KV_HEADS) * HEAD_DIM) {
                float head_scale = 1.0f;
                if (p.q_norm) head_scale = rsqrtf(add_lanes<LANES>(square) / HEAD_DIM + p.eps);
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    const float a = x[i] * head_scale * weights[0][i];
                    const float b = y[i] * head_scale * weights[1][i];
                    x[i] = a * cosines[i] - b * sines[i];
                    y[i] = b * cosines[i] + a * sines[i];
                }
            }
            if (is_there) {
                Values first, second;
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
                    first.values[i] = to_bf16(x[i]);
                    second.values[i] = to_bf16(y[i]);
                }
                *(Values*)to = first;
                *(Values*)(to + HALF) = second;
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
    adders_meet();
    if (thread == 0) grid_arrive(input_written(p, PHASE));
}

// FROM's products, into the residual, the input of the phase after it.
template <int FROM>
__device__ __forceinline__ void add_to_residual(
    const Params& p, const Shared& s, int block, int thread) {
    AddToResidual<FROM> add;
    add.prepare(p, first_item(block, thread), thread % 32);
    if constexpr (FROM != NUM_PHASES) wait_for_products(s, FROM);
    add.run(p, block, thread);
    give_input<FROM == O_PROJ ? GATE_UP : QKV>(p, thread);
}

// The last norm's division, for the head. Each thread reads what it wrote itself.
__device__ __forceinline__ void finish(const Params& p, const Shared& s, int block, int thread) {
    using Added = AddToResidual<DOWN>;
    const int lane = thread % 32;
    take_scales<QKV>(p, s, thread);
    for (int item = first_item(block, thread); item < Added::num_items(p); item += WARPS * GRID) {
        const int n = Added::row_of(item, lane), f = Added::feature(item, lane);
        if (n >= p.num_rows) continue;
        Added::Values hidden;
#pragma unroll
        for (int i = 0; i < Added::COUNT; i++)
            hidden.values[i] = to_bf16(p.unscaled[n * HIDDEN + f + i] * s.scale[n]);
        *(Added::Values*)(p.hidden + n * HIDDEN + f) = hidden;
    }
}

extern "C" __constant__ int shared_bytes = SHARED_BYTES;
extern "C" __constant__ int decode_chain_threads = THREADS;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
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
    s.multiplied = s.x_empty + X_STAGES * 8;
    s.scaled = s.multiplied + NUM_PHASES * 8;
    const auto pointer = [&](u32 address) { return dynamic + (address - shared_address(dynamic)); };
    s.scale = (float*)pointer(s.scaled + 8);
    s.is_late = (volatile int*)pointer(s.scaled + 8 + NR * 4);
    if (thread == 0) {
        for (int i = 0; i < W_STAGES; i++) {
            barrier_init(s.w_full + i * 8, 1);
            barrier_init(s.w_empty + i * 8, MULTIPLIER_WARPS);
        }
        for (int i = 0; i < X_STAGES; i++) {
            barrier_init(s.x_full + i * 8, 1);
            barrier_init(s.x_empty + i * 8, MULTIPLIER_WARPS);
        }
        for (int i = 0; i < NUM_PHASES; i++) barrier_init(s.multiplied + i * 8, MULTIPLIER_WARPS);
        barrier_init(s.scaled, 1);
        *s.is_late = false;
        publish_barriers();
    }
    __syncthreads();

    const bool has_rest = p.first_phase <= O_PROJ, has_start = p.last_phase >= QKV;
    if (thread == LOADERS) {  // weights: no kernel writes them, so no wait for the one before
        WeightStream weights{s};
        if (has_rest) {
            weights.stream<O_PROJ>(p, block);
            weights.stream<GATE_UP>(p, block);
            weights.stream<DOWN>(p, block);
        }
        if (has_start) {
            weights.stream<QKV>(p, block);
            prefetch_context(p, s, block);
        }
        return;
    }
    if (thread > LOADERS && thread != LOADERS + 32) return;
    wait_for_kernel_before();
    if (thread == LOADERS + 32) {
        const u64 policy = policy_evict_last();
        Ring ring;
        if (has_rest) {
            stream_inputs<O_PROJ>(p, s, ring, block, policy);
            stream_inputs<GATE_UP>(p, s, ring, block, policy);
            stream_inputs<DOWN>(p, s, ring, block, policy);
        }
        if (has_start) stream_inputs<QKV>(p, s, ring, block, policy);
        return;
    }
    if (thread < MULTIPLIERS) {
        Multiplier multiplier{s, thread};
        if (has_rest) {
            multiplier.run<O_PROJ>(p, block);
            multiplier.run<GATE_UP>(p, block);
            multiplier.run<DOWN>(p, block);
        }
        let_next_kernel_start();
        if (has_start) multiplier.run<QKV>(p, block);
        return;
    }

    const int adder = thread - MULTIPLIERS;
    if (p.is_first) add_to_residual<NUM_PHASES>(p, s, block, adder);
    if (has_rest) {
        add_to_residual<O_PROJ>(p, s, block, adder);
        take_scales<GATE_UP>(p, s, adder);
        if constexpr (GateUp::IS_WHOLE) {
            if (adder == 0) barrier_arrive(s.scaled);
        } else {
            wait_for_products(s, GATE_UP);
            activate_parts(p, s, block, adder);
            give_input<DOWN>(p, adder);
        }
        add_to_residual<DOWN>(p, s, block, adder);
    }
    if (has_start) {
        RotateAndCache rotate;
        rotate.prepare(p, first_item(block, adder), adder % 32);
        take_scales<QKV>(p, s, adder);
        wait_for_products(s, QKV);
        if (adder == 0) *s.is_late = true;
        rotate.run(p, s, block, adder);
    }
    if (p.is_last) finish(p, s, block, adder);
}
