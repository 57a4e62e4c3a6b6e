// The instructions of the attention kernel, each with what older GPUs do instead.

#pragma once

#include <cuda_fp16.h>

#include <cstdint>

// c[16][8] += a[16][32] * b[32][8], int8 -> int32. Lane 4g + t holds, four values of k to a register,
//   a: {a[g][4t..], a[g+8][4t..], a[g][16+4t..], a[g+8][16+4t..]}   b: {b[4t..][g], b[16+4t..][g]}
//   c: {c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1]}
static __device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#    pragma unroll
    for (int row = 0; row < 2; ++row) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2 * row]), "+r"(c[2 * row + 1])
            : "r"(a[row]), "r"(b0));
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2 * row]), "+r"(c[2 * row + 1])
            : "r"(a[2 + row]), "r"(b1));
    }
#endif
}

// c[16][8] += a[16][16] * b[16][8], fp16 -> float. Lane 4g + t holds, two values of k to a register,
//   a: {a[g][2t..], a[g+8][2t..], a[g][8+2t..], a[g+8][8+2t..]}   b: {b[2t..][g], b[8+2t..][g]}   c: as above
static __device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// 16 bytes, both sides aligned to 16, from global to shared memory, in the background where the GPU can.
static __device__ __forceinline__ void copy_async_16(void * shared, const void * global) {
#if __CUDA_ARCH__ >= 800
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *(uint4 *) shared = *(const uint4 *) global;
#endif
}

// Ends a group of copies of this thread.
static __device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` groups of this warp's threads are under way.
template <int pending> static __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
    __syncwarp();
}

// 2^x, relative error 2^-22.
static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
