// Attention of a decode step through the paged cache. See decode_attention.py for what it computes
// and when it is used.
//
// One query a sequence is bound by the reading of keys and values, and what a kernel of its own
// loses is its start and its drain. Here a fixed number of blocks, as many as a GPU holds at once,
// take equal, contiguous shares of all tiles of the step: rows, of each its kv heads, of each its
// tiles of tokens. Behind those of a kv head the list has END_TILES places for what its end takes,
// unless all rows are alike: else the block that has many short rows would be the last by far.
// Where shares begin is found once a step, by plan_shares, for all layers. Keys and values are
// copied some strips ahead through a ring of shared memory, across all borders, and the first of
// them before the kernel ahead has ended: those of tokens that are older than the step. Each warp
// has its own 16 tokens of a tile and its own ring, so warps meet at the ends of segments only.
//
// A segment is some tiles of a row: how many follows from the row's own length and max_segments.
// Its warps' sums are put together, in their order, and then the segments of a row, in theirs. A
// block that has a row's first segments adds them up itself; the others are written out in float32,
// and the block that arrives last adds them. So no bit of a row depends on who took what, or on the
// other rows, among steps of the same max_segments.
//
// What a warp does with a tile is in attention.cuh. PTX ISA 8: cp.async, griddepcontrol.
//
// Set when compiled: GRID, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, STAGES, WARPS, BLOCKS_PER_SM,
// LEAST_TILES (of a segment that is not a row's last), END_TILES, MAX_ROWS. Letters: N rows, D head
// dim, L lines: see Params.

#define GROUP (HEADS / KV_HEADS)
#include <attention.cuh>

constexpr int THREADS = WARPS * 32;
constexpr int STRIP = TILE_TOKENS;  // tokens of a tile that are one warp's
constexpr int TILE = WARPS * STRIP;
constexpr int STRIP_BYTES = STRIP * TOKEN_BYTES;

// Results of a segment: each thread has some of them.
constexpr int SHARE = (RESULTS + THREADS - 1) / THREADS;

static_assert(HEADS % KV_HEADS == 0 && BLOCK_SIZE % TILE == 0 && STAGES >= 3,
              "see decode_attention.py");

// Where a block's share of the list of all tiles begins.
struct alignas(16) Share {
    int position;  // in the list
    int row, head, tile;
    int length;     // of the row
    int block_id;   // of the tile, in the cache
    int per_block;  // positions that each share has before its begin is moved: see plan_shares
    int end_tiles;  // positions behind the tiles of each kv head
};

// Sums that a block writes out, max_segments + 1 lines: of the first row and kv head of its share,
// if other blocks have the first segments, a line for each segment; of the last one, if other
// blocks have the last segments, the last line, for all that it has had of them.
struct Params {
    const bf16* q;        // [N, HEADS, HEAD_DIM]
    const bf16* k_cache;  // [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]
    const bf16* v_cache;
    bf16* out;  // [N, HEADS, HEAD_DIM]
    const int* block_tables;
    const int* context_lens;  // at least 1 each
    Share* shares;    // [GRID + 1]
    float* partials;  // [GRID, L, GROUP, HEAD_DIM]
    float2* stats;    // [GRID, L, GROUP]: base and mass
    int* prefixes;    // [GRID]: segments in the last line
    u32* arrivals;    // zeros before and after; [GRID]: segments of the last line's row written
    long long q_stride, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride;
    long long table_stride;
    float scale;  // of scores, for powers of two
    int num_rows;
    int max_segments;  // of a row and kv head
};

constexpr int RING_BYTES = WARPS * STAGES * STRIP_BYTES;
constexpr int SHARED_BYTES = RING_BYTES + PARTS_BYTES + STATS_BYTES + 16;

// --- the cut

__device__ __forceinline__ int tiles_of(int length) { return (length + TILE - 1) / TILE; }
__device__ __forceinline__ int tiles_of_segment(const Params& p, int num_tiles) {
    return max(LEAST_TILES, (num_tiles + p.max_segments - 1) / p.max_segments);
}

// A tile of the list. The same in all lanes of a warp.
struct Place {
    int position, row, head, tile;
    int length, num_tiles;  // of the row
    int per_segment;        // tiles
    int end_tiles;          // see Share
    int next_length;        // of the next row, asked for long before it is needed

