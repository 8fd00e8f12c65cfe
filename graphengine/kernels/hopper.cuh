// What a Hopper GPU can do that CUDA C++ has no word for: a function an instruction, or close to
// it. PTX ISA 8: mbarrier, cp.async.bulk.tensor, wgmma, fence.proxy, griddepcontrol, and memory
// consistency. The tests have another header of the same functions, which runs kernels on a CPU.
//
// Set when compiled: GRID, the blocks of the launch, for a kernel whose blocks all wait for each
// other; and NR, the columns of `multiply`, for one that multiplies by wgmma.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

struct alignas(64) TensorMap {
    u64 opaque[16];
};

#define SHARED_MEMORY(name) extern __shared__ char name[]

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// A box of 64 elements of the inner dimension from column `c` of row `r` on.
__device__ __forceinline__ void load_box(
    u32 to, const TensorMap* map, int c, int r, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(c), "r"(r), "r"(barrier), "l"(policy)
        : "memory");
}

// Of a matrix [2I, C], its upper half beside its lower: 8 rows of the one, then 8 of the other, from
// row 8 * `group` of each on.
__device__ __forceinline__ void load_gates_and_ups(
    u32 to, const TensorMap* map, int c, int group, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(c), "r"(0), "r"(group), "r"(barrier), "l"(policy)
        : "memory");
}

// `load_box` to the same place of several blocks of the cluster, each of whose barriers gets the
// bytes; bit i of `blocks` stands for block i.
__device__ __forceinline__ void load_box_for_cluster(
    u32 to, const TensorMap* map, int c, int r, u32 barrier, u32 blocks, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
        "l"(map), "r"(c), "r"(r), "r"(barrier), "h"((unsigned short)blocks), "l"(policy)
        : "memory");
}

// The same as `load_box_for_cluster` is of `load_box`.
__device__ __forceinline__ void load_gates_and_ups_for_cluster(
    u32 to, const TensorMap* map, int c, int group, u32 barrier, u32 blocks, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %3, %4}], [%5], %6, %7;" ::"r"(to),
        "l"(map), "r"(c), "r"(0), "r"(group), "r"(barrier), "h"((unsigned short)blocks), "l"(policy)
        : "memory");
}

// Arrives at the barrier that block `block` of the cluster has at this address.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 block) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
}

// All threads of the cluster's blocks. What they wrote is not made visible.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" :::
                     "memory");
}

// Asks for memory to be brought to the L2 cache; a multiple of 16 bytes, aligned to 16.
__device__ __forceinline__ void prefetch(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// In cycles of the multiprocessor.
__device__ __forceinline__ u32 clock_now() {
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
    return now;
}

__device__ __forceinline__ u64 policy_evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ u64 policy_evict_last() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ u64 policy_evict_normal() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Rows of 128 bytes, 8 of them 1,024 bytes apart from the next 8, 128-byte swizzle.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Eights of wgmma's accumulators: in the instruction's text, and as operands.
#define TEXT_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TEXT_2 TEXT_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT_3 TEXT_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TEXT_4 TEXT_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_5 TEXT_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TEXT_6 TEXT_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TEXT_7 TEXT_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TEXT_8 TEXT_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define TEXT_9 TEXT_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define TEXT_10 TEXT_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define TEXT_11 TEXT_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TEXT_12 TEXT_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TEXT_13 TEXT_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define TEXT_14 TEXT_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FOUR(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define SUMS_1(a) FOUR(a, 0), FOUR(a, 4)
#define SUMS_2(a) SUMS_1(a), FOUR(a, 8), FOUR(a, 12)
#define SUMS_3(a) SUMS_2(a), FOUR(a, 16), FOUR(a, 20)
#define SUMS_4(a) SUMS_3(a), FOUR(a, 24), FOUR(a, 28)
#define SUMS_5(a) SUMS_4(a), FOUR(a, 32), FOUR(a, 36)
#define SUMS_6(a) SUMS_5(a), FOUR(a, 40), FOUR(a, 44)
#define SUMS_7(a) SUMS_6(a), FOUR(a, 48), FOUR(a, 52)
#define SUMS_8(a) SUMS_7(a), FOUR(a, 56), FOUR(a, 60)
#define SUMS_9(a) SUMS_8(a), FOUR(a, 64), FOUR(a, 68)
#define SUMS_10(a) SUMS_9(a), FOUR(a, 72), FOUR(a, 76)
#define SUMS_11(a) SUMS_10(a), FOUR(a, 80), FOUR(a, 84)
#define SUMS_12(a) SUMS_11(a), FOUR(a, 88), FOUR(a, 92)
#define SUMS_13(a) SUMS_12(a), FOUR(a, 96), FOUR(a, 100)
#define SUMS_14(a) SUMS_13(a), FOUR(a, 104), FOUR(a, 108)

#if NR == 8
#define ACCUMULATORS "{%0, %1, %2, %3}"
#define OPERANDS(a) FOUR(a, 0)
#define INPUTS "%4, %5"
#define SHAPE "m64n8k16"
#elif NR == 16
#define ACCUMULATORS "{" TEXT_1 "}"
#define OPERANDS(a) SUMS_1(a)
#define INPUTS "%8, %9"
#define SHAPE "m64n16k16"
#elif NR == 32
#define ACCUMULATORS "{" TEXT_2 "}"
#define OPERANDS(a) SUMS_2(a)
#define INPUTS "%16, %17"
#define SHAPE "m64n32k16"
#elif NR == 96
#define ACCUMULATORS "{" TEXT_6 "}"
#define OPERANDS(a) SUMS_6(a)
#define INPUTS "%48, %49"
#define SHAPE "m64n96k16"
#elif NR == 128
#define ACCUMULATORS "{" TEXT_8 "}"
#define OPERANDS(a) SUMS_8(a)
#define INPUTS "%64, %65"
#define SHAPE "m64n128k16"
#elif NR == 160
#define ACCUMULATORS "{" TEXT_10 "}"
#define OPERANDS(a) SUMS_10(a)
#define INPUTS "%80, %81"
#define SHAPE "m64n160k16"
#elif NR == 192
#define ACCUMULATORS "{" TEXT_12 "}"
#define OPERANDS(a) SUMS_12(a)
#define INPUTS "%96, %97"
#define SHAPE "m64n192k16"
#elif NR == 224
#define ACCUMULATORS "{" TEXT_14 "}"
#define OPERANDS(a) SUMS_14(a)
#define INPUTS "%112, %113"
#define SHAPE "m64n224k16"
#endif

#ifdef NR
// sums += 64 rows of one matrix by 16 of C, times 16 of C by NR rows of the other.
__device__ __forceinline__ void multiply(float (&sums)[NR / 2], u64 w, u64 x) {
    asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 " ACCUMULATORS ", " INPUTS
                 ", 1, 1, 1, 0, 0;"
                 : OPERANDS(sums)
                 : "l"(w), "l"(x));
}

