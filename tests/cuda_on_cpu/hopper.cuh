// The functions of graphengine/kernels/hopper.cuh on a CPU: each thread of the grid is a fiber, one
// runs at a time, and the next is drawn at random wherever one waits for another. Copies of the copy
// engine land late, in any order. What it cannot show: memory that is seen late, and speed.

#pragma once

#include <ucontext.h>

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

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

struct uint1 {
    u32 x;
};
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
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

// What the tests put in its place: address, rows, columns, bytes between rows, rows of a box.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

namespace emulator {

constexpr u32 SHARED_ADDRESS = 0x2340;  // not aligned, as a real one may not be

struct Barrier {
    int count, missing, bytes = 0;
    u32 phase = 0;
    void settle() {
        if (missing == 0 && bytes == 0) {
            phase ^= 1;
            missing = count;
        }
    }
};

// Of threads, by number of those that meet.
struct Meeting {
    int arrived = 0;
    std::vector<int> waiting;
};

struct Copy {
    u32 to, barrier;
    TensorMap map;
    int column, row;
};

struct Block {
    std::vector<char> shared;
    std::map<u32, Barrier> barriers;
    std::map<int, Meeting> meetings;
    std::vector<Copy> copies;
    u64 exchanged[16][32];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int block, thread;
    const char* where = "";
};

struct Machine {
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    std::vector<int> runnable;
    std::function<void()> body;
    std::mt19937 random;
    ucontext_t main;
    int current = 0;
    u64 turns = 0;
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
            const u64 row = copy.row + r, column = copy.column + chunk * 8;
            if (row < map[1] && column < map[2])
                std::memcpy(to, (const char*)map[0] + row * map[3] + column * 2, 16);
            else
                std::memset(to, 0, 16);
        }
    Barrier& barrier = block.barriers.at(copy.barrier);
    barrier.bytes -= (int)map[4] * 128;
    barrier.settle();
}

// Runs another fiber; this one goes on when it is drawn again.
inline void leave() {
    Machine& m = machine;
    if (++m.turns > MOST_TURNS) {
        std::map<std::string, int> waiting;
        for (int i : m.runnable) {
            const Fiber& f = m.fibers[i];
            const char* role = f.thread < 256 ? "consumer" : f.thread == 256 ? "weights" : "inputs";
            waiting["block " + std::to_string(f.block) + ", " + role + " at " + f.where]++;
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
    const int before = m.current;
    if (m.runnable.empty()) {
        std::fprintf(stderr, "all threads wait for each other\n");
        std::abort();
    }
    m.current = m.runnable[m.random() % m.runnable.size()];
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

inline void meet(int id, int count) {
    Meeting& meeting = block().meetings[id];
    if (++meeting.arrived == count) {
        meeting.arrived = 0;
        for (int other : meeting.waiting) machine.runnable.push_back(other);
        meeting.waiting.clear();
        return;
    }
    meeting.waiting.push_back(machine.current);
    remove_current();
    leave();
}

inline void meet_warp() { meet(100 + fiber().thread / 32, 32); }

template <typename T>
inline T exchange(T value, int from) {
    static_assert(sizeof(T) <= 8);
    auto& slots = block().exchanged[fiber().thread / 32];
    std::memcpy(&slots[fiber().thread % 32], &value, sizeof(T));
    meet_warp();
    T got;
    std::memcpy(&got, &slots[from], sizeof(T));
    meet_warp();
    return got;
}

inline void enter() {
    machine.body();
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
                   std::function<void()> body) {
    Machine& m = machine;
    m = Machine();
    m.random.seed(seed);
    m.body = std::move(body);
    m.blocks.resize(num_blocks);
    for (Block& block : m.blocks) {
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
#define SHARED_MEMORY(name) char* const name = emulator::block().shared.data()

inline void __syncthreads() { emulator::meet(0, 320); }
inline float __shfl_xor_sync(u32, float value, int lanes) {
    return emulator::exchange(value, (emulator::fiber().thread % 32) ^ lanes);
}
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
    b.missing--;
    b.settle();
}
inline void barrier_wait(u32 barrier, u32 parity) {
    emulator::fiber().where = "a barrier";
    while (emulator::block().barriers.at(barrier).phase == parity) emulator::leave();
}
inline void load_box(u32 to, const TensorMap* map, int c, int r, u32 barrier, u64) {
    emulator::block().copies.push_back({to, barrier, *map, c, r});
}
inline u64 policy_evict_first() { return 0; }
inline u64 policy_evict_last() { return 0; }

inline u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

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
// These keep the threads of a warp together, as the products themselves do.
inline void multiply_begin() { emulator::meet_warp(); }
inline void multiply_commit() { emulator::meet_warp(); }
inline void multiply_wait_but_last() { emulator::meet_warp(); }
inline void multiply_wait(float (&)[NR / 2]) { emulator::meet_warp(); }

inline void consumers_meet() { emulator::meet(1, 256); }
inline void publish_to_copy_engine() {}
inline void publish_barriers() {}
inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}
inline void grid_arrive(u32* counter) { ++*counter; }
inline void grid_wait(const u32* counter) {
    emulator::fiber().where = "a counter";
    while (*(const volatile u32*)counter < GRID) emulator::leave();
}

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
inline bool is_there(uint1 v) { return v.x != EMPTY; }
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