    __device__ __forceinline__ Place(const Params& p, const Share& share)
        : position(share.position), row(share.row), head(share.head), tile(share.tile),
          end_tiles(share.end_tiles) {
        enter_row(p, share.length);
    }
    __device__ __forceinline__ void enter_row(const Params& p, int its_length) {
        length = its_length;
        num_tiles = tiles_of(length);
        per_segment = tiles_of_segment(p, num_tiles);
        next_length = p.context_lens[min(row + 1, p.num_rows - 1)];
    }
    // Of the next tile, or the end of the list.
    __device__ __forceinline__ int next_position() const {
        return position + 1 + (is_item_end() ? end_tiles : 0);
    }
    // There is a next one.
    __device__ __forceinline__ void advance(const Params& p) {
        position = next_position();
        if (++tile < num_tiles) return;
        tile = 0;
        if (++head < KV_HEADS) return;
        head = 0;
        row++;
        enter_row(p, next_length);
    }
    __device__ __forceinline__ bool is_item_end() const { return tile + 1 == num_tiles; }
    __device__ __forceinline__ bool is_segment_end() const {
        return is_item_end() || (tile + 1) % per_segment == 0;
    }
    __device__ __forceinline__ int num_segments() const {
        return (num_tiles + per_segment - 1) / per_segment;
    }
};

constexpr int PLAN_THREADS = 512;
static_assert(MAX_ROWS <= PLAN_THREADS && (MAX_ROWS & (MAX_ROWS - 1)) == 0, "a row each");

// Positions of each share: whole rows of a kv head where that makes them a sixteenth more at most,
// as it does where all rows are about as long.
__device__ __forceinline__ int positions_per_block(int total, int longest) {
    const int least = (total + GRID - 1) / GRID;
    const int whole = (least + longest - 1) / longest * longest;
    return whole * 16 <= least * 17 ? whole : least;
}

// One block. A share begins where a segment does: at its even place, or at the first after it.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS, 1)
    plan_shares(const __grid_constant__ Params p) {
    SHARED_MEMORY(dynamic);
    constexpr int WARPS_OF_PLAN = PLAN_THREADS / 32;
    int* after = (int*)dynamic;  // [MAX_ROWS]: positions of a kv head, up to the end of each row
    int* of_warps = after + MAX_ROWS;
    int* longest_of_warps = of_warps + WARPS_OF_PLAN;
    int* shortest_of_warps = longest_of_warps + WARPS_OF_PLAN;
    const int thread = threadIdx.x, lane = thread % 32;
    const int own = thread < p.num_rows ? tiles_of(p.context_lens[thread]) : 0;
    int sum = own, longest = own, shortest = own > 0 ? own : 0x7FFFFFFF;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int others = __shfl_up_sync(~0u, sum, lanes);
        if (lane >= lanes) sum += others;
        longest = max(longest, __shfl_xor_sync(~0u, longest, lanes));
        shortest = min(shortest, __shfl_xor_sync(~0u, shortest, lanes));
    }
    if (lane == 31) {
        of_warps[thread / 32] = sum;
        longest_of_warps[thread / 32] = longest, shortest_of_warps[thread / 32] = shortest;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS_OF_PLAN; warp++) {
        if (warp < thread / 32) sum += of_warps[warp];
        longest = max(longest, longest_of_warps[warp]);
        shortest = min(shortest, shortest_of_warps[warp]);
    }
    const int end_tiles = shortest == longest ? 0 : END_TILES;
    if (thread < MAX_ROWS) after[thread] = sum + (thread + 1) * end_tiles;
    __syncthreads();

    const int total = after[p.num_rows - 1] * KV_HEADS;
    const int per_block = positions_per_block(total, longest + end_tiles);
    for (int block = thread; block <= GRID; block += PLAN_THREADS) {
        Share share;
        share.position = block * per_block;
        share.per_block = per_block;
        share.end_tiles = end_tiles;
        if (share.position < total) {
            int row = 0;
            for (int step = MAX_ROWS / 2; step > 0; step /= 2)
                if (row + step < p.num_rows && after[row + step - 1] * KV_HEADS <= share.position)
                    row += step;
            const int num_positions = after[row] - (row > 0 ? after[row - 1] : 0);
            const int num_tiles = num_positions - end_tiles;
            const int in_row = share.position - (after[row] - num_positions) * KV_HEADS;
            const int per_segment = tiles_of_segment(p, num_tiles);
            share.head = in_row / num_positions;
            const int tile = in_row % num_positions;
            share.tile = (tile + per_segment - 1) / per_segment * per_segment;
            if (share.tile >= num_tiles) {
                share.position += num_positions - tile;
                share.tile = 0;
                if (++share.head == KV_HEADS) share.head = 0, row++;
            } else {
                share.position += share.tile - tile;
            }
            share.row = row;
        }
        if (share.position < total) {
            share.length = p.context_lens[share.row];
            share.block_id =
                p.block_tables[share.row * p.table_stride + share.tile * TILE / BLOCK_SIZE];
        } else {
            share.position = total;
        }
        p.shares[block] = share;
    }
}

