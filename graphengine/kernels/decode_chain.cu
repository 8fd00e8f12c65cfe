// All layers of a decode step of few rows in one launch that never leaves the multiprocessors:
// embedding, norms, qkv, q/k norm, RoPE, KV cache, attention, o_proj, gate and up, SiLU, down. See
// decode_chain.py for what it computes and when it is used.
//
// A product of few rows is bound by the reading of its weights, attention by that of keys and
// values; what a kernel of its own loses is its start and its drain. Here one warp of every block
// does nothing but stream weights, keys and values into a ring of shared memory, through all
// layers: while the blocks wait for each other what comes next keeps coming.
//
// A product [N, C] x [F, C] is cut into units of 128 features by 64 of C, and every block takes an
// equal, contiguous share of the units in feature-major order. So the features of a tile may be
// summed by several blocks, each over its part of C; the parts are written out in float32 and added
// in their order. Attention is cut into chunks of CHUNK_TILES tiles of 64 tokens of a row and kv
// head; a chunk's softmax is its own, and those of a row are put together in their order
// (Flash-Decoding, 2023). Neither cut depends on N: no bit of a row's result does.
//
// Who adds parts waits for each by looking at its place, which is EMPTY until the part is there and
// again when it was read: no fence, no counter. What the copy engine reads is counted. Since blocks
// wait for each other all must be resident: the grid is one block a multiprocessor.
// PTX ISA 8: mbarrier, cp.async.bulk.tensor, wgmma; the layout of wgmma's accumulators and of its
// shared-memory descriptors is from there.
//
// Set when compiled: NR (rows, padded: 8, 16, 32 or 64), GRID, HIDDEN, INTER, HEADS, KV_HEADS,
// NUM_LAYERS, CHUNK_TILES, MAX_CHUNKS (of a row). HEAD_DIM is 128.
// Letters: N rows, F output features, C input features.

#include <hopper.cuh>

constexpr int TILE_F = 128;
constexpr int UNIT_C = 64;
constexpr int W_BYTES = TILE_F * UNIT_C * 2;
constexpr int X_BYTES = NR * UNIT_C * 2;
constexpr int X_STAGES = 8;
constexpr int W_STAGES = NR == 64 ? 9 : NR == 32 ? 11 : NR == 16 ? 12 : 13;
constexpr int HEAD_DIM = 128;
constexpr int CONSUMERS = 256;  // two warpgroups, 64 features of a tile each
constexpr int WARPS = CONSUMERS / 32;
constexpr int COUNTER_STRIDE = 32;  // a 128-byte line each
constexpr int SLOT = TILE_F * NR;   // floats of one partial sum

// Of attention: query heads a kv head (8 at most, the least columns of wgmma), the same as they are
// stored, and the floats of a chunk's result: of each quarter of the dimensions
// [HEAD_DIM / 4, GROUP_STORED], then maxima and masses.
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int GROUP_STORED = GROUP <= 1 ? 1 : GROUP <= 2 ? 2 : GROUP <= 4 ? 4 : 8;
constexpr int TILE_T = 64;
constexpr int QUARTER = (HEAD_DIM / 4 + 2) * GROUP_STORED;
constexpr int CHUNK_FLOATS = 4 * QUARTER;

enum Phase { O_PROJ, GATE_UP, DOWN, QKV, NUM_PHASES };
// What is counted of a layer, beside the inputs of its products: its queries, keys and values.
constexpr int ATTENTION = NUM_PHASES, NUM_COUNTERS = NUM_PHASES + 1;

struct Layer {
    TensorMap weights[NUM_PHASES];
    TensorMap keys, values;  // [slots, KV_HEADS * HEAD_DIM]
    const bf16* input_norm;
    const bf16* post_norm;
    const bf16* qkv_bias;  // or null, as are the two below
    const bf16* q_norm;
    const bf16* k_norm;
    bf16* k_cache;
    bf16* v_cache;
    long long unused;
};

struct Params {
    TensorMap attended_map, normed_map, activated_map;
    const Layer* layers;
    float* partials;  // EMPTY everywhere, before and after
    float* chunks;    // likewise; [NR, MAX_CHUNKS, KV_HEADS, CHUNK_FLOATS]
    float* squares;   // [NR, HIDDEN / TILE_F]: sums of squares of the residual
    u32* counters;    // zeros; [NUM_LAYERS + 1, NUM_COUNTERS, COUNTER_STRIDE]
    bf16* residual;   // [NR, HIDDEN]
    bf16* normed;     // [NR, HIDDEN]: residual times norm weight, not yet divided by its RMS
    bf16* activated;  // [NR, INTER]
    bf16* q;          // [NR, HEADS, HEAD_DIM]
    bf16* attended;   // [NR, HEADS, HEAD_DIM]
    float* unscaled;  // [NR, HIDDEN]: `normed` in float32, of the last norm
    bf16* hidden;     // [N, HIDDEN]: the output of the last norm
    const bf16* last_norm;
    const long long* slots;
    const long long* positions;
    const int* context_lens;
    const int* block_tables;
    const float* cos_sin;
    const long long* token_ids;
    const bf16* embedding;
    long long tables_stride, slot_stride;  // of a cache's slot: its blocks are dense
    float eps, softmax_scale;              // the latter times log2(e)
    int num_rows, block_size;
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

// turn: 0 is the first layer's qkv alone, turn i + 1 the rest of layer i and the next one's qkv.
__device__ __forceinline__ u32* counter(const Params& p, int turn, int what) {
    return p.counters + (turn * NUM_COUNTERS + what) * COUNTER_STRIDE;
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

// Where a chunk's result is put.
__device__ __forceinline__ float* chunk_place(const Params& p, int n, int chunk, int head) {
    return p.chunks + (long long)((n * MAX_CHUNKS + chunk) * KV_HEADS + head) * CHUNK_FLOATS;
}

// A dimension of the GROUP heads of a kv head.
__device__ __forceinline__ void look_at_group(u32 (&words)[GROUP], const float* from) {
    if constexpr (GROUP_STORED == 1) {
        words[0] = look_at((const uint1*)from).x;
    } else if constexpr (GROUP_STORED == 2) {
        const uint2 v = look_at((const uint2*)from);
        words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < GROUP_STORED; i += 4) {
            const uint4 v = look_at((const uint4*)(from + i));
            const u32 all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j < GROUP) words[i + j] = all[j];
        }
    }
}

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

