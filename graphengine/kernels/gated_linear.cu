// silu(gate) * up of a product with a large weight [2I, C], gate over up, of many rows. See
// gated_linear.py for what it computes and when it is used.
//
// A tile is 256 rows by FEATURES of the weight's, half gates and half ups, chosen so that 256 rows
// make one wave: each multiprocessor has one tile, none waits for a second. Of a tile 224 features
// wide the sums fill 7/8 of the registers there are, which leaves no room for a warp that does
// nothing but load: two warpgroups multiply 128 rows each, and a thread of theirs streams both
// operands into a ring of shared memory. A block with several tiles loads the first units of the
// next one before it stores one.
//
// Two blocks, a cluster, share their rows: each loads half of them for both. In a cluster of four,
// two by two, those that share features do the same with weights, so that a third less is read from
// the L2 cache; at the power limit that is time. A cluster lies within a GPC, whose multiprocessors
// need not be a whole number of fours. So a launch of them is followed by one of clusters of two,
// which run beside them where there is room (`is_beside`). Who computes a tile changes nothing in
// it.
//
// In shared memory 8 rows of gate's weights lie beside 8 of up's, as the copy engine puts them: so
// the two sums of a feature are the same thread's.
//
// PTX ISA 8: mbarrier, cp.async.bulk.tensor, wgmma, stmatrix, griddepcontrol; the layout of wgmma's
// accumulators and of its shared-memory descriptors is from there.
//
// Set when compiled: FEATURES, STAGES, CLUSTER_ROWS (tiles of rows of a cluster, 1 or 2). Letters:
// N rows, C input features, I intermediate.

#define NR FEATURES
#include <hopper.cuh>

constexpr int ROWS = 256;          // of a tile
constexpr int UNIT_C = 64;         // of C, in a stage
constexpr int ROW_BYTES = UNIT_C * 2;
constexpr int WIDTH = FEATURES / 2;  // of I, of a tile
constexpr int WARPGROUP = 128;
constexpr int WARPGROUP_ROWS = 128;
constexpr int M_TILES = WARPGROUP_ROWS / 64;
constexpr int SUMS = FEATURES / 2;  // of a thread, for 64 rows
constexpr int NUM_THREADS = 2 * WARPGROUP;
constexpr int CLUSTER = 2 * CLUSTER_ROWS;
constexpr int X_BYTES = ROWS * ROW_BYTES;
constexpr int W_BYTES = FEATURES * ROW_BYTES;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int OUT_PITCH = WIDTH * 2 + 16;  // of rows on their way out: they lie in different banks
constexpr int OUT_BYTES = NUM_THREADS / 32 * 16 * OUT_PITCH;
constexpr int SHARERS = 1 + CLUSTER_ROWS;  // blocks that get some of what a block loads, itself too
constexpr int ROW_GROUP = 8;  // row tiles that run side by side, so that the L2 cache holds them
static_assert(FEATURES % 32 == 0 && FEATURES <= 224, "pairs of 8 gates and 8 ups; registers");

struct Params {
    TensorMap x;       // [N, C]
    TensorMap weight;  // [2I, C]: see load_gates_and_ups
    bf16* out;         // [N, I]
    int num_rows, intermediate;
    int units;             // of C: STAGES or more
    // Tiles lie in `pairs` of two beside each other and, of rows, in `row_steps` steps of
    // `row_step`, 1 or 2; of 2 one more may be left over.
    int row_steps, row_step, pairs;
    int first, last;  // of what this launch's clusters take: from `first` to before `last`
    int read_once;    // no other tile reads a weight
    int is_beside;    // clusters of two that run beside the kernel ahead, and end after it
};

struct Shared {
    u32 stages, out, full, empty;  // addresses

    __device__ explicit Shared(char* memory) {
        stages = (shared_address(memory) + 1023) & ~1023u;
        out = stages + STAGES * STAGE_BYTES;
        full = out + OUT_BYTES;
        empty = full + STAGES * 8;
    }
    __device__ u32 x(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ u32 w(int stage) const { return x(stage) + X_BYTES; }
};
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + OUT_BYTES + 2 * STAGES * 8;

extern "C" __constant__ int shared_bytes = SHARED_BYTES;
extern "C" __constant__ int gated_linear_threads = NUM_THREADS;

struct Ring {
    int stage = 0;
    u32 parity = 0;
    __device__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

struct Tile {
    int row, feature;  // in tiles

