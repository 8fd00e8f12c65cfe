// The functions of graphengine/kernels/hopper.cuh on a CPU: each thread of the grid is a fiber, one
// runs at a time, and the next is drawn at random wherever one waits for another. Copies, of the copy
// engine or of a thread, land late, in any order. What it cannot show: memory that is seen late, and
// speed.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
using std::max;
using std::min;

// What the tests put in its place: address, rows, columns, bytes between rows, rows of a box; and of
// gates over ups the rows of each, else 0.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

namespace emulator {

constexpr u32 SHARED_ADDRESS = 0x2340;  // not aligned, as a real one may not be
#ifndef CLUSTER_ROWS
#define CLUSTER_ROWS 1
#endif
constexpr int CLUSTER_BLOCKS = 2 * CLUSTER_ROWS;  // of a kernel that has clusters

struct Barrier {
    int count, missing, bytes = 0;
    u32 phase = 0;
    bool has_news = false;  // loads that nobody has waited for yet
    void settle() {
        if (missing == 0 && bytes == 0) {
            phase ^= 1;
            missing = count;
        }
    }
};

// Of threads, by number of those that meet.
struct Meeting {
    int arrived = 0, times = 0;
    std::vector<int> waiting;
};

struct Copy {
    u32 to, barrier;
    TensorMap map;
    int column, row;
};

// What the lanes of a warp give to an instruction of all of them, and what each gets.
struct Exchange {
    alignas(16) char given[32][64], got[32][64];
};

struct Block {
    int running;  // threads
    std::vector<char> shared;
    std::map<u32, Barrier> barriers;
    std::map<int, Meeting> meetings;
    std::vector<Copy> copies;
    Exchange exchanges[16];
};

// 16 bytes on their way to shared memory, by a thread of its own: as they were when it asked.
struct ThreadCopy {
    u32 to;
    int group;
    char bytes[16];
};

// What the kernel ahead writes: with programmatic dependent launch, while this one runs already.
struct Write {
    char* to;
    const char* from;
    u64 num_bytes;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int block, thread;
    const char* where = "";
    std::vector<ThreadCopy> copies;
    int num_groups = 0;
    bool has_waited = false;
};

struct Machine {
    std::vector<Block> blocks;
    std::map<int, Meeting> cluster_meetings;
    std::vector<Fiber> fibers;
    std::vector<int> runnable;
    std::function<void()> body;
    std::mt19937 random;
    std::vector<Write> kernel_before;
    ucontext_t main;
    int current = 0, num_threads = 0, slow = -1;
    u64 turns = 0;
    std::vector<std::pair<const void*, u32>> prefetched;
    bool is_over = false;
};

inline Machine machine;
// A step of the tests' takes a hundredth of it.
constexpr u64 MOST_TURNS = 50'000'000;

inline Fiber& fiber() { return machine.fibers[machine.current]; }
inline Block& block() { return machine.blocks[fiber().block]; }
inline char* at(u32 address) { return block().shared.data() + (address - SHARED_ADDRESS); }

inline void land(Block& block, const Copy& copy) {
    const u64* map = copy.map.opaque;
    for (u64 r = 0; r < map[4]; r++)
        for (int chunk = 0; chunk < 8; chunk++) {
            char* to = block.shared.data() + (copy.to - SHARED_ADDRESS) + r * 128 +
                       (chunk ^ (int)(copy.to / 128 + r) % 8) * 16;
            const u64 gates = map[5], column = copy.column + chunk * 8;
            const u64 of_gate = copy.row * 8 + r / 16 * 8 + r % 8;
            const u64 row = gates ? of_gate + r / 8 % 2 * gates : copy.row + r;
            const bool is_inside = gates ? of_gate < gates : row < map[1];
            if (is_inside && column < map[2])
                std::memcpy(to, (const char*)map[0] + row * map[3] + column * 2, 16);
            else
                std::memset(to, 0, 16);
        }
    Barrier& barrier = block.barriers.at(copy.barrier);
    barrier.bytes -= (int)map[4] * 128;
    barrier.settle();
}

// Lands a thread's copies of the groups before `end`.
inline void land_groups(Fiber& f, int end) {
    std::vector<ThreadCopy> later;
    for (const ThreadCopy& copy : f.copies) {
        if (copy.group < end)
            std::memcpy(machine.blocks[f.block].shared.data() + (copy.to - SHARED_ADDRESS),
                        copy.bytes, 16);
        else
            later.push_back(copy);
    }
    f.copies = later;
}

// Runs another fiber; this one goes on when it is drawn again.
inline void leave() {
    Machine& m = machine;
    if (++m.turns > MOST_TURNS) {
        std::map<std::string, int> waiting;
        for (int i : m.runnable) {
            const Fiber& f = m.fibers[i];
            const std::string warp = std::to_string(f.thread / 32);
            waiting["block " + std::to_string(f.block) + ", warp " + warp + " at " + f.where]++;
        }
        std::fprintf(stderr, "the kernel does not end; threads that wait:\n");
        for (auto& [what, count] : waiting) std::fprintf(stderr, "%s: %d\n", what.c_str(), count);
        std::abort();
    }
    for (Block& block : m.blocks)
        if (!block.copies.empty() && m.random() % 64 == 0) {
            const size_t i = m.random() % block.copies.size();
            const Copy copy = block.copies[i];
            block.copies.erase(block.copies.begin() + i);
            land(block, copy);
        }
    if (Fiber& f = fiber(); !f.copies.empty() && m.random() % 64 == 0)
        land_groups(f, f.copies.front().group + (int)(m.random() % 2));
    const int before = m.current;
    if (m.runnable.empty()) {
        std::fprintf(stderr, "all threads wait for each other\n");
        std::abort();
    }
    // One warp is slow for a while, so that the others run far ahead of it.
    if (m.turns % 50'000 == 0) m.slow = (int)(m.random() % (m.fibers.size() / 32));
    m.current = m.runnable[m.random() % m.runnable.size()];
    if (m.current / 32 == m.slow) m.current = m.runnable[m.random() % m.runnable.size()];
    if (m.current != before) swapcontext(&m.fibers[before].context, &fiber().context);
}

inline void remove_current() {
    auto& runnable = machine.runnable;
    for (size_t i = 0; i < runnable.size(); i++)
        if (runnable[i] == machine.current) {
            runnable[i] = runnable.back();
            runnable.pop_back();
            return;
        }
}

inline void meet(Meeting& meeting, int count) {
    if (++meeting.arrived == count) {
        meeting.arrived = 0;
        meeting.times++;
        for (int other : meeting.waiting) machine.runnable.push_back(other);
        meeting.waiting.clear();
        return;
    }
    meeting.waiting.push_back(machine.current);
    remove_current();
    leave();
}

inline void meet(int id, int count) { meet(block().meetings[id], count); }

// A block of this one's cluster, which must have begun and not have ended.
inline Block& neighbour(int rank) {
    const int cluster = fiber().block / CLUSTER_BLOCKS;
    Block& other = machine.blocks[cluster * CLUSTER_BLOCKS + rank];
    if (machine.cluster_meetings[cluster].times == 0) {
        std::fprintf(stderr, "a block of the cluster may not have begun\n");
        std::abort();
    }
    if (other.running == 0) {
        std::fprintf(stderr, "a block of the cluster has ended too early\n");
        std::abort();
    }
    return other;
}

inline void meet_warp() { meet(100 + fiber().thread / 32, 32); }
inline void meet_warpgroup() { meet(200 + fiber().thread / 128, 128); }

// An instruction of a warp: `compute` makes of what the lanes give, [32], what they get, [32], when
// the last of them is there.
template <typename Got, typename Given, typename Compute>
inline Got together(const Given& given, Compute compute) {
    static_assert(sizeof(Given) <= 64 && sizeof(Got) <= 64);
    const int warp = fiber().thread / 32, lane = fiber().thread % 32;
    Exchange& exchange = block().exchanges[warp];
    std::memcpy(exchange.given[lane], &given, sizeof(Given));
    if (block().meetings[100 + warp].arrived == 31) {
        Given all[32];
        Got got[32];
        for (int i = 0; i < 32; i++) std::memcpy(&all[i], exchange.given[i], sizeof(Given));
        compute(all, got);
        for (int i = 0; i < 32; i++) std::memcpy(exchange.got[i], &got[i], sizeof(Got));
    }
    meet_warp();
    Got own;
    std::memcpy(&own, exchange.got[lane], sizeof(Got));
    return own;
}

template <typename T>
inline T exchange(T value, int from) {
    struct Given {
        T value;
        int from;
    };
    return together<T>(Given{value, from}, [](const Given* all, T* got) {
        for (int i = 0; i < 32; i++) got[i] = all[all[i].from].value;
    });
}

inline void enter() {
    machine.body();
    block().running--;
    if (!fiber().copies.empty()) {
        std::fprintf(stderr, "a thread has ended and its copies are under way\n");
        std::abort();
    }
    if (block().running == 0)
        for (const auto& [address, barrier] : block().barriers)
            if (barrier.has_news) {
                std::fprintf(stderr, "a block has ended and nobody waited for its loads\n");
                std::abort();
            }
    remove_current();
    if (machine.runnable.empty()) {
        machine.is_over = true;
        for (Block& block : machine.blocks)
            if (!block.copies.empty()) {
                std::fprintf(stderr, "copies are under way when a block has ended\n");
                std::abort();
            }
        setcontext(&machine.main);
    }
    leave();
    std::abort();
}

inline void launch(int num_blocks, int num_threads, int shared_bytes, u32 seed,
                   std::function<void()> body, std::vector<Write> kernel_before = {}) {
    Machine& m = machine;
    m = Machine();
    m.random.seed(seed);
    m.kernel_before = std::move(kernel_before);
    m.num_threads = num_threads;
    m.body = std::move(body);
    m.blocks.resize(num_blocks);
    for (Block& block : m.blocks) {
        block.running = num_threads;
        block.shared.resize(shared_bytes);
        // As left by another kernel: NaN in float32 and bfloat16.
        std::memset(block.shared.data(), 0x7F, shared_bytes);
    }
    m.fibers.resize(num_blocks * num_threads);
    for (size_t i = 0; i < m.fibers.size(); i++) {
        Fiber& f = m.fibers[i];
        f.block = (int)i / num_threads, f.thread = (int)i % num_threads;
        constexpr size_t STACK = 64 << 10;
        f.stack.reset(new char[STACK]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        makecontext(&f.context, enter, 0);
        m.runnable.push_back((int)i);
    }
    m.current = 0;
    swapcontext(&m.main, &m.fibers[0].context);
}

struct Index {
    int x;
};

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::fiber().thread})
#define blockIdx (emulator::Index{emulator::fiber().block})
#define gridDim (emulator::Index{(int)emulator::machine.blocks.size()})
#define SHARED_MEMORY(name) char* const name = emulator::block().shared.data()

inline void __syncthreads() { emulator::meet(0, emulator::machine.num_threads); }
inline void __syncwarp() { emulator::meet_warp(); }
template <typename T>
inline T __shfl_xor_sync(u32, T value, int lanes) {
    return emulator::exchange(value, (emulator::fiber().thread % 32) ^ lanes);
}
template <typename T>
inline T __shfl_up_sync(u32, T value, int lanes) {
    return emulator::exchange(value, max(0, emulator::fiber().thread % 32 - lanes));
}
template <typename T>
inline T __shfl_sync(u32, T value, int lane) {
    return emulator::exchange(value, lane);
}
inline bool __any_sync(u32, bool value) {
    return emulator::together<bool>(value, [](const bool* all, bool* got) {
        const bool any = std::any_of(all, all + 32, [](bool one) { return one; });
        std::fill(got, got + 32, any);
    });
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
template <typename T>
inline T __ldcg(const T* from) {
    return *from;
}
inline u32 __float_as_uint(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline u32 shared_address(const void* pointer) {
    return (u32)((const char*)pointer - emulator::block().shared.data()) + emulator::SHARED_ADDRESS;
}
inline void barrier_init(u32 barrier, u32 count) {
    emulator::block().barriers[barrier] = {(int)count, (int)count};
}
inline void barrier_arrive(u32 barrier) {
    auto& b = emulator::block().barriers.at(barrier);
    b.missing--;
    b.settle();
}
inline void barrier_expect(u32 barrier, u32 bytes) {
    auto& b = emulator::block().barriers.at(barrier);
    b.bytes += (int)bytes;
    b.has_news = true;
    b.missing--;
    b.settle();
}
inline void barrier_wait(u32 barrier, u32 parity) {
    emulator::fiber().where = "a barrier";
    auto& b = emulator::block().barriers.at(barrier);
    while (b.phase == parity) emulator::leave();
    if (b.missing == b.count) b.has_news = false;
}
inline void load_box(u32 to, const TensorMap* map, int c, int r, u32 barrier, u64) {
    emulator::block().copies.push_back({to, barrier, *map, c, r});
}
inline void load_gates_and_ups(
    u32 to, const TensorMap* map, int c, int group, u32 barrier, u64) {
    emulator::block().copies.push_back({to, barrier, *map, c, group});
}
inline void load_box_for_cluster(
    u32 to, const TensorMap* map, int c, int r, u32 barrier, u32 blocks, u64) {
    for (int i = 0; i < emulator::CLUSTER_BLOCKS; i++)
        if (blocks >> i & 1) emulator::neighbour(i).copies.push_back({to, barrier, *map, c, r});
}
inline void load_gates_and_ups_for_cluster(
    u32 to, const TensorMap* map, int c, int group, u32 barrier, u32 blocks, u64 policy) {
    load_box_for_cluster(to, map, c, group, barrier, blocks, policy);
}
inline void barrier_arrive_at(u32 barrier, u32 block) {
    auto& b = emulator::neighbour(block).barriers.at(barrier);
    b.missing--;
    b.settle();
}
inline void meet_cluster() {
    const int cluster = emulator::fiber().block / emulator::CLUSTER_BLOCKS;
    emulator::meet(emulator::machine.cluster_meetings[cluster],
                   emulator::CLUSTER_BLOCKS * emulator::machine.num_threads);
}
inline void prefetch(const void* from, u32 bytes) {
    emulator::machine.prefetched.push_back({from, bytes});
}
inline u32 clock_now() {
    static u32 now;
    return now += 1000;
}
inline u64 policy_evict_first() { return 0; }
inline u64 policy_evict_last() { return 0; }
inline u64 policy_evict_normal() { return 0; }

inline u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#ifdef NR
namespace emulator {

inline float element(u64 descriptor, u32 outer, u32 inner) {
    const u32 start = (u32)(descriptor & 0x3FFF) << 4, stride = (u32)(descriptor >> 32 & 0x3FFF) << 4;
    const u32 address = start + outer / 8 * stride + outer % 8 * 128 + inner * 2;
    bf16 bits;
    std::memcpy(&bits, at(address ^ (address >> 7 & 7) << 4), 2);
    return __uint_as_float((u32)bits << 16);
}

inline void multiply(float* sums, u64 a, u64 b) {
    const int warp = fiber().thread / 32 % 4, lane = fiber().thread % 32;
    for (int i = 0; i < NR / 2; i++) {
        const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8;
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++)
            sums[i] += element(a, row, k) * element(b, column, k);
    }
}

}  // namespace emulator

inline void multiply(float (&sums)[NR / 2], u64 w, u64 x) { emulator::multiply(sums, w, x); }
// These keep the threads of a warpgroup together, as the products themselves do.
inline void multiply_begin() { emulator::meet_warpgroup(); }
inline void multiply_commit() { emulator::meet_warpgroup(); }
inline void multiply_wait_but_last() { emulator::meet_warpgroup(); }
inline void multiply_wait(float (&)[NR / 2]) { emulator::meet_warpgroup(); }
#endif

template <int ID, int COUNT>
inline void meet() {
    emulator::meet(ID, COUNT);
}
inline void publish_to_copy_engine() {}
inline void publish_barriers() {}
// The kernel ahead ends when the first thread waits for it, and not before.
inline void wait_for_kernel_before() {
    auto& writes = emulator::machine.kernel_before;
    if (!emulator::fiber().has_waited) emulator::leave();
    emulator::fiber().has_waited = true;
    for (const auto& write : writes) std::memcpy(write.to, write.from, write.num_bytes);
}
inline void let_next_kernel_start() {}
inline void grid_arrive(u32* counter) { ++*counter; }
#ifdef GRID
inline void grid_wait(const u32* counter) {
    emulator::fiber().where = "a counter";
    while (*(const volatile u32*)counter < GRID) emulator::leave();
}
#endif

constexpr u32 EMPTY = 0xFFFFFFFF;
inline void put_part(float* to, float sum) { std::memcpy(to, &sum, 4); }
template <typename Bits>
inline Bits look_at(const Bits* from) {
    emulator::fiber().where = "a part";
    emulator::leave();
    return *(const Bits*)from;
}
inline bool is_there(uint4 v) {
    return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY;
}
inline bool is_there(uint2 v) { return v.x != EMPTY && v.y != EMPTY; }
template <typename Bits>
inline void clear(Bits* at) {
    std::memset(at, 0xFF, sizeof(Bits));
}

inline float to_float(bf16 value) { return __uint_as_float((u32)value << 16); }
inline bf16 to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if (std::isnan(value)) return 0x7FFF;
    bits += 0x7FFF + (bits >> 16 & 1);
    return (bf16)(bits >> 16);
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline float exp2_fast(float x) { return std::exp2(x); }

inline void copy_16(u32 to, const void* from, u32 num_bytes, u64) {
    emulator::Fiber& f = emulator::fiber();
    const char* start = (const char*)from;
    if (!f.has_waited && num_bytes)
        for (const auto& write : emulator::machine.kernel_before)
            if (start + 16 > write.to && start < write.to + write.num_bytes) {
                std::fprintf(stderr, "a copy of what the kernel ahead has yet to write\n");
                std::abort();
            }
    emulator::ThreadCopy copy = {to, f.num_groups, {}};
    std::memcpy(copy.bytes, from, num_bytes);
    f.copies.push_back(copy);
}
inline void copies_commit() { emulator::fiber().num_groups++; }
template <int PENDING>
inline void copies_wait() {
    emulator::leave();
    emulator::land_groups(emulator::fiber(), emulator::fiber().num_groups - PENDING);
}

namespace emulator {

struct Four {
    u32 m[4];
};
struct Product {
    float sums[4];
    u32 a[4], b[2];
};
struct Sums {
    float values[4];
};

inline bf16 half_at(u32 address) {
    bf16 value;
    std::memcpy(&value, at(address), 2);
    return value;
}

inline void load_matrices(u32 (&m)[4], u32 address, bool is_transposed) {
    const Four got = together<Four>(address, [=](const u32* all, Four* got) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                u32 bits = 0;
                for (int half = 0; half < 2; half++) {
                    const int row = lane / 4, column = lane % 4 * 2 + half;
                    bits |= (u32)(is_transposed ? half_at(all[i * 8 + column] + row * 2)
                                                : half_at(all[i * 8 + row] + column * 2))
                            << half * 16;
                }
                got[lane].m[i] = bits;
            }
    });
    std::memcpy(m, got.m, sizeof(m));
}

inline float half_of(u32 pair, int half) {
    return __uint_as_float(half ? pair & 0xFFFF0000 : pair << 16);
}

inline void multiply_all(const Product* all, Sums* got) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8] =
                    half_of(all[lane].a[i], half);
            for (int i = 0; i < 2; i++)
                b[lane % 4 * 2 + half + i * 8][lane / 4] = half_of(all[lane].b[i], half);
        }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            float sum = all[lane].sums[i];
            for (int k = 0; k < 16; k++)
                sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
            got[lane].values[i] = sum;
        }
}

}  // namespace emulator