// All addresses follow from one, which is kept in a register.
struct Chunk;
struct Shared {
    char* base;  // 1,024-byte aligned
    u32 w;       // the same, as an address of shared memory: weights, keys and values

    static constexpr u32 X = W_STAGES * W_BYTES;
    static constexpr u32 ATTENTION = X + X_STAGES * X_BYTES;  // [2, 3072]: queries, weights
    static constexpr u32 W_FULL = ATTENTION + 2 * 3072;       // barriers of 8 bytes
    static constexpr u32 W_EMPTY = W_FULL + W_STAGES * 8;
    static constexpr u32 X_FULL = W_EMPTY + W_STAGES * 8;
    static constexpr u32 X_EMPTY = X_FULL + X_STAGES * 8;
    static constexpr u32 SCALE = X_EMPTY + X_STAGES * 8;
    static constexpr u32 MAXIMA = SCALE + NR * 4;
    static constexpr u32 LENS = MAXIMA + 64 * 4;
    static constexpr u32 TILES = LENS + NR * 4;
    static constexpr u32 FIRST_CHUNK = TILES + (NR + 1) * 4;
    static constexpr u32 END = FIRST_CHUNK + 7 * 4;

    __device__ __forceinline__ u32 x() const { return w + X; }
    __device__ __forceinline__ u32 attention() const { return w + ATTENTION; }
    __device__ __forceinline__ u32 w_full() const { return w + W_FULL; }
    __device__ __forceinline__ u32 w_empty() const { return w + W_EMPTY; }
    __device__ __forceinline__ u32 x_full() const { return w + X_FULL; }
    __device__ __forceinline__ u32 x_empty() const { return w + X_EMPTY; }
    // [NR]: 1 / RMS of each row.
    __device__ __forceinline__ float* scale() const { return (float*)(base + SCALE); }
    // [2, 4, 8]: of a warp and head.
    __device__ __forceinline__ float* maxima() const { return (float*)(base + MAXIMA); }
    // [NR]: context lengths, 0 past the end.
    __device__ __forceinline__ int* lens() const { return (int*)(base + LENS); }
    // This block's in every layer.
    __device__ __forceinline__ Chunk* first_chunk() const { return (Chunk*)(base + FIRST_CHUNK); }
    // [NR + 1]: tiles of the rows before.
    __device__ __forceinline__ int* tiles() const { return (int*)(base + TILES); }
};

constexpr int SHARED_BYTES = 1024 + Shared::END;

// A chunk of attention. Chunks are in order of rows, then of their places in the row, then of kv
// heads: neighbours read neighbouring memory. Of all their tiles, laid end to end, each block takes
// the chunks whose middle is in its equal share.
struct Chunk {
    int row, head, first_tile, num_tiles, before, block, total;

    // The tiles of all rows and kv heads before it are `before`, of all that there are `total`.
    __device__ __forceinline__ int owner() const {
        return (int)((long long)(2 * before + num_tiles) * GRID / (2 * total));
    }
    __device__ __forceinline__ bool is_ours() const { return before < total && owner() == block; }

    __device__ __forceinline__ void take_place(const Shared& s, int first) {
        first_tile = first;
        num_tiles = min(CHUNK_TILES, s.tiles()[row + 1] - s.tiles()[row] - first);
        before = KV_HEADS * (s.tiles()[row] + first) + head * num_tiles;
    }

    __device__ __forceinline__ Chunk next(const Shared& s) const {
        Chunk chunk = *this;
        if (++chunk.head < KV_HEADS) {
            chunk.before += num_tiles;
            return chunk;
        }
        chunk.head = 0;
        if (first_tile + num_tiles < s.tiles()[row + 1] - s.tiles()[row]) {
            chunk.take_place(s, first_tile + CHUNK_TILES);
        } else if (before + num_tiles < total) {
            chunk.row++;
            chunk.take_place(s, 0);
        } else {
            chunk.before = total;
        }
        return chunk;
    }

    // The first of a block's; one past the end if it has none.
    __device__ __forceinline__ static Chunk first(const Shared& s, int num_rows, int block) {
        Chunk chunk;
        chunk.block = block;
        chunk.total = KV_HEADS * s.tiles()[num_rows];
        const int target = (int)((long long)block * chunk.total / GRID);
        chunk.row = 0;
        while (chunk.row + 1 < num_rows && KV_HEADS * s.tiles()[chunk.row + 1] <= target) chunk.row++;
        const int in_row = target / KV_HEADS - s.tiles()[chunk.row];
        chunk.head = 0;
        chunk.take_place(s, in_row / CHUNK_TILES * CHUNK_TILES);
        // Its middle may be before the share, so that it is another block's.
        while (chunk.before < chunk.total && chunk.owner() < block) chunk = chunk.next(s);
        return chunk;
    }
};