// --- who loads

// Copies of one warp: keys, then values, of its strip of each tile.
struct Loader {
    const Params& p;
    const u32 ring;  // of this warp
    const int strip, lane;
    const int end;  // position
    // Nothing of a context is read again before the next step; what the chain's blocks exchange is.
    const u64 policy = policy_evict_first();
    Place place;
    int block_id;
    u32 stage = 0;
    bool is_value = false;

    __device__ __forceinline__ Loader(
        const Params& p, const Share& share, int end, u32 ring, int strip, int lane)
        : p(p), ring(ring), strip(strip), lane(lane), end(end), place(p, share),
          block_id(share.block_id) {}

    // Before it is needed.
    __device__ __forceinline__ void find_block() {
        block_id = p.block_tables[place.row * p.table_stride + place.tile * TILE / BLOCK_SIZE];
    }

    // The next strip's copies, a group of them. is_early: the kernel ahead, which writes the newest
    // tokens, may not have ended.
    __device__ __forceinline__ void load(bool is_early) {
        if (place.position < end) {
            const int first = place.tile * TILE + strip * STRIP;
            const int num_valid = place.length - first;
            if (is_early && num_valid > 0 && num_valid <= STRIP) wait_for_kernel_before();
            const int slot = first % BLOCK_SIZE;
            if (!is_value) {
                copy(p.k_cache, p.k_block_stride, p.k_slot_stride, slot, num_valid);
            } else {
                copy(p.v_cache, p.v_block_stride, p.v_slot_stride, slot, num_valid);
                if (place.next_position() < end) {
                    place.advance(p);
                    if (place.tile * TILE % BLOCK_SIZE == 0) find_block();
                } else {
                    place.position = end;
                }
            }
            is_value = !is_value;
            if (++stage == STAGES) stage = 0;
        }
        copies_commit();  // an empty group where there is nothing: they are counted
    }

    __device__ __forceinline__ void copy(
        const bf16* cache, long long block_stride, long long slot_stride, int slot,
        int num_valid) {
        const bf16* from =
            cache + block_id * block_stride + slot * slot_stride + place.head * HEAD_DIM;
        copy_tokens<STRIP>(
            ring + stage * STRIP_BYTES, from, slot_stride, 0, num_valid, lane, policy);
    }
};

__device__ __forceinline__ const bf16* queries_of(const Params& p, const Place& place) {
    return p.q + place.row * p.q_stride + place.head * RESULTS;
}

// --- who adds up

struct Shared {
    u32 ring;
    Parts parts;
    u32* arrived;
};

// Of some segments of a row and kv head, added up: each thread has the results at thread +
// i * THREADS, lane h of each warp the base and the mass of query head h.
struct Results {
    float values[SHARE];  // not yet divided by the mass
    float base, mass;
    int num_segments = 0;  // that this block has had of them
    bool has_first;        // all of those are in here; else they were written out, one by one

    struct Weights {
        float own, other;
    };

    // Adds another segment's of head `lane`; the results are then to be weighted. Products and sums
    // are spelled out here and below, so that all places where segments are added round alike.
    __device__ __forceinline__ Weights add_stats(float other_base, float other_mass) {
        const float higher = fmaxf(base, other_base);
        const Weights weights = {exp2_fast(base - higher), exp2_fast(other_base - higher)};
        mass = __fmaf_rn(mass, weights.own, __fmul_rn(other_mass, weights.other));
        base = higher;
        return weights;
    }
    __device__ __forceinline__ void add(int i, int head, float value, const Weights& weights) {
        const float own = __shfl_sync(~0u, weights.own, head);
        const float other = __shfl_sync(~0u, weights.other, head);
        values[i] = __fmaf_rn(values[i], own, __fmul_rn(value, other));
    }
};

