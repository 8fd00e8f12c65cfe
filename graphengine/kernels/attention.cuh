// What a warp does with its tokens of a decode step's context: brings them to shared memory, weighs
// and adds them; and how its sums come together with those of the block's other warps.
//
// The products are transposed: K [tokens, D] times Q^T, V^T times P^T, so that the query heads of a
// kv head are eight columns, not sixteen rows, and a warp's sums fill half as many registers. The
// online softmax is FlashAttention's (Dao et al., 2022). Powers are taken of what a score lies
// above a base, not above the largest so far, and the base is moved, with all sums, where a score
// lies far above it: seldom after the first tokens. So weights are up to 2^FAR_ABOVE. They are
// rounded to bfloat16 for the product, and the mass is the sum of the rounded ones: of one token
// that outweighs all others the result is exact. Scaled scores may be up to 1e9 either way; a
// base's own rounding shows beyond. PTX ISA 8: cp.async, ldmatrix, mma, movmatrix; what a lane
// holds of a matrix is from there.
//
// Set when compiled: GROUP (query heads of a kv head), HEAD_DIM, WARPS, of a block. Letters: D head
// dim.

#pragma once

#include <hopper.cuh>

constexpr int COLUMNS = (GROUP + 7) / 8;  // eight query heads each
constexpr int STEPS = HEAD_DIM / 16;
constexpr int TOKEN_BYTES = HEAD_DIM * 2;
constexpr int TILE_TOKENS = 16;  // rows of one product
constexpr int RESULTS = GROUP * HEAD_DIM;
constexpr float FAR_ABOVE = 8.0f;  // in powers of two

// Sums of a warp in shared memory: a query head's are 8 banks from those of the next but one.
constexpr int PITCH = HEAD_DIM + 4;
constexpr int PARTS_BYTES = WARPS * GROUP * PITCH * 4;
constexpr int STATS_BYTES = WARPS * GROUP * 8;

static_assert(GROUP <= 16 && (HEAD_DIM == 64 || HEAD_DIM == 128), "see the host side");

// The base of who has had no token: below all scaled scores, and finite, since it is subtracted.
constexpr float LOWEST = -1e30f;
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000); }

// TOKENS tokens of a kv head to where `weigh` and `add_values` read them: a group's copies of this
// thread. Zeros instead of those before first_valid and from end_valid on: past a context's end
// slots were never written and may be NaN.
template <int TOKENS>
__device__ __forceinline__ void copy_tokens(
    u32 to, const bf16* from, long long slot_stride, int first_valid, int end_valid, int lane,
    u64 policy) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    constexpr int AT_ONCE = 32 / CHUNKS;  // tokens
    const int chunk = lane % CHUNKS;
    from += lane / CHUNKS * slot_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < TOKENS / AT_ONCE; i++) {
        const int token = lane / CHUNKS + i * AT_ONCE;
        const bool is_valid = token >= first_valid && token < end_valid;
        copy_16(to + token * TOKEN_BYTES + (chunk ^ token % 8) * 16,
                from + i * AT_ONCE * slot_stride, is_valid ? 16 : 0, policy);
    }
}

// Of one warp: sums over its tokens. A lane has rows lane / 4 and 8 more of every 16, and columns
// lane % 4 * 2 and the next of every 8: the layout of an accumulator.
struct Sums {
    float values[COLUMNS][STEPS][4];  // [D, query heads]
    float base[COLUMNS][2];
    float mass[COLUMNS][2];  // this lane's tokens only

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
            for (int j = 0; j < STEPS; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) values[c][j][i] = 0.0f;
            base[c][0] = base[c][1] = LOWEST;
            mass[c][0] = mass[c][1] = 0.0f;
        }
    }
};

struct Queries {
    u32 values[COLUMNS][STEPS][2];

    // from: those of a kv head, [GROUP, D].
    __device__ __forceinline__ void load(const bf16* from, int lane) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int head = c * 8 + lane / 4;
            const u32* pairs = (const u32*)(from + head * HEAD_DIM) + lane % 4;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                values[c][k][0] = head < GROUP ? __ldcg(pairs + k * 8) : 0;
                values[c][k][1] = head < GROUP ? __ldcg(pairs + k * 8 + 4) : 0;
            }
        }
    }
};

// Of TILES * TILE_TOKENS tokens [tokens, query heads], as the second product's operand.
template <int TILES>
struct Weights {
    u32 values[TILES][COLUMNS][2];
};