// Two chunks of a block in a row, one for each warpgroup; the second may be none, without tiles.
struct Pair {
    Chunk first, second;
    __device__ __forceinline__ Pair(const Shared& s, const Chunk& chunk)
        : first(chunk), second(chunk.next(s)) {
        if (!second.is_ours()) second.num_tiles = 0;
    }
    __device__ __forceinline__ Chunk of(int group) const { return group == 0 ? first : second; }
};

// --- who loads

// Waits until no more than W_AHEAD loads are under way and the next place is free; its address.
__device__ __forceinline__ u32 next_place(const Shared& s, const Ring& ring, Ring& landed) {
    if ((ring.stage + W_STAGES - landed.stage) % W_STAGES == W_AHEAD) {
        barrier_wait(s.w_full() + landed.stage * 8, landed.parity);
        landed.advance(W_STAGES);
    }
    barrier_wait(s.w_empty() + ring.stage * 8, ring.parity ^ 1);
    barrier_expect(s.w_full() + ring.stage * 8, W_BYTES);
    return s.w + ring.stage * W_BYTES;
}

template <int PHASE>
__device__ __forceinline__ void stream_weights(
    const Layer& layer, const Shared& s, Ring& ring, Ring& landed, int block, u64 policy) {
    using cut = Cut<PHASE>;
    const TensorMap* map = &layer.weights[PHASE];
    const int end = cut::begin(block + 1);
    for (int unit = cut::begin(block); unit < end; unit++) {
        const int tile = unit / cut::DEPTH, c = unit % cut::DEPTH * UNIT_C;
        const int row = PHASE == GATE_UP ? tile * 64 : tile * TILE_F;
        const u32 to = next_place(s, ring, landed), full = s.w_full() + ring.stage * 8;
        load_box(to, map, c, row, full, policy);
        // Of gate and up each warpgroup has one, and the same features of it.
        load_box(to + W_BYTES / 2, map, c, PHASE == GATE_UP ? INTER + row : row + 64, full, policy);
        ring.advance(W_STAGES);
    }
}

// A tile of keys and one of values for each of a block's tiles, those of two chunks in turns. Only
// a row's last tile has the step's own token, for which the block must wait.
__device__ __forceinline__ void stream_keys_values(
    const Params& p, const Layer& layer, const Shared& s, const u32* written, Ring& ring,
    Ring& landed, Chunk chunk, u64 policy) {
    bool has_waited = false;
    while (chunk.is_ours()) {
        const Pair pair(s, chunk);
#pragma unroll 1
        for (int i = 0; i < 2 * CHUNK_TILES; i++) {
            const Chunk at = pair.of(i % 2);
            if (i / 2 >= at.num_tiles) continue;
            const int token = (at.first_tile + i / 2) * TILE_T;
            if (token + TILE_T >= s.lens()[at.row] && !has_waited) {
                grid_wait(written);
                publish_to_copy_engine();
                has_waited = true;
            }
            const int* table = p.block_tables + at.row * p.tables_stride;
            const int slot = table[token / p.block_size] * p.block_size + token % p.block_size;
#pragma unroll
            for (int is_value = 0; is_value < 2; is_value++) {
                const TensorMap* map = is_value ? &layer.values : &layer.keys;
                const u32 to = next_place(s, ring, landed), full = s.w_full() + ring.stage * 8;
                const int column = at.head * HEAD_DIM;
                load_box(to, map, column, slot, full, policy);
                load_box(to + W_BYTES / 2, map, column + 64, slot, full, policy);
                ring.advance(W_STAGES);
            }
        }
        if (pair.second.num_tiles == 0) break;
        chunk = pair.second.next(s);
    }
}

template <int PHASE>
__device__ __forceinline__ void stream_inputs(
    const Params& p, const Shared& s, Ring& ring, int turn, int block, u64 policy) {
    using cut = Cut<PHASE>;
    const TensorMap* map = PHASE == O_PROJ ? &p.attended_map
                           : PHASE == DOWN ? &p.activated_map
                                           : &p.normed_map;
    grid_wait(counter(p, turn, PHASE));
    publish_to_copy_engine();
    const int end = cut::begin(block + 1);
    for (int unit = cut::begin(block); unit < end; unit++) {
        const u32 full = s.x_full() + ring.stage * 8;
        barrier_wait(s.x_empty() + ring.stage * 8, ring.parity ^ 1);
        barrier_expect(full, X_BYTES);
        load_box(s.x() + ring.stage * X_BYTES, map, unit % cut::DEPTH * UNIT_C, 0, full, policy);
        ring.advance(X_STAGES);
    }
}

// --- who computes

// Of a value in each lane: to all lanes, and always in the same order.
__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// 1 / RMS of each row of the residual: the sums of squares are loaded while products run, and each
// warp then puts its rows' scales where all can read them.
struct Scales {
    static constexpr int TILES = HIDDEN / TILE_F, ROWS = NR / WARPS;
    float squares[ROWS];