__device__ __forceinline__ int index(int i, int thread) { return thread + i * THREADS; }
// The same for all lanes of a warp, as is the next.
__device__ __forceinline__ bool is_mine(int i, int thread) {
    return RESULTS % THREADS == 0 || index(i, thread) < RESULTS;
}
__device__ __forceinline__ int head_of(int i, int thread) { return index(i, thread) / HEAD_DIM; }

__device__ __forceinline__ int item_of(const Place& place) {
    return place.row * KV_HEADS + place.head;
}
__device__ __forceinline__ int first_line(const Params& p, int block) {
    return block * (p.max_segments + 1);
}

// The block that has a segment, which begins so many tiles behind the row's first.
__device__ __forceinline__ int block_of(const Place& place, int tile, int per_block) {
    return (place.position - place.tile + tile) / per_block;
}

__device__ __forceinline__ void write_stats(
    const Params& p, int line, float base, float mass, int thread) {
    if (thread < GROUP) p.stats[line * GROUP + thread] = float2{base, mass};
}

__device__ __forceinline__ void write_out(
    const Params& p, const Place& place, const Results& results, int thread) {
    bf16* to = p.out + item_of(place) * RESULTS;
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        if (!is_mine(i, thread)) continue;
        const float mass = __shfl_sync(~0u, results.mass, head_of(i, thread));
        to[index(i, thread)] = to_bf16(results.values[i] / mass);
    }
}

// All segments of a row and kv head, of which other blocks had some.
__device__ __forceinline__ void add_segments(
    const Params& p, const Place& place, int per_block, int thread) {
    // Segments whose loads are under way together, as registers allow.
    constexpr int AT_ONCE = SHARE == 1 ? 16 : SHARE >= 16 ? 1 : (32 + SHARE - 1) / SHARE;
    const int num_segments = place.num_segments(), head = min(thread % 32, GROUP - 1);
    const int first_block = block_of(place, 0, per_block);
    const int first = first_line(p, first_block) + p.max_segments;
    Results sums;
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        if (is_mine(i, thread))
            sums.values[i] = __ldcg(p.partials + first * RESULTS + index(i, thread));
    const float2 stats = __ldcg(p.stats + first * GROUP + head);
    sums.base = stats.x, sums.mass = stats.y;
    int segment = __ldcg(p.prefixes + first_block);
    for (; segment < num_segments; segment += AT_ONCE) {
        float values[AT_ONCE][SHARE];
        float2 stats[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (segment + k >= num_segments) break;
            const int tile = (segment + k) * place.per_segment;
            const int line = first_line(p, block_of(place, tile, per_block)) + segment + k;
            stats[k] = __ldcg(p.stats + line * GROUP + head);
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (is_mine(i, thread))
                    values[k][i] = __ldcg(p.partials + line * RESULTS + index(i, thread));
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (segment + k >= num_segments) break;
            const Results::Weights weights = sums.add_stats(stats[k].x, stats[k].y);
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (is_mine(i, thread)) sums.add(i, head_of(i, thread), values[k][i], weights);
        }
    }
    write_out(p, place, sums, thread);
}