// Powers of two of the scores, scaled. Tokens before first_valid and from end_valid on have none.
template <int TILES>
__device__ __forceinline__ void weigh(
    Weights<TILES>& weights, Sums& sums, const Queries& q, u32 keys, float scale, int first_valid,
    int end_valid, int lane) {
    float scores[TILES][COLUMNS][4];
    const u32 token = keys + lane % 16 * TOKEN_BYTES;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        constexpr int CHAINS = TILES == 1 ? 2 : 1;  // sums that do not wait for each other
        float chains[COLUMNS][CHAINS][4];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int i = 0; i < 4 * CHAINS; i++) chains[c][i / 4][i % 4] = 0.0f;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            u32 key[4];
            load_matrices(key, token + t * TILE_TOKENS * TOKEN_BYTES +
                                   ((k * 2 + lane / 16) ^ lane % 8) * 16);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                multiply_16x8(chains[c][k % CHAINS], key, q.values[c][k]);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[t][c][i] = CHAINS == 1 ? chains[c][0][i]
                                              : chains[c][0][i] + chains[c][CHAINS - 1][i];
    }
    if (first_valid > 0 || end_valid < TILES * TILE_TOKENS) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = t * TILE_TOKENS + lane / 4 + i / 2 * 8;
                if (token >= first_valid && token < end_valid) continue;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) scores[t][c][i] = minus_infinity();
            }
    }
    float largest[COLUMNS][2];
    bool is_far = false;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float& most = largest[c][i];
            most = fmaxf(scores[0][c][i], scores[0][c][i + 2]);
#pragma unroll
            for (int t = 1; t < TILES; t++)
                most = fmaxf(most, fmaxf(scores[t][c][i], scores[t][c][i + 2]));
            is_far |= __fmaf_rn(most, scale, -sums.base[c][i]) > FAR_ABOVE;
        }
    if (__any_sync(~0u, is_far)) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float most = largest[c][i];
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2)
                    most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
                const float base = fmaxf(sums.base[c][i], most * scale);
                const float shrink = exp2_fast(sums.base[c][i] - base);
                sums.base[c][i] = base;
                sums.mass[c][i] *= shrink;
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    sums.values[c][j][i] *= shrink;
                    sums.values[c][j][i + 2] *= shrink;
                }
            }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            float s[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[i] = exp2_fast(__fmaf_rn(scores[t][c][i], scale, -sums.base[c][i % 2]));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 pair = pack_bf16(s[i * 2], s[i * 2 + 1]);
                sums.mass[c][0] += __uint_as_float(pair << 16);
                sums.mass[c][1] += __uint_as_float(pair & 0xFFFF0000);
                weights.values[t][c][i] = transposed(pair);
            }
        }
}

template <int TILES>
__device__ __forceinline__ void add_values(
    Sums& sums, const Weights<TILES>& weights, u32 values, int lane) {
    const u32 token = values + (lane % 8 + lane / 16 * 8) * TOKEN_BYTES;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            u32 value[4];
            load_transposed(value, token + t * TILE_TOKENS * TOKEN_BYTES +
                                       ((j * 2 + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                multiply_16x8(sums.values[c][j], value, weights.values[t][c]);
        }
}

// Where the warps of a block put their sums.
struct Parts {
    float* sums;    // [WARPS, GROUP, PITCH]
    float2* stats;  // [WARPS, GROUP]: base and mass
};

__device__ __forceinline__ void write_sums(
    const Parts& parts, const Sums& sums, int warp, int lane) {
    const int column = lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float mass = sums.mass[c][i];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) mass += __shfl_xor_sync(~0u, mass, lanes);
            const int head = c * 8 + column + i;
            if (head >= GROUP) continue;
            if (lane < 4) parts.stats[warp * GROUP + head] = {sums.base[c][i], mass};
            float* to = parts.sums + (warp * GROUP + head) * PITCH + lane / 4;
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                to[j * 16] = sums.values[c][j][i];
                to[j * 16 + 8] = sums.values[c][j][i + 2];
            }
        }
    }
}

// The sums of all warps, when all have written theirs. Lane h has what is query head h's, and each
// function is for all lanes of a warp at once.
struct Merged {
    const Parts& parts;
    float weights[WARPS];
    float base, mass;

    __device__ __forceinline__ Merged(const Parts& parts, int lane) : parts(parts) {
        float2 stats[WARPS];
        base = minus_infinity();
        mass = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            stats[i] = parts.stats[i * GROUP + min(lane, GROUP - 1)];
            base = fmaxf(base, stats[i].x);
        }
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            weights[i] = exp2_fast(stats[i].x - base);
            mass += weights[i] * stats[i].y;
        }
    }

    // Not yet divided by the mass.
    __device__ __forceinline__ float value(int head, int dim) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            sum += __shfl_sync(~0u, weights[i], head) *
                   parts.sums[(i * GROUP + head) * PITCH + dim];
        return sum;
    }
};