    // They are older than the inputs that the block has seen by now.
    __device__ __forceinline__ void load(const Params& p, int thread) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const float* from = p.squares + (thread / 32 + i * WARPS) * TILES;
            squares[i] = 0.0f;
#pragma unroll
            for (int tile = thread % 32; tile < TILES; tile += 32) squares[i] += __ldcg(from + tile);
        }
    }

    __device__ __forceinline__ void put(const Params& p, const Shared& s, int thread) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const float scale = rsqrtf(add_lanes(squares[i]) / HIDDEN + p.eps);
            if (thread % 32 == 0) s.scale()[thread / 32 + i * WARPS] = scale;
        }
        consumers_meet();
    }
};

// This block's share of a product, into `partials`.
template <int PHASE>
__device__ __forceinline__ void multiply_units(
    const Params& p, const Shared& s, Ring& w_ring, Ring& x_ring, Scales& scales, int block,
    int thread) {
    using cut = Cut<PHASE>;
    const int lane = thread % 32, group = thread / 128;
    const int end = cut::begin(block + 1);
    if (PHASE == GATE_UP || PHASE == QKV) {
        barrier_wait(s.x_full() + x_ring.stage * 8, x_ring.parity);
        scales.load(p, thread);
    }
    for (int unit = cut::begin(block); unit < end;) {
        const int tile = unit / cut::DEPTH;
        const int stop = min(end, (tile + 1) * cut::DEPTH);
        float sums[NR / 2];
#pragma unroll
        for (int i = 0; i < NR / 2; i++) sums[i] = 0.0f;
        u32 w_used = 0, x_used = 0;
        for (; unit < stop; unit++) {
            barrier_wait(s.w_full() + w_ring.stage * 8, w_ring.parity);
            barrier_wait(s.x_full() + x_ring.stage * 8, x_ring.parity);
            const u64 w = descriptor(s.w + w_ring.stage * W_BYTES + group * (W_BYTES / 2));
            const u64 x = descriptor(s.x() + x_ring.stage * X_BYTES);
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
            w_used = s.w_empty() + w_ring.stage * 8;
            x_used = s.x_empty() + x_ring.stage * 8;
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

// Waits until of each part of a tile something stands at `offset`: the rest is there or about to be.
// Looks at one word a part, since what a whole warp reads again and again keeps others waiting.
template <int PHASE>
__device__ __forceinline__ void wait_for_parts(const Params& p, int tile, int offset, int lane) {
    using cut = Cut<PHASE>;
    static_assert(cut::MAX_PARTS <= 32, "a part for each lane");
    const float* at = p.partials + (long long)(tile * cut::MAX_PARTS + lane) * SLOT + offset;
    bool is_here = lane >= cut::parts(tile);
    while (!__all_sync(~0u, is_here))
        if (!is_here) is_here = is_there(look_at((const uint1*)at));
}

// sums[i] = the sum over a tile's parts [MAX_PARTS, NR, TILE_F], in their order, of what stands at
// offsets[i]. Looks for all that is missing at once, as long as something is, and clears the places.
template <int PHASE, typename Bits, typename Sum, int COUNT>
__device__ __forceinline__ void add_parts(
    Sum (&sums)[COUNT], const Params& p, int tile, const int (&offsets)[COUNT]) {
    using cut = Cut<PHASE>;
    float* from = p.partials + (long long)tile * cut::MAX_PARTS * SLOT;
    const int num_parts = cut::parts(tile);
    // As many loads under way as there are registers for.
    constexpr int WORDS = sizeof(Bits) / 4 * COUNT;
    constexpr int AT_ONCE = cut::MAX_PARTS < 36 / WORDS ? cut::MAX_PARTS : 36 / WORDS;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = {};
#pragma unroll 1
    for (int first = 0; first < num_parts; first += AT_ONCE) {
        Bits parts[AT_ONCE][COUNT];
        bool is_complete;
        do {
            is_complete = true;
#pragma unroll
            for (int part = 0; part < AT_ONCE; part++)
                if (first + part < num_parts)
#pragma unroll
                    for (int i = 0; i < COUNT; i++)
                        parts[part][i] =
                            look_at((const Bits*)(from + (first + part) * SLOT + offsets[i]));
#pragma unroll
            for (int part = 0; part < AT_ONCE; part++)
                if (first + part < num_parts)
#pragma unroll
                    for (int i = 0; i < COUNT; i++) is_complete &= is_there(parts[part][i]);
        } while (!is_complete);
#pragma unroll
        for (int part = 0; part < AT_ONCE; part++) {
            if (first + part >= num_parts) break;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                clear((Bits*)(from + (first + part) * SLOT + offsets[i]));
                add(sums[i], parts[part][i]);
            }
        }
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

    __device__ __forceinline__ void prepare(
        const Params& p, const bf16* norm, int item, int lane) {
        if (item >= TILES * p.num_rows) return;
        const int n = item / TILES, f = item % TILES * TILE_F + lane * 4;
        const bf16* from = FROM == NUM_PHASES ? p.embedding + p.token_ids[n] * HIDDEN
                                              : p.residual + n * HIDDEN;
        before = load_four((const Four*)(from + f));
        weights = load_four((const Four*)(norm + f));
    }

    __device__ __forceinline__ void run(
        const Params& p, const bf16* norm, bool is_last, int block, int thread) {
        const int lane = thread % 32;
        int item = first_item(block, thread);
        while (item < TILES * p.num_rows) {
            const int n = item / TILES, tile = item % TILES, f = tile * TILE_F + lane * 4;
            float4 sum[1] = {};
            if constexpr (FROM != NUM_PHASES) {
                wait_for_parts<FROM>(p, tile, n * TILE_F + TILE_F - 1, lane);
                add_parts<FROM, uint4>(sum, p, tile, {n * TILE_F + lane * 4});
            }
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
            if (is_last && FROM == DOWN) {
                *(float4*)(p.unscaled + n * HIDDEN + f) =
                    make_float4(unscaled[0], unscaled[1], unscaled[2], unscaled[3]);
            } else {
                *(Four*)(p.normed + n * HIDDEN + f) = normed;
            }
            const float square = add_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
            if (lane == 0) p.squares[n * TILES + tile] = square;
            item += WARPS * GRID;
            prepare(p, norm, item, lane);
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
        if (first - half >= p.num_rows) continue;
        wait_for_parts<GATE_UP>(p, tile, (first - half) * TILE_F + TILE_F - 1, lane);
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
            const float scale = s.scale()[n];
            *(Four*)(p.activated + n * INTER + tile * 64 + f) = {
                {silu_times(gate.x, up.x, scale), silu_times(gate.y, up.y, scale),
                 silu_times(gate.z, up.z, scale), silu_times(gate.w, up.w, scale)}};
        }
    }
}

// q/k norm, RoPE, q out, k and v into the cache. A warp takes a head of a row, a lane two pairs of
// dimensions that turn together. `prepare` loads what is there before the product is.
struct RotateAndCache {
    static constexpr int HALF = HEAD_DIM / 2;
    bf16* to;
    float cosines[2], sines[2], biases[2][2], weights[2][2];

    __device__ __forceinline__ static int num_items(const Params& p) {
        return (HEADS + 2 * KV_HEADS) * p.num_rows;
    }

    __device__ __forceinline__ void prepare(
        const Params& p, const Layer& layer, int item, int lane) {
        if (item >= num_items(p)) return;
        const int n = item % p.num_rows, head = item / p.num_rows, d = lane * 2;
        const bool is_q = head < HEADS, is_k = !is_q && head < HEADS + KV_HEADS;
        const float* cos = p.cos_sin + p.positions[n] * HEAD_DIM + d;
        const bf16* weight = is_q ? layer.q_norm : is_k ? layer.k_norm : nullptr;
        const bf16* bias = layer.qkv_bias;
        if (bias) bias += head * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            cosines[i] = cos[i];
            sines[i] = cos[HALF + i];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = half * HALF + d + i;
                weights[half][i] = weight ? to_float(weight[dim]) : 1.0f;
                biases[half][i] = bias ? to_float(bias[dim]) : 0.0f;
            }
        }
        to = is_q ? p.q + (n * HEADS + head) * HEAD_DIM
                  : (is_k ? layer.k_cache + (head - HEADS) * HEAD_DIM
                          : layer.v_cache + (head - HEADS - KV_HEADS) * HEAD_DIM) +
                        p.slots[n] * p.slot_stride;
    }

    __device__ __forceinline__ void run(
        const Params& p, const Layer& layer, const Shared& s, int block, int thread) {
        const int lane = thread % 32, d = lane * 2;
        int item = first_item(block, thread);
        while (item < num_items(p)) {
            const int n = item % p.num_rows, head = item / p.num_rows;
            const int offset = n * TILE_F + d;  // a tile is a head
            float2 sums[2];
            wait_for_parts<QKV>(p, head, n * TILE_F + TILE_F - 1, lane);
            add_parts<QKV, uint2>(sums, p, head, {offset, offset + HALF});
            float x[2] = {sums[0].x, sums[0].y}, y[2] = {sums[1].x, sums[1].y};
            const float scale = s.scale()[n];
            float square = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                x[i] = x[i] * scale + biases[0][i];
                y[i] = y[i] * scale + biases[1][i];
                square += x[i] * x[i] + y[i] * y[i];
            }
            if (head < HEADS + KV_HEADS) {
                float head_scale = 1.0f;
                if (layer.q_norm) head_scale = rsqrtf(add_lanes(square) / HEAD_DIM + p.eps);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float a = x[i] * head_scale * weights[0][i];
                    const float b = y[i] * head_scale * weights[1][i];
                    x[i] = a * cosines[i] - b * sines[i];
                    y[i] = b * cosines[i] + a * sines[i];
                }
            }
            *(Two*)(to + d) = {{to_bf16(x[0]), to_bf16(x[1])}};
            *(Two*)(to + d + HALF) = {{to_bf16(y[0]), to_bf16(y[1])}};
            item += WARPS * GRID;
            prepare(p, layer, item, lane);
        }
    }
};