// The end of a segment, whose last tile is at `place`. is_last: this block has no more of its row
// and kv head.
__device__ __forceinline__ void end_segment(
    const Params& p, const Shared& s, const Sums& sums, Results& results, const Place& place,
    int block, int per_block, bool is_last, int warp, int lane) {
    const int thread = warp * 32 + lane, segment = place.tile / place.per_segment;
    const int own_lines = first_line(p, block);
    write_sums(s.parts, sums, warp, lane);
    __syncthreads();
    const Merged merged(s.parts, lane);

    if (results.num_segments++ == 0) results.has_first = segment == 0;
    Results::Weights to_add;
    if (results.has_first) {
        if (segment == 0)
            results.base = merged.base, results.mass = merged.mass;
        else
            to_add = results.add_stats(merged.base, merged.mass);
    } else {
        write_stats(p, own_lines + segment, merged.base, merged.mass, thread);
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        if (!is_mine(i, thread)) continue;
        const int head = head_of(i, thread);
        const float value = merged.value(head, index(i, thread) % HEAD_DIM);
        if (!results.has_first)
            p.partials[(own_lines + segment) * RESULTS + index(i, thread)] = value;
        else if (segment == 0)
            results.values[i] = value;
        else
            results.add(i, head, value, to_add);
    }

    if (is_last) {
        const int num_segments = place.num_segments();
        if (results.num_segments == num_segments) {
            write_out(p, place, results, thread);
        } else {
            if (results.has_first) {
                const int line = own_lines + p.max_segments;
#pragma unroll
                for (int i = 0; i < SHARE; i++)
                    if (is_mine(i, thread))
                        p.partials[line * RESULTS + index(i, thread)] = results.values[i];
                write_stats(p, line, results.base, results.mass, thread);
                if (thread == 0) p.prefixes[block] = results.num_segments;
            }
            __syncthreads();  // all threads' stores, then the count
            u32* arrivals = p.arrivals + block_of(place, 0, per_block);
            if (thread == 0)
                *s.arrived = arrive(arrivals, results.num_segments) + results.num_segments;
            __syncthreads();
            if (*s.arrived == num_segments) {
                if (thread == 0) *arrivals = 0;
                add_segments(p, place, per_block, thread);
            }
        }
        results.num_segments = 0;
    }
    __syncthreads();  // before a warp writes the next segment's sums over these
}

extern "C" __constant__ int shared_bytes = SHARED_BYTES;
extern "C" __constant__ int plan_shares_threads = PLAN_THREADS;
extern "C" __constant__ int decode_attention_threads = THREADS;
static_assert((MAX_ROWS + 3 * PLAN_THREADS / 32) * 4 <= SHARED_BYTES, "plan_shares's");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    decode_attention(const __grid_constant__ Params p) {
    let_next_kernel_start();
    SHARED_MEMORY(dynamic);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Shared s;
    s.ring = shared_address(dynamic) + warp * STAGES * STRIP_BYTES;
    s.parts = {(float*)(dynamic + RING_BYTES), (float2*)(dynamic + RING_BYTES + PARTS_BYTES)};
    s.arrived = (u32*)(dynamic + RING_BYTES + PARTS_BYTES + STATS_BYTES);

    // Few segments belong to every second block or fewer: to blocks of different multiprocessors.
    constexpr int APART = GRID % BLOCKS_PER_SM == 0 ? GRID / BLOCKS_PER_SM : GRID;
    const int block = blockIdx.x % APART * (GRID / APART) + blockIdx.x / APART;
    // The plan, lengths and tables are older than the kernel ahead.
    const Share share = p.shares[block];
    const int end = p.shares[block + 1].position;
    if (share.position >= end) {
        wait_for_kernel_before();  // as is promised to the kernel after this one
        return;
    }
    Loader loader(p, share, end, s.ring, warp, lane);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) loader.load(true);
    wait_for_kernel_before();

    Place place(p, share);
    Queries q;
    Sums sums;
    Results results;
    Weights<1> weights;
    u32 stage = 0;
    q.load(queries_of(p, place), lane);
    sums.clear();
    while (true) {
        // This thread's copies have landed, and with __syncwarp the warp's; and all lanes have read
        // the strip before, into whose place the next one goes.
        copies_wait<STAGES - 2>();
        __syncwarp();
        loader.load(false);
        const int num_valid = place.length - place.tile * TILE - warp * STRIP;
        weigh(weights, sums, q, s.ring + stage * STRIP_BYTES, p.scale, 0, num_valid, lane);
        if (++stage == STAGES) stage = 0;
        copies_wait<STAGES - 2>();
        __syncwarp();
        loader.load(false);
        add_values(sums, weights, s.ring + stage * STRIP_BYTES, lane);
        if (++stage == STAGES) stage = 0;

        const bool is_end = place.next_position() == end;
        if (place.is_segment_end()) {
            const bool is_last = is_end || place.is_item_end();
            end_segment(p, s, sums, results, place, block, share.per_block, is_last, warp, lane);
            if (is_end) break;
            sums.clear();
        }
        const bool is_item_end = place.is_item_end();
        place.advance(p);
        if (is_item_end) q.load(queries_of(p, place), lane);
    }
}