inline void load_matrices(u32 (&m)[4], u32 address) { emulator::load_matrices(m, address, false); }
inline void load_transposed(u32 (&m)[4], u32 address) { emulator::load_matrices(m, address, true); }
inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    struct Given {
        u32 address, m[4];
    };
    emulator::together<u32>(Given{address, {a, b, c, d}}, [](const Given* all, u32*) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                std::memcpy(emulator::at(all[i * 8 + lane / 4].address + lane % 4 * 4),
                            &all[lane].m[i], 4);
    });
}
inline uint4 load_shared(u32 address) {
    uint4 v;
    std::memcpy(&v, emulator::at(address), 16);
    return v;
}
inline u32 transposed(u32 m) {
    return emulator::together<u32>(m, [](const u32* all, u32* got) {
        for (int lane = 0; lane < 32; lane++) {
            u32 bits = 0;
            for (int half = 0; half < 2; half++) {
                // Element (lane % 4 * 2 + half, lane / 4) of the matrix given.
                const u32 pair = all[(lane % 4 * 2 + half) * 4 + lane / 4 / 2];
                bits |= (pair >> lane / 4 % 2 * 16 & 0xFFFF) << half * 16;
            }
            got[lane] = bits;
        }
    });
}
inline void multiply_16x8(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::Product product;
    std::memcpy(product.sums, sums, sizeof(sums));
    std::memcpy(product.a, a, sizeof(a));
    std::memcpy(product.b, b, sizeof(b));
    const auto got = emulator::together<emulator::Sums>(product, emulator::multiply_all);
    std::memcpy(sums, got.values, sizeof(sums));
}
inline u32 arrive(u32* counter, u32 count) {
    emulator::leave();
    const u32 before = *counter;
    *counter += count;
    return before;
}