// What this block has written is there for all, the copy engines included.
__device__ __forceinline__ void tell(u32* counter, int thread) {
    publish_to_copy_engine();
    consumers_meet();
    if (thread == 0) grid_arrive(counter);
}

template <int PHASE>
__device__ __forceinline__ void consume(
    const Params& p, const Layer& layer, const bf16* next_norm, const Shared& s, Ring& w_ring,
    Ring& x_ring, int turn, int block, int thread) {
    forget(block, thread);
    const int item = first_item(block, thread), lane = thread % 32;
    Scales scales;
    if constexpr (PHASE == O_PROJ || PHASE == DOWN) {
        const bf16* norm = PHASE == O_PROJ ? layer.post_norm : next_norm;
        AddToResidual<PHASE> add;
        add.prepare(p, norm, item, lane);
        multiply_units<PHASE>(p, s, w_ring, x_ring, scales, block, thread);
        add.run(p, norm, turn == NUM_LAYERS, block, thread);
        tell(counter(p, turn, PHASE + 1), thread);
    } else if constexpr (PHASE == GATE_UP) {
        multiply_units<PHASE>(p, s, w_ring, x_ring, scales, block, thread);
        scales.put(p, s, thread);
        activate(p, s, block, thread);
        tell(counter(p, turn, PHASE + 1), thread);
    } else {
        RotateAndCache rotate;
        rotate.prepare(p, layer, item, lane);
        multiply_units<PHASE>(p, s, w_ring, x_ring, scales, block, thread);
        scales.put(p, s, thread);
        rotate.run(p, layer, s, block, thread);
        tell(counter(p, turn, ATTENTION), thread);
    }
}