    // index: of what clusters as large as this one take, steps before the row of tiles left over.
    __device__ __forceinline__ Tile(const Params& p, int index, int rank) {
        const int parts = p.row_step / CLUSTER_ROWS, part = index % parts;
        if (const int left_over = index - p.row_steps * p.pairs * parts; left_over >= 0) {
            row = p.row_steps * p.row_step;
            feature = left_over * 2 + rank % 2;
            return;
        }
        index /= parts;
        const int in_group = ROW_GROUP / p.row_step, group = index / (in_group * p.pairs);
        index -= group * in_group * p.pairs;
        const int steps = min(in_group, p.row_steps - group * in_group);
        row = (group * in_group + index % steps) * p.row_step + part + rank / 2;
        feature = index / steps * 2 + rank % 2;
    }
};

// What the loading thread of a block does.
struct Loader {
    const Params& p;
    const Shared& s;
    int rank;
    u64 x_policy, w_policy;

    // Also tells the stage's barrier of what both loads bring.
    __device__ __forceinline__ void load_weights(const Tile& tile, int unit, int stage) const {
        const u32 full = s.full + stage * 8;
        barrier_expect(full, STAGE_BYTES);
        const int part = rank / 2, group = tile.feature * (WIDTH / 8);
        if (CLUSTER_ROWS == 1)
            load_gates_and_ups(s.w(stage), &p.weight, unit * UNIT_C, group, full, w_policy);
        else
            load_gates_and_ups_for_cluster(s.w(stage) + part * (W_BYTES / 2), &p.weight,
                                           unit * UNIT_C, group + part * (WIDTH / 16), full,
                                           0b0101 << rank % 2, w_policy);
    }
    __device__ __forceinline__ void load_rows(const Tile& tile, int unit, int stage) const {
        const int part = rank % 2 * (ROWS / 2);
        load_box_for_cluster(s.x(stage) + part * ROW_BYTES, &p.x, unit * UNIT_C,
                             tile.row * ROWS + part, s.full + stage * 8, 0b11 << rank / 2 * 2,
                             x_policy);
    }
    // Once all that share what the stage holds are done with it.
    __device__ __forceinline__ void reload(const Tile& tile, int unit, const Ring& done) const {
        barrier_wait(s.empty + done.stage * 8, done.parity);
        load_weights(tile, unit, done.stage);
        load_rows(tile, unit, done.stage);
    }
};

// What a warpgroup does with a unit: its rows, by all features.
struct Multiplier {
    const Shared& s;
    int rank, thread;
    u32 own_rows;
    float (&sums)[M_TILES][SUMS];

