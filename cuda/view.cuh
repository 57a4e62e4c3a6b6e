// Where the blocks of a tensor are: kernels number them in the order of the elements, one warp per block.

#pragma once

#include "common.cuh"

static constexpr int TURBOKV_WARPS = 8;  // of a thread block

static inline bool turbokv_is_ours(ggml_type type) {
    return type >= GGML_TYPE_TURBOKV_FIRST;
}

struct turbokv_position {
    uint32_t i0, i1, i2, i3;  // i0: of the block in its row
};

struct turbokv_view {
    uint3   n0, n1, n2;          // divisors for fast_div_modulo
    int64_t nb0, nb1, nb2, nb3;  // bytes from block to block, row to row, ..

    __device__ __forceinline__ turbokv_position position(uint32_t i) const {
        const uint2 row   = fast_div_modulo(i, n0);
        const uint2 plane = fast_div_modulo(row.x, n1);
        const uint2 cube  = fast_div_modulo(plane.x, n2);
        return { row.y, plane.y, cube.y, cube.x };
    }

    __device__ __forceinline__ int64_t offset(const turbokv_position & p) const {
        return p.i0 * nb0 + p.i1 * nb1 + p.i2 * nb2 + p.i3 * nb3;
    }
};

// Of a tensor whose rows are whole blocks of qk values and dense.
static inline turbokv_view turbokv_view_of(const ggml_tensor * t, int qk) {
    GGML_ASSERT(t->ne[0] % qk == 0 && t->nb[0] == ggml_type_size(t->type));
    return { init_fastdiv_values(t->ne[0] / qk),
             init_fastdiv_values(t->ne[1]),
             init_fastdiv_values(t->ne[2]),
             (int64_t) ggml_row_size(t->type, qk),
             (int64_t) t->nb[1],
             (int64_t) t->nb[2],
             (int64_t) t->nb[3] };
}

// Thread blocks for n blocks.
static inline int64_t turbokv_grid(int64_t n) {
    GGML_ASSERT(n <= INT32_MAX);  // what fast_div_modulo divides
    return (n + TURBOKV_WARPS - 1) / TURBOKV_WARPS;
}

// This warp's number.
static __device__ __forceinline__ int64_t turbokv_warp() {
    return (int64_t) blockIdx.x * TURBOKV_WARPS + threadIdx.x / WARP_SIZE;
}