// --- attention

// The larger of each of two columns over the rows of a warp's accumulator.
__device__ __forceinline__ float over_rows_max(float value) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2)
        value = fmaxf(value, __shfl_xor_sync(~0u, value, lanes));
    return value;
}

__device__ __forceinline__ float over_rows_sum(float value) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// One warpgroup's chunk: softmax(keys x queries) x values, both products with tokens or dimensions
// as the 64 rows of wgmma and the query heads of a kv head as its 8 columns. A thread has two of
// those, `column` and the next, in rows `row` and row + 8 of each 64.
struct Attend {
    int group, thread, lane, warp, row, column;
    u32 queries, weights;  // [2, 8, 64] and [8, 64] bfloat16, rows of 128 bytes, swizzled
    float* maxima;         // [4, 8]
    float largest[2], mass[2], sums[2][4];

    __device__ __forceinline__ Attend(const Shared& s, int all_threads) {
        group = all_threads / 128, thread = all_threads % 128;
        lane = thread % 32, warp = thread / 32, row = warp * 16 + lane / 4, column = lane % 4 * 2;
        queries = s.attention() + group * 3072;
        weights = queries + 2048;
        maxima = s.maxima() + group * 32;
    }

    __device__ __forceinline__ void begin(const Params& p, const Chunk& chunk) {
        const int head = thread / 16, part = thread % 16;
        uint4 words = {};
        if (head < GROUP)
            words = __ldcg((const uint4*)(p.q + (chunk.row * HEADS + chunk.head * GROUP + head) *
                                                    HEAD_DIM +
                                          part * 8));
        store_shared(queries + part / 8 * 1024 + head * 128 + (part % 8 ^ head) * 16, words);
        publish_to_tensor_cores();
        group_meets(group);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            largest[i] = __uint_as_float(0xFF800000);  // -inf
            mass[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][j] = 0.0f;
        }
    }

    __device__ __forceinline__ void put_weight(int head, int token, float weight) const {
        const u32 to = weights + head * 128 + (token / 8 ^ head) * 16 + token % 8 * 2;
        store_shared(to, to_bf16(weight));
    }

    // num_tokens: of the tile, from its first on. keys, values: where they lie; `release` is called
    // once the keys are no longer needed, `wait` before the values are.
    template <typename Release, typename Wait>
    __device__ __forceinline__ void tile(
        const Params& p, u32 keys, u32 values, int num_tokens, Release release, Wait wait) {
        float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply_begin();
#pragma unroll
        for (int k = 0; k < 8; k++)
            multiply_by_8<0>(scores, descriptor(keys + k / 4 * (W_BYTES / 2)) + k % 4 * 2,
                             descriptor(queries + k / 4 * 1024) + k % 4 * 2);
        multiply_commit();
        multiply_wait_8(scores);
        release();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            scores[j] *= p.softmax_scale;
            if (row + j / 2 * 8 >= num_tokens) scores[j] = __uint_as_float(0xFF800000);
        }
        float highest[2], shrink[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = over_rows_max(fmaxf(scores[i], scores[2 + i]));
            if (lane < 4) maxima[warp * 8 + column + i] = highest[i];
        }
        group_meets(group);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = largest[i];
#pragma unroll
            for (int other = 0; other < 4; other++)
                highest[i] = fmaxf(highest[i], maxima[other * 8 + column + i]);
            shrink[i] = exp2_of(largest[i] - highest[i]);
            largest[i] = highest[i];
            const float upper = exp2_of(scores[i] - highest[i]);
            const float lower = exp2_of(scores[2 + i] - highest[i]);
            mass[i] = mass[i] * shrink[i] + (upper + lower);
            put_weight(column + i, row, upper);
            put_weight(column + i, row + 8, lower);
        }
        wait();
        // What lies past the end was never written and may be NaN.
        for (int i = thread; i < (TILE_T - num_tokens) * 16; i += 128) {
            const u32 at = values + i / 8 % 2 * (W_BYTES / 2) + (num_tokens + i / 16) * 128;
            store_shared(at + i % 8 * 16, uint4{});
        }
        publish_to_tensor_cores();
        group_meets(group);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[half][j] *= shrink[j % 2];
        multiply_begin();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                multiply_by_8<1>(sums[half],
                                 descriptor(values + half * (W_BYTES / 2) + k * 16 * 128),
                                 descriptor(weights) + k * 2);
        multiply_commit();
        multiply_wait_8(sums[0]);
        multiply_wait_8(sums[1]);
    }

    __device__ __forceinline__ void end(const Params& p, const Chunk& chunk) {
        float* to = chunk_place(p, chunk.row, chunk.first_tile / CHUNK_TILES, chunk.head);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float total = over_rows_sum(mass[i]);
            if (lane < 4) maxima[warp * 8 + column + i] = total;
        }
        group_meets(group);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = column + i;
            if (head >= GROUP) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int dim = j / 2 * 64 + row + j % 2 * 8;
                put_part(to + dim / 32 * QUARTER + dim % 32 * GROUP_STORED + head,
                         sums[j / 2][j % 2 * 2 + i]);
            }
            if (lane >= 4) continue;
            // Each warp tells one quarter of the dimensions.
            float total = 0.0f;