__device__ __forceinline__ void multiply_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void multiply_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void multiply_wait_but_last() {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

// The sums are operands, so that nothing reads them earlier.
__device__ __forceinline__ void multiply_wait(float (&sums)[NR / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : OPERANDS(sums)::"memory");
}
#endif

// Some of a block's threads: COUNT, of whole warps.
template <int ID, int COUNT>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory");
}

// What this thread has written to global memory by ordinary stores can be read by the copy engine.
__device__ __forceinline__ void publish_to_copy_engine() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void grid_arrive(u32* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

#ifdef GRID
__device__ __forceinline__ void grid_wait(const u32* counter) {
    u32 arrived;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(counter)
                     : "memory");
    } while (arrived < GRID);
}
#endif

// A bit pattern that no sum has: a NaN, and not the one that arithmetic makes.
constexpr u32 EMPTY = 0xFFFFFFFF;

__device__ __forceinline__ void put_part(float* to, float sum) {
    u32 bits = __float_as_uint(sum);
    if (bits == EMPTY) bits = 0x7FFFFFFF;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

__device__ __forceinline__ uint4 look_at(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint2 look_at(const uint2* from) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ bool is_there(uint4 v) {
    return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY;
}
__device__ __forceinline__ bool is_there(uint2 v) { return v.x != EMPTY && v.y != EMPTY; }

__device__ __forceinline__ void clear(uint4* at) { *at = {EMPTY, EMPTY, EMPTY, EMPTY}; }
__device__ __forceinline__ void clear(uint2* at) { *at = {EMPTY, EMPTY}; }

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((u32)value << 16); }

__device__ __forceinline__ bf16 to_bf16(float value) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

// Two floats as bfloat16, `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory, past the L1 cache, or zeros where `bytes` is 0: this
// thread's copies since the last commit make a group.
__device__ __forceinline__ void copy_16(u32 to, const void* from, u32 bytes, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
                 "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all of this thread's groups have landed but the last PENDING.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four matrices of 8 x 8 bfloat16. Lane i gives the address of row i % 8 of matrix i / 8; it gets
// two neighbours of row i / 4 of each, and of the transposed one with load_transposed.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// The other way round: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// 16 bytes of shared memory.
__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// A matrix of 8 x 8 bfloat16, as a warp holds it.
__device__ __forceinline__ u32 transposed(u32 m) {
    u32 t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(m));
    return t;
}

// sums [16, 8] += a [16, 16] times b [16, 8], as a warp holds them.
__device__ __forceinline__ void multiply_16x8(
    float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// How many had arrived before. What was written before others arrived can be read by who is last.
__device__ __forceinline__ u32 arrive(u32* counter, u32 count) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(count)
                 : "memory");
    return before;
}

// The barriers that this thread has made can be used by all and by the copy engine.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

// Programmatic dependent launch: until the kernel before has ended, and that the next one may
// start.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
