// The instructions of the attention kernel, each with what older GPUs do instead.

#pragma once

#ifdef TURBOKV_ON_CPU
#    include "common.cuh"  // of tests/cuda/on-cpu, which has them all for a CPU
#else

#    include <cuda_fp16.h>

#    include <cstdint>

// Bit operations run at half the rate of multiplications, and decoding consists of them: where a multiplication does
// the same as a shift, it is asked for.
static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t y;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

// Byte i of the result is byte `selector nibble i` of a (0-3) and b (4-7); with its highest bit set, the sign of that
// byte, eight times. (__byte_perm ignores the highest bits.)
static __device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

// a[16][32] * b[32][8] + c[16][8], int8 -> int32. Lane 4g + t holds, four values of k to a register,
//   a: {a[g][4t..], a[g+8][4t..], a[g][16+4t..], a[g+8][16+4t..]}   b: {b[4t..][g], b[16+4t..][g]}
//   c: {c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1]}
static __device__ __forceinline__ int4 mma_s8(const uint4 a, uint32_t b0, uint32_t b1, const int4 c) {
    int4 d;
#    if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
#    else
    d                 = c;
    const auto eights = [](int & d0, int & d1, uint32_t a, uint32_t b) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(d0), "+r"(d1)
            : "r"(a), "r"(b));
    };
    eights(d.x, d.y, a.x, b0);
    eights(d.x, d.y, a.z, b1);
    eights(d.z, d.w, a.y, b0);
    eights(d.z, d.w, a.w, b1);
#    endif
    return d;
}

// a[16][16] * b[16][8] + c[16][8], fp16 -> float. Lane 4g + t holds, two values of k to a register,
//   a: {a[g][2t..], a[g+8][2t..], a[g][8+2t..], a[g+8][8+2t..]}   b: {b[2t..][g], b[8+2t..][g]}   c: as above
static __device__ __forceinline__ float4 mma_f16(const uint4 a, uint32_t b0, uint32_t b1, const float4 c) {
    float4 d;
#    if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w)
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
#    else
    d                 = c;
    const auto eights = [&](uint32_t a0, uint32_t a1, uint32_t b) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d.x), "+f"(d.y), "+f"(d.z), "+f"(d.w)
            : "r"(a0), "r"(a1), "r"(b));
    };
    eights(a.x, a.y, b0);
    eights(a.z, a.w, b1);
#    endif
    return d;
}

// A matrix of 8 x 8 halves of words, transposed. Lane 4g + t holds elements 2t and 2t + 1 of row g, the first in the
// low half, and gets those of column g.
static __device__ __forceinline__ uint32_t transpose_halves(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 16 bytes, both sides aligned to 16, from global to shared memory, in the background where the GPU can.
static __device__ __forceinline__ void copy_async_16(void * shared, const void * global) {
#    if __CUDA_ARCH__ >= 800
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#    else
    *(uint4 *) shared = *(const uint4 *) global;
#    endif
}

// Ends a group of copies of this thread.
static __device__ __forceinline__ void copy_async_commit() {
#    if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#    endif
}

// Waits until at most `pending` groups of this warp's threads are under way.
template <int pending>
static __device__ __forceinline__ void copy_async_wait() {
#    if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#    endif
    __syncwarp();
}

// ---- bulk copies, of which the copy engine does everything: multiples of 16 bytes, both sides aligned to 16

#    if __CUDA_ARCH__ >= 900
#        define TURBOKV_BULK_COPIES
#    endif

// A barrier in shared memory that counts who has come, and bytes that have arrived.
typedef uint64_t bulk_barrier;

static __device__ __forceinline__ void bulk_barrier_init(bulk_barrier * barrier, int count) {
#    ifdef TURBOKV_BULK_COPIES
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((uint32_t) __cvta_generic_to_shared(barrier)),
                 "r"(count)
                 : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine sees it
#    else
    (void) barrier, (void) count;
#    endif
}

// Of `count`; true for the last.
static __device__ __forceinline__ bool bulk_barrier_arrive(bulk_barrier * barrier) {
#    ifdef TURBOKV_BULK_COPIES
    uint32_t left;
    asm volatile(
        "{ .reg .b64 before; mbarrier.arrive.shared::cta.b64 before, [%1]; mbarrier.pending_count.b64 %0, before; }"
        : "=r"(left)
        : "r"((uint32_t) __cvta_generic_to_shared(barrier))
        : "memory");
    return left == 1;
#    else
    (void) barrier;
    return false;
#    endif
}

// One thread says, once per use, how many bytes there will be.
static __device__ __forceinline__ void bulk_barrier_expect(bulk_barrier * barrier, int bytes) {
#    ifdef TURBOKV_BULK_COPIES
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"((uint32_t) __cvta_generic_to_shared(barrier)),
        "r"(bytes)
        : "memory");
#    else
    (void) barrier, (void) bytes;
#    endif
}

// `parity` is that of the number of the use.
static __device__ __forceinline__ void bulk_barrier_wait(bulk_barrier * barrier, int parity) {
#    ifdef TURBOKV_BULK_COPIES
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(barrier);
    int            done    = 0;
    while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
    }
#    else
    (void) barrier, (void) parity;
#    endif
}

static __device__ __forceinline__ void bulk_copy(void * shared, const void * global, int bytes,
                                                 bulk_barrier * barrier) {
#    ifdef TURBOKV_BULK_COPIES
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     (uint32_t) __cvta_generic_to_shared(shared)),
                 "l"(global), "r"(bytes), "r"((uint32_t) __cvta_generic_to_shared(barrier))
                 : "memory");
#    else
    (void) shared, (void) global, (void) bytes, (void) barrier;
#    endif
}

// 2^x, relative error 2^-22.
static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- a block

// What the launch has asked for, aligned to 16 bytes.
static __device__ __forceinline__ uint8_t * dynamic_shared() {
    extern __shared__ __align__(16) uint8_t bytes[];
    return bytes;
}

// Of n_threads threads, whole warps. `id` 0 is __syncthreads.
static __device__ __forceinline__ void named_barrier(int id, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

#endif