#pragma unroll
            for (int other = 0; other < 4; other++) total += maxima[other * 8 + head];
            float* end = to + warp * QUARTER + 32 * GROUP_STORED + head;
            put_part(end, largest[i]);
            put_part(end + GROUP_STORED, total);
        }
    }
};

// Puts a row's chunks together. A warp takes a quarter of the dimensions of the heads of a kv head,
// a lane one dimension.
__device__ __forceinline__ void put_together(
    const Params& p, const Shared& s, int block, int thread) {
    const int lane = thread % 32, num_items = 4 * KV_HEADS * p.num_rows;
    for (int item = first_item(block, thread); item < num_items; item += WARPS * GRID) {
        const int quarter = item % 4, head = item / 4 % KV_HEADS, n = item / 4 / KV_HEADS;
        const int num_tiles = s.tiles()[n + 1] - s.tiles()[n];
        const int num_chunks = (num_tiles + CHUNK_TILES - 1) / CHUNK_TILES;
        float* first = chunk_place(p, n, 0, head) + quarter * QUARTER;
        constexpr int STRIDE = KV_HEADS * CHUNK_FLOATS;
        // A lane looks at a chunk's end, which is there when, or soon after, all of it is.
        float factors[GROUP], masses[GROUP];
        float* end = first + lane * STRIDE + 32 * GROUP_STORED;
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            u32 largest = 0, mass = 0;
            bool is_here = lane >= num_chunks;
            while (!__all_sync(~0u, is_here)) {
                if (is_here) continue;
                largest = look_at((const uint1*)(end + g)).x;
                mass = look_at((const uint1*)(end + GROUP_STORED + g)).x;
                is_here = largest != EMPTY && mass != EMPTY;
            }
            float highest = lane < num_chunks ? __uint_as_float(largest)
                                              : __uint_as_float(0xFF800000);
            const float own = highest;
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2)
                highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, lanes));
            factors[g] = exp2_of(own - highest);
            masses[g] = add_lanes(lane < num_chunks ? factors[g] * __uint_as_float(mass) : 0.0f);
            if (lane < num_chunks) {
                clear((uint1*)(end + g));
                clear((uint1*)(end + GROUP_STORED + g));
            }
        }
        float sums[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) sums[g] = 0.0f;
        constexpr int AT_ONCE = GROUP <= 2 ? 8 : GROUP <= 4 ? 6 : 3;
        for (int chunk = 0; chunk < num_chunks; chunk += AT_ONCE) {
            u32 words[AT_ONCE][GROUP];
            bool is_complete;
            do {
                is_complete = true;
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    if (chunk + i >= num_chunks) break;
                    const float* from = first + (chunk + i) * STRIDE + lane * GROUP_STORED;
                    look_at_group(words[i], from);
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    if (chunk + i >= num_chunks) break;
#pragma unroll
                    for (int g = 0; g < GROUP; g++) is_complete &= words[i][g] != EMPTY;
                }
            } while (!is_complete);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (chunk + i >= num_chunks) break;
                float* from = first + (chunk + i) * STRIDE + lane * GROUP_STORED;
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    clear((uint1*)(from + g));
                    sums[g] += __shfl_sync(~0u, factors[g], chunk + i) * __uint_as_float(words[i][g]);
                }
            }
            __syncwarp();
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++)
            p.attended[(n * HEADS + head * GROUP + g) * HEAD_DIM + quarter * 32 + lane] =
                to_bf16(sums[g] / masses[g]);
    }
}

__device__ __forceinline__ void attend(
    const Params& p, const Shared& s, Ring& ring, int turn, int block, int thread) {
    forget(block, thread);
    Chunk chunk = *s.first_chunk();
    if (thread == 0) grid_wait(counter(p, turn - 1, ATTENTION));
    consumers_meet();
    Attend own(s, thread);
    while (chunk.is_ours()) {
        const Pair pair(s, chunk);
        const Chunk ours = pair.of(own.group);
        if (ours.num_tiles) own.begin(p, ours);
#pragma unroll 1
        for (int i = 0; i < 2 * CHUNK_TILES; i++) {
            const Chunk at = pair.of(i % 2);
            if (i / 2 >= at.num_tiles) continue;
            // Both warpgroups go through all places of the ring, in step with who fills them.
            const u32 keys = ring.stage, keys_parity = ring.parity;
            ring.advance(W_STAGES);
            const u32 values = ring.stage, values_parity = ring.parity;
            ring.advance(W_STAGES);
            const auto release = [&](u32 stage) {
                __syncwarp();  // all its threads have seen that the place was full
                if (own.lane == 0) barrier_arrive(s.w_empty() + stage * 8);
            };
            barrier_wait(s.w_full() + keys * 8, keys_parity);
            if (i % 2 == own.group) {
                const int num_tokens = s.lens()[at.row] - (at.first_tile + i / 2) * TILE_T;
                own.tile(
                    p, s.w + keys * W_BYTES, s.w + values * W_BYTES, min(num_tokens, TILE_T),
                    [&] { release(keys); },
                    [&] { barrier_wait(s.w_full() + values * 8, values_parity); });
            } else {
                release(keys);
                barrier_wait(s.w_full() + values * 8, values_parity);
            }
            release(values);
        }
        if (ours.num_tiles) own.end(p, ours);
        if (pair.second.num_tiles == 0) break;
        chunk = pair.second.next(s);
    }
    forget(block, thread);
    put_together(p, s, block, thread);
    tell(counter(p, turn, O_PROJ), thread);
}