    __device__ __forceinline__ void begin(const Ring& ring) {
        barrier_wait(s.full + ring.stage * 8, ring.parity);
        multiply_begin();
        const u64 x = descriptor(s.x(ring.stage) + own_rows), w = descriptor(s.w(ring.stage));
#pragma unroll
        for (int k = 0; k < UNIT_C / 16; k++)
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
                multiply(sums[m], x + m * (64 * ROW_BYTES >> 4) + k * 2, w + k * 2);
        multiply_commit();
    }
    // A thread tells each block that has loaded some of it.
    __device__ __forceinline__ void release(const Ring& ring) {
        if (thread < SHARERS) barrier_arrive_at(s.empty + ring.stage * 8, rank ^ thread);
    }
};

// Of two features, rounded as they are where they are stored between two kernels.
__device__ __forceinline__ u32 activated(float gate_0, float gate_1, float up_0, float up_1) {
    const u32 gates = pack_bf16(gate_0, gate_1), ups = pack_bf16(up_0, up_1);
    const float g0 = to_float((bf16)gates), g1 = to_float((bf16)(gates >> 16));
    const float u0 = to_float((bf16)ups), u1 = to_float((bf16)(ups >> 16));
    return pack_bf16(__fdividef(g0, 1.0f + __expf(-g0)) * u0,
                     __fdividef(g1, 1.0f + __expf(-g1)) * u1);
}

// Sums of 16 rows, `first` and on, of a warp: through shared memory, to be written 16 bytes a
// thread.
__device__ __forceinline__ void store(
    const Params& p, const Shared& s, const Tile& tile, const float (&sums)[SUMS], int first) {
    constexpr int PIECES = WIDTH / 8;  // of a row
    const int lane = threadIdx.x % 32, begin = tile.feature * WIDTH;
    const u32 rows = s.out + threadIdx.x / 32 * (16 * OUT_PITCH);
#pragma unroll
    for (int i = 0; i < PIECES; i += 2) {
        const float* const a = sums + i * 8;
        const float* const b = a + 8;
        store_matrices(rows + lane % 16 * OUT_PITCH + (i + lane / 16) * 16,
                       activated(a[0], a[1], a[4], a[5]), activated(a[2], a[3], a[6], a[7]),
                       activated(b[0], b[1], b[4], b[5]), activated(b[2], b[3], b[6], b[7]));
    }
    __syncwarp();
    bf16* const out = p.out + (long long)first * p.intermediate + begin;
#pragma unroll
    for (int i = lane; i < 16 * PIECES; i += 32) {
        const int row = i / PIECES, column = i % PIECES * 8;
        if (first + row < p.num_rows && begin + column < p.intermediate)
            *(uint4*)(out + (long long)row * p.intermediate + column) =
                load_shared(rows + row * OUT_PITCH + column * 2);
    }
    __syncwarp();
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(NUM_THREADS, 1)
    gated_linear(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const Shared s(memory);
    const bool is_loader = threadIdx.x == 0;
    const int rank = blockIdx.x % CLUSTER;
    const int num_clusters = gridDim.x / CLUSTER;
    int index = p.first + blockIdx.x / CLUSTER;
    Tile tile(p, index, rank);
    const Loader loader{p, s, rank, policy_evict_last(),
                        p.read_once ? policy_evict_first() : policy_evict_normal()};
    if (is_loader) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(s.full + stage * 8, 1);
            barrier_init(s.empty + stage * 8, 2 * SHARERS);
        }
        publish_barriers();
    }
    __syncthreads();
    // Before a block loads for another, whose barriers may not be there yet. Of two it loads weights
    // for itself alone.
    if (CLUSTER_ROWS > 1) meet_cluster();
    // They come before the kernel ahead has ended.
    if (is_loader)
        for (int unit = 0; unit < STAGES; unit++) loader.load_weights(tile, unit, unit);
    __syncwarp();
    if (CLUSTER_ROWS == 1) meet_cluster();
    let_next_kernel_start();
    if (is_loader) {
        if (!p.is_beside) wait_for_kernel_before();
        for (int unit = 0; unit < STAGES; unit++) loader.load_rows(tile, unit, unit);
    }
    __syncwarp();

    const int thread = threadIdx.x % WARPGROUP;
    const int own_row = threadIdx.x / WARPGROUP * WARPGROUP_ROWS;
    float sums[M_TILES][SUMS];
    Multiplier multiplier{s, rank, thread, (u32)(own_row * ROW_BYTES), sums};
    Ring ring, done;  // done: what has been multiplied and may be loaded anew
    while (index < p.last) {
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < SUMS; i++) sums[m][i] = 0.0f;
        // Two loops, and the first unit ahead of them: with one loop and a condition in it ptxas
        // lets no two products run at once (C7515).
        multiplier.begin(ring);
        ring.advance();
        int unit = 1;
#pragma unroll 1
        for (; unit <= p.units - STAGES; unit++, ring.advance(), done.advance()) {
            multiplier.begin(ring);
            multiply_wait_but_last();
            multiplier.release(done);
            if (is_loader) loader.reload(tile, unit - 1 + STAGES, done);
            __syncwarp();
        }
#pragma unroll 1
        for (; unit < p.units; unit++, ring.advance()) multiplier.begin(ring);
#pragma unroll
        for (int m = 0; m < M_TILES; m++) multiply_wait(sums[m]);

        const Tile stored = tile;
        index += num_clusters;
        if (index < p.last) tile = Tile(p, index, rank);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++, done.advance()) {
            multiplier.release(done);
            if (is_loader && index < p.last) loader.reload(tile, i, done);
            __syncwarp();
        }
        const int first = stored.row * ROWS + own_row + thread / 32 * 16;
#pragma unroll
        for (int m = 0; m < M_TILES; m++) store(p, s, stored, sums[m], first + m * 64);
    }
    // None may leave before the others have told it what is empty: of the last units, a ring ago.
    if (is_loader)
        for (int i = 0; i < STAGES; i++, done.advance())
            barrier_wait(s.empty + done.stage * 8, done.parity ^ 1);
    // So that who waits for this kernel has waited for the one beside it.
    if (p.is_beside) wait_for_kernel_before();
}
