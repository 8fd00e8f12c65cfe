// Attention of a decode step of many rows through the paged cache. See row_attention.py for what it
// computes and when it is used.
//
// A block has one kv head of one row, so the hardware shares the work out as blocks end, and no bit
// of a row depends on the others. Reading sets the time, and what a card may draw, so what counts
// is that little is done beside the reading: a warp takes STRIP tokens at a time, every WARPS-th
// strip of the context, which it copies some strips ahead through a ring of its own; tokens are a
// constant apart, so that a copy is one instruction; and strips mask nothing but at the two ends.
// Warps meet once, at the end.
//
// What a warp does with a strip is in attention.cuh.
//
// Set when compiled: KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, WARPS, STAGES, BLOCKS_PER_SM. Letters:
// N rows, D head dim.

#include <attention.cuh>

constexpr int THREADS = WARPS * 32;
constexpr int TILES = 2;  // products at a time
constexpr int STRIP = TILES * TILE_TOKENS;
constexpr int SLOT = KV_HEADS * HEAD_DIM;  // elements between two tokens of the cache
constexpr int STRIP_BYTES = STRIP * TOKEN_BYTES;
constexpr int STAGE_BYTES = 2 * STRIP_BYTES;  // keys, then values
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int SHARED_BYTES = RING_BYTES + PARTS_BYTES + STATS_BYTES;

static_assert(BLOCK_SIZE % STRIP == 0 && STAGES >= 2, "see row_attention.py");
static_assert((long long)BLOCK_SIZE * SLOT < 1ll << 31, "places in a block are 32 bits");

struct Params {
    const bf16* q;        // [N, KV_HEADS * GROUP, D]
    const bf16* k_cache;  // [blocks, BLOCK_SIZE, KV_HEADS, D]
    const bf16* v_cache;
    bf16* out;  // as q, dense
    const int* block_tables;
    const int* context_lens;  // at least 1 each
    long long q_stride, k_block_stride, v_block_stride, table_stride;
    float scale;  // of scores, for powers of two
    int window;   // tokens that a query sees, itself among them
};

// Copies of one warp.
struct Loader {
    const Params& p;
    const int* const table;
    const u32 ring;
    const int head, begin, length, lane;  // of the row: tokens begin to length
    // Nothing of a context is read again before the next step.
    const u64 policy = policy_evict_first();
    int first;  // token of the next strip
    u32 stage = 0;

    // The next strip's keys and values, a group of copies; an empty one where there is none.
    __device__ __forceinline__ void load() {
        if (first < length) {
            const long long block = table[first / BLOCK_SIZE];
            const int place = first % BLOCK_SIZE * SLOT + head * HEAD_DIM;
            const u32 to = ring + stage * STAGE_BYTES;
            const bf16* keys = p.k_cache + block * p.k_block_stride + place;
            const bf16* values = p.v_cache + block * p.v_block_stride + place;
            if (first >= begin && first + STRIP <= length)
                copy(to, keys, values, 0, STRIP);
            else
                copy(to, keys, values, begin - first, length - first);
        }
        copies_commit();
        first += WARPS * STRIP;
        if (++stage == STAGES) stage = 0;
    }
    __device__ __forceinline__ void copy(
        u32 to, const bf16* keys, const bf16* values, int first_valid, int end_valid) {
        copy_tokens<STRIP>(to, keys, SLOT, first_valid, end_valid, lane, policy);
        copy_tokens<STRIP>(to + STRIP_BYTES, values, SLOT, first_valid, end_valid, lane, policy);
    }
};

extern "C" __constant__ int shared_bytes = SHARED_BYTES;
extern "C" __constant__ int row_attention_threads = THREADS;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    row_attention(const __grid_constant__ Params p) {
    let_next_kernel_start();
    SHARED_MEMORY(dynamic);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % KV_HEADS, row = blockIdx.x / KV_HEADS;
    const int length = p.context_lens[row];
    const int begin = max(0, length - p.window);
    const int first_strip = begin / STRIP * STRIP + warp * STRIP;
    const u32 ring = shared_address(dynamic) + warp * STAGES * STAGE_BYTES;
    const Parts parts = {(float*)(dynamic + RING_BYTES),
                         (float2*)(dynamic + RING_BYTES + PARTS_BYTES)};

    Loader loader{p, p.block_tables + row * p.table_stride, ring, head, begin, length, lane};
    loader.first = first_strip;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) loader.load();
    Queries q;
    q.load(p.q + row * p.q_stride + head * RESULTS, lane);
    Sums sums;
    sums.clear();
    Weights<TILES> weights;
    u32 stage = 0;
#pragma unroll 1
    for (int first = first_strip; first < length; first += WARPS * STRIP) {
        // This thread's copies have landed, and with __syncwarp the warp's; and all lanes have read
        // the strip before, into whose place the next one goes.
        copies_wait<STAGES - 2>();
        __syncwarp();
        loader.load();
        const u32 keys = ring + stage * STAGE_BYTES;
        weigh(weights, sums, q, keys, p.scale, begin - first, length - first, lane);
        add_values(sums, weights, keys + STRIP_BYTES, lane);
        if (++stage == STAGES) stage = 0;
    }

    write_sums(parts, sums, warp, lane);
    __syncthreads();
    const Merged merged(parts, lane);
    bf16* const out = p.out + (long long)blockIdx.x * RESULTS;
    for (int i = threadIdx.x; i < RESULTS; i += THREADS) {
        const int of = i / HEAD_DIM;  // the same in a warp
        const float mass = __shfl_sync(~0u, merged.mass, of);
        out[i] = to_bf16(merged.value(of, i % HEAD_DIM) / mass);
    }
}