// The last norm's division, for the head. Each thread reads what it wrote itself.
__device__ __forceinline__ void finish(const Params& p, const Shared& s, int block, int thread) {
    constexpr int TILES = HIDDEN / TILE_F;
    const int lane = thread % 32;
    if (thread == 0) grid_wait(counter(p, NUM_LAYERS, QKV));
    consumers_meet();
    Scales scales;
    scales.load(p, thread);
    scales.put(p, s, thread);
    for (int item = first_item(block, thread); item < TILES * p.num_rows; item += WARPS * GRID) {
        const int n = item / TILES, f = item % TILES * TILE_F + lane * 4;
        const float scale = s.scale()[n];
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
    s.base = dynamic + (-shared_address(dynamic) & 1023);
    s.w = shared_address(s.base);
    if (thread == 0) {
        for (int i = 0; i < W_STAGES; i++) {
            barrier_init(s.w_full() + i * 8, 1);
            barrier_init(s.w_empty() + i * 8, WARPS);
        }
        for (int i = 0; i < X_STAGES; i++) {
            barrier_init(s.x_full() + i * 8, 1);
            barrier_init(s.x_empty() + i * 8, WARPS);
        }
        publish_barriers();
    }
    if (thread < NR) s.lens()[thread] = thread < p.num_rows ? p.context_lens[thread] : 0;
    __syncthreads();
    if (thread <= NR) {
        int tiles = 0;
        for (int n = 0; n < thread; n++) tiles += (s.lens()[n] + TILE_T - 1) / TILE_T;
        s.tiles()[thread] = tiles;
    }
    __syncthreads();

    if (thread / 32 == WARPS) {
        // The maps lie in memory that may have held others.
        for (int i = thread % 32; i < NUM_LAYERS * 6; i += 32)
            take_map((const TensorMap*)&p.layers[i / 6] + i % 6);
        __syncwarp();
        if (thread % 32) return;
        const u64 policy = policy_evict_first();
        const Chunk chunk = Chunk::first(s, p.num_rows, block);
        Ring ring, landed;
#pragma unroll 1
        for (int turn = 0; turn <= NUM_LAYERS; turn++) {
            if (turn > 0) {
                const Layer& layer = p.layers[turn - 1];
                stream_keys_values(
                    p, layer, s, counter(p, turn - 1, ATTENTION), ring, landed, chunk, policy);
                stream_weights<O_PROJ>(layer, s, ring, landed, block, policy);
                stream_weights<GATE_UP>(layer, s, ring, landed, block, policy);
                stream_weights<DOWN>(layer, s, ring, landed, block, policy);
            }
            if (turn < NUM_LAYERS)
                stream_weights<QKV>(p.layers[turn], s, ring, landed, block, policy);
        }
        return;
    }
    if (thread > CONSUMERS) {
        if (thread % 32) return;
        const u64 policy = policy_evict_last();
        Ring ring;
#pragma unroll 1
        for (int turn = 0; turn <= NUM_LAYERS; turn++) {
            if (turn > 0) {
                stream_inputs<O_PROJ>(p, s, ring, turn, block, policy);
                stream_inputs<GATE_UP>(p, s, ring, turn, block, policy);
                stream_inputs<DOWN>(p, s, ring, turn, block, policy);
            }
            if (turn < NUM_LAYERS) stream_inputs<QKV>(p, s, ring, turn, block, policy);
        }
        return;
    }

    if (thread == 0) *s.first_chunk() = Chunk::first(s, p.num_rows, block);  // read after meetings
    Ring w_ring, x_ring;
    AddToResidual<NUM_PHASES> embed;
    embed.prepare(p, p.layers[0].input_norm, first_item(block, thread), thread % 32);
    embed.run(p, p.layers[0].input_norm, false, block, thread);
    tell(counter(p, 0, QKV), thread);
#pragma unroll 1
    for (int turn = 0; turn <= NUM_LAYERS; turn++) {
        const bool is_last = turn == NUM_LAYERS;
        if (turn > 0) {
            const Layer& layer = p.layers[turn - 1];
            const bf16* next_norm = is_last ? p.last_norm : p.layers[turn].input_norm;
            attend(p, s, w_ring, turn, block, thread);
            consume<O_PROJ>(p, layer, next_norm, s, w_ring, x_ring, turn, block, thread);
            consume<GATE_UP>(p, layer, next_norm, s, w_ring, x_ring, turn, block, thread);
            consume<DOWN>(p, layer, next_norm, s, w_ring, x_ring, turn, block, thread);
        }
        if (!is_last)
            consume<QKV>(p, p.layers[turn], nullptr, s, w_ring, x_ring, turn, block, thread);
    }
    finish(p, s, block, thread);
}
