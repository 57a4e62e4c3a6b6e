// What the host tells the attention kernel for few queries, and the arithmetic that its parts share.

#pragma once

#include "flash-attn-formats.cuh"

#define DECODE_COLUMNS 4  // of an operand

// What registers allow, with one block per SM.
constexpr __host__ __device__ int decode_max_warps(int head_size, int column_tiles) {
    return head_size * column_tiles <= 256 ? 16 : 8;
}

// The architecture that device code is compiled for, as __CUDA_ARCH__.
#ifdef __CUDA_ARCH__
#    define TURBOKV_ARCH __CUDA_ARCH__
#else
#    define TURBOKV_ARCH 0
#endif

// Keys of a tile. Of 64, sums become floats half as often; that takes more registers, and the 227 KiB of shared memory
// of Hopper and the Blackwell of data centers. `arch` is that of the compiled kernel.
constexpr __host__ __device__ int decode_keys(int head_size, int column_tiles, int bytes_per_key, int arch) {
    return head_size * column_tiles <= 256 && bytes_per_key <= 132 && arch >= 900 && arch < 1200 ? 64 : 32;
}

// Shared memory for slots, about: of 227 KiB, or of 99 where there is a copy engine.
constexpr __host__ __device__ int decode_slot_bytes(int arch) {
    return arch < 1200 ? 208 << 10 : 80 << 10;
}

// Whether there is a copy engine that kernels can use.
constexpr __host__ __device__ bool decode_copies_in_bulk(int arch) {
    return arch >= 900;
}

// How rows get into shared memory.
enum decode_copy {
    COPY_PIECES,  // 16 bytes at a time, whatever the alignment; then both operands
    COPY_ROWS,    // by the copy engine, row by row: slices that begin and end at multiples of 16 bytes
    COPY_TILE,    // by the copy engine, all rows of a tile at once: a slice is the whole row
};

// One of K and V.
struct decode_operand {
    const char * data;
    int          nb1, nb2;    // bytes from key to key, KV head to KV head
    int64_t      nb3;         // stream to stream
    int          row;         // bytes from row to row in shared memory, = nb1 modulo 16
    int          slice;       // bytes of a row that a block stages: those of its KV heads
    int          lanes_log2;  // so many lanes copy a row in pieces
    decode_copy  copy;
    bool         interleaved;  // tbqN: neighbouring fields are neighbouring values
    bool         rotated;      //   and the values are rotated
    float        step;         // value = scale * step * level
    level_table  levels;
};

struct decode_params {
    decode_operand k, v;

    const char * q;  // float [head size][n_q][n_head][n_stream], rows begin at multiples of 16 bytes
    int          q_nb1, q_nb2;
    int64_t      q_nb3;
    const char * mask;  // fp16 [n_kv][n_q][1 or n_head][1 or n_stream], or NULL
    int          mask_nb1, mask_nb2;
    int64_t      mask_nb3;
    bool         mask_aligned;  // rows begin at multiples of 8 bytes
    int          mask_ne2, mask_ne3;

    float *  partial;  // [n_stream][n_head][n_q][n_split][head size]: not normalized, ordered as value_order says
    float2 * meta;     // [n_stream][n_head][n_q][n_split]: greatest score, sum; scores in units of log 2

    int      n_kv, n_q, n_head, gqa, n_stream_q_per_kv, n_split, n_column_tiles;
    int      n_slots;      // of shared memory, a tile each
    uint32_t gqa_inverse;  // 2^32 / gqa, rounded up; of 1 it is not needed

    float    scale;                 // of q * k; with a softcap divided by it
    float    softcap;               // 0: none
    float    max_bias, slope_step;  // ALiBi: log2 of the slopes goes in such steps for the first
    uint32_t n_head_log2;           //   so many heads, then in halves of them
    uint32_t srht_signs[4];         // bit i of word w: value 32w + i is negated
};

// The order in which values of V come out of the kernel, and stay until they have been merged: every bit of a place is
// a bit of the value. Place 32 (n / 4) + 4g + n % 4 has what lane 4g + t holds as number n.
struct value_order {
    uint8_t bit[8];

    __device__ int value_at(int place) const {
        int value = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value |= (place >> i & 1) << bit[i];
        }
        return value;
    }
};

#define LOG2E 1.4426950408889634f

// What a part (greatest score, sum) counts for, relative to the score `top`. One without a visible key has no score.
static __device__ __forceinline__ float part_weight(float2 part, float top) {
    return part.x == -INFINITY && part.y == 0.0f ? 0.0f : exp2_approx(part.x - top);
}

#define HADAMARD_128_SCALE 0.08838834764831845f  // 1 / sqrt(128)

// The rotation inside tbqN over 128 values, of which lane i of a warp holds 4i .. 4i + 3; without the signs.
static __device__ __forceinline__ void hadamard_128(float (&x)[4], int lane) {
    float y[4] = { x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3] };
    x[0]       = y[0] + y[2];
    x[1]       = y[1] + y[3];
    x[2]       = y[0] - y[2];
    x[3]       = y[1] - y[3];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = __shfl_xor_sync(0xffffffff, x[i], distance);
            x[i]              = lane & distance ? other - x[i] : x[i] + other;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] *= HADAMARD_128_SCALE;
    }
}

// -1 or 1 for value i of 128.
static __device__ __forceinline__ float srht_sign(const uint32_t (&signs)[4], int i) {
    return (signs[i >> 5] >> (i & 31)) & 1 ? -1.0f : 1.0f;
}

// Four 16-bit numbers -> their high bytes, and their low bytes, such that number = 256 * high + low, both signed. The
// arguments hold the number plus 128 in their low 16 bits.
static __device__ __forceinline__ void split_bytes(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, uint32_t & high,
                                                   uint32_t & low) {
    const uint32_t x01 = permute_bytes(x0, x1, 0x5140);  // low, low, high, high
    const uint32_t x23 = permute_bytes(x2, x3, 0x5140);
    low                = permute_bytes(x01, x23, 0x5410) ^ 0x80808080;
    high               = permute_bytes(x01, x23, 0x7632);
}

// Two floats as fp16, and what rounding has lost of them.
static __device__ __forceinline__ void split_floats(float x, float y, uint32_t & high, uint32_t & low) {
    const half2 a = __floats2half2_rn(x, y);
    const half2 b = __floats2half2_rn(x - __low2float(a), y - __high2float(a));
    high          = *(const uint32_t *) &a;
    low           = *(const uint32_t *) &b;
}

// Added to it, a number of magnitude below 2^22 is rounded to an integer, which is the lowest bits of the sum.
#define MAGIC 12582912.0f  // 1.5 * 2^23
