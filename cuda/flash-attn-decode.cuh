// The attention kernel for few queries: FLASH_ATTN_EXT with 1 to 16 query tokens over a packed cache.
//
//   flash_attn_decode   every warp takes tiles of 64 or 32 keys of one KV head, for all query heads that share it, and
//                       keeps a running softmax; the warps of a block are merged in shared memory
//   flash_attn_combine  (flash-attn-decode.cu) merges the blocks, adds the sinks, rotates back what tbqN has rotated
//
// A column is a query of the group: (query token, query head of the KV head), head fastest. Columns are the rows of the
// tensor cores' tiles. 8 to a tile, because each takes two rows: queries and probabilities are 16-bit fixed point
// numbers, high byte in row g, low byte in row g + 8. So products of int8 levels cost no accuracy, and the tile is full.
//
// K is scored as sum(q16 * level) * (scale of the key's block) * step. V is summed with p * (scale of the key's block)
// as the probability, relative to the greatest of the tile, so that the fixed point fits whatever the scores are.
// No value is decoded more than once for the 8 * MT columns of a block, and none is written anywhere.
//
// Each warp stages its packed rows in shared memory with asynchronous copies: the next tile's K is on its way while V is
// summed, and V while K is scored. A row of a head is rarely aligned to 16 bytes: what is copied are the 16-byte pieces that it touches. Rows lie a multiple of
// 16 bytes apart from each other, an odd one where the cache's rows are aligned: then no two lanes hit the same bank.
//
// Layout of the operands: flash-attn-formats.cuh. Truth: tests/c/test-turbokv-ops.cpp (float64), on the CPU
// turbokv-attention.c.

#pragma once

#include "common.cuh"
#include "flash-attn-formats.cuh"
#include "flash-attn-mma.cuh"

#define DECODE_COLUMNS 8  // of a tensor core tile

// What registers allow: one block per SM, as many warps as its shared memory lets in. Fewer blocks write fewer parts.
constexpr __host__ __device__ int decode_max_warps(int head_size, int column_tiles) {
    return head_size * column_tiles <= 128 ? 12 : 8;
}

// Keys of a tile. Of 64, sums are turned into floats half as often.
constexpr __host__ __device__ int decode_tile(int head_size, int column_tiles) {
    return head_size * column_tiles <= 128 ? 64 : 32;
}

// One of K and V.
struct decode_operand {
    const char * data;
    int64_t      nb1, nb2, nb3;  // bytes from key to key, KV head to KV head, stream to stream
    int          row;            // bytes from row to row in shared memory, = nb1 modulo 16
    bool         interleaved;    // tbqN: neighbouring fields are neighbouring values
    bool         rotated;        //   and the values are rotated
    float        step;           // value = scale * step * level
    level_table  levels;
};

struct decode_params {
    decode_operand k, v;

    const char * q;  // float [head size][n_q][n_head][n_stream]
    int64_t      q_nb1, q_nb2, q_nb3;
    const char * mask;  // fp16 [n_kv][n_q][1 or n_head][1 or n_stream], or NULL
    int64_t      mask_nb1, mask_nb2, mask_nb3;
    bool         mask_pairs;  // two neighbours can be loaded at once
    int          mask_ne2, mask_ne3;

    float *  partial;  // [n_stream][n_head][n_q][n_split][head size]: not normalized
    float2 * meta;     // [n_stream][n_head][n_q][n_split]: greatest score, sum; scores in units of log 2

    int      n_kv, n_q, n_head, gqa, n_stream_q_per_kv, n_split, n_column_tiles;
    uint32_t gqa_inverse;  // 2^22 / gqa, rounded up

    float    scale;    // of q * k; with a softcap divided by it
    float    softcap;  // 0: none
    float    max_bias, m0, m1;
    uint32_t n_head_log2;
    uint32_t srht_signs[4];  // bit i of word w: value 32w + i is negated
};

#define LOG2E 1.4426950408889634f

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
        x[i] *= 0.08838834764831845f;  // 1 / sqrt(128)
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

// Added to it, a number of magnitude below 2^22 is rounded to an integer, which is the lowest bits of the sum.
#define MAGIC 12582912.0f  // 1.5 * 2^23

// Pieces of 16 bytes that a row touches at most: rows begin at even addresses.
constexpr __host__ __device__ int kv_pieces(int row_bytes) {
    return (14 + row_bytes + 15) / 16;
}

template <int D, int MT, kv_format KF, kv_format VF> struct decode_kernel {
    using k_codec = kv_codec<KF, D>;
    using v_codec = kv_codec<VF, D>;

    static constexpr int K_STEPS  = D / (KF == KV_F16 ? 16 : 32);
    static constexpr int V_TILES  = D / 8;
    static constexpr int COLUMNS  = DECODE_COLUMNS * MT;
    static constexpr bool Q_IN_REGISTERS = MT * K_STEPS <= 8;

    static constexpr int WARPS    = decode_max_warps(D, MT);
    static constexpr int TILE     = decode_tile(D, MT);
    static constexpr int J        = TILE / 8;  // a tile is so many tensor core tiles of keys

    // Shared memory: the query's operands, [MT][K_STEPS][lane][4]; the query as floats, [COLUMNS][D]; then of each warp
    // a tile of K and of V; there the warps are merged in the end.
    static constexpr int Q_BYTES    = MT * K_STEPS * 32 * 16;
    static constexpr int HEAD_BYTES = Q_BYTES + COLUMNS * D * 4;

    static __host__ __device__ size_t warp_bytes(int k_row, int v_row) {
        const size_t stage = (size_t) TILE * (k_row + v_row) + 32;
        const size_t merge = COLUMNS * (D * sizeof(float) + sizeof(float2));
        return stage > merge ? stage : merge;
    }

    // ---- the query

    static constexpr int Q_BLOCK  = D < 128 ? D : 128;  // what is rotated as one,
    static constexpr int PER_LANE = Q_BLOCK / 32;       // of which a lane has so many neighbours

    static __device__ __forceinline__ void fetch_query(const float * q, float (&x)[D / 32], int lane) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            x[i] = q ? q[Q_BLOCK * (i / PER_LANE) + PER_LANE * lane + i % PER_LANE] : 0.0f;
        }
    }

    // The query of column c: rotated as K is, put among the operands. Returns what a product of the operand is worth.
    static __device__ __forceinline__ float load_query(const decode_params & p, float (&x)[D / 32], float * scratch,
                                                       uint32_t * operands, int c, int lane) {
        if constexpr (Q_BLOCK == 128) {
            if (p.k.rotated) {
#pragma unroll
                for (int block = 0; block < D / 128; ++block) {
                    float y[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        y[i] = x[4 * block + i] * srht_sign(p.srht_signs, 4 * lane + i);
                    }
                    hadamard_128(y, lane);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        x[4 * block + i] = y[i];
                    }
                }
            }
        }
        uint32_t top = 0;  // as unsigned numbers, infinity and NaN are above all finite floats
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            scratch[Q_BLOCK * (i / PER_LANE) + PER_LANE * lane + i % PER_LANE] = x[i];
            top = max(top, __float_as_uint(x[i]) & 0x7fffffff);
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            top = max(top, __shfl_xor_sync(0xffffffff, top, distance));
        }
        // fp16: relative to the greatest, so that no query overflows. Else 127 * 256.
        constexpr float LIMIT = KF == KV_F16 ? 1.0f : 32512.0f;
        const float     most  = __uint_as_float(top);
        const float     unit  = most > 0.0f ? LIMIT / most : 0.0f;
        __syncwarp();
        operands += (c / DECODE_COLUMNS * K_STEPS * 32 + c % DECODE_COLUMNS * 4) * 4;
#pragma unroll
        for (int first = 0; first < K_STEPS * 8; first += 32) {
            const int word = first + lane;  // step, half, lane of four
            if (K_STEPS * 8 % 32 != 0 && word >= K_STEPS * 8) {
                break;
            }
            const int  s = word / 8, h = word / 4 % 2, t = word % 4;
            uint32_t * to = operands + (s * 32 + t) * 4 + 2 * h;
            if constexpr (KF == KV_F16) {  // the low part is what the high part has lost
                const float a = scratch[16 * s + 8 * h + 2 * t] * unit, b = scratch[16 * s + 8 * h + 2 * t + 1] * unit;
                const half2 high = __floats2half2_rn(a, b);
                const half2 low  = __floats2half2_rn(a - __low2float(high), b - __high2float(high));
                to[0]            = *(const uint32_t *) &high;
                to[1]            = *(const uint32_t *) &low;
            } else {
                constexpr int STEPS = k_codec::BLOCK / 32;
                uint32_t      number[4];
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    const int place = k_codec::k_place(s % STEPS, t, h, l, p.k.interleaved);
                    number[l] = __float_as_uint(scratch[s / STEPS * k_codec::BLOCK + place] * unit + (MAGIC + 128.0f));
                }
                split_bytes(number[0], number[1], number[2], number[3], to[0], to[1]);
            }
        }
        return (most + (most - most)) * (1.0f / LIMIT);  // NaN if not finite
    }

    // ---- scores: s[mt][j][i] of column g, key 8j + 2t + i of the tile, in units of log 2 after `factor`

    static __device__ __forceinline__ void scores(const decode_params & p, const uint8_t * rows,
                                                  const uint4 (&q)[Q_IN_REGISTERS ? MT * K_STEPS : 1],
                                                  const uint4 * q_shared, int lane, float (&s)[MT][J][2]) {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int j = 0; j < J; ++j) {
            const uint8_t * row = rows + (8 * j + g) * p.k.row;
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                s[mt][j][0] = s[mt][j][1] = 0.0f;
            }
            if constexpr (KF == KV_F16) {
                float4 c[MT] = { };
#pragma unroll
                for (int step = 0; step < K_STEPS; ++step) {
                    const uint32_t b0 = load_u32(row + 32 * step + 4 * t), b1 = load_u32(row + 32 * step + 16 + 4 * t);
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
                        c[mt] = mma_f16(query(q, q_shared, mt * K_STEPS + step, lane), b0, b1, c[mt]);
                    }
                }
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    s[mt][j][0] = c[mt].x + c[mt].z;
                    s[mt][j][1] = c[mt].y + c[mt].w;
                }
            } else {
                constexpr int STEPS = k_codec::BLOCK / 32;
#pragma unroll
                for (int block = 0; block < D / k_codec::BLOCK; ++block) {
                    uint32_t b[STEPS][2];
                    k_codec::k_operands(row + block * k_codec::BYTES, t, p.k.levels, b);
                    const uint8_t * scale = rows + (8 * j + 2 * t) * p.k.row + block * k_codec::BYTES + k_codec::SCALE;
                    const float     d0 = load_half(scale), d1 = load_half(scale + p.k.row);
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
                        int4 c = { };
#pragma unroll
                        for (int step = 0; step < STEPS; ++step) {
                            c = mma_s8(query(q, q_shared, mt * K_STEPS + block * STEPS + step, lane), b[step][0],
                                       b[step][1], c);
                        }
                        s[mt][j][0] += (float) (c.x * 256 + c.z) * d0;
                        s[mt][j][1] += (float) (c.y * 256 + c.w) * d1;
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ uint4 query(const uint4 (&q)[Q_IN_REGISTERS ? MT * K_STEPS : 1],
                                                  const uint4 * q_shared, int i, int lane) {
        return Q_IN_REGISTERS ? q[i] : q_shared[i * 32 + lane];
    }

    // Products -> scores in units of log 2: scaled and capped.
    static __device__ __forceinline__ void scale_scores(const decode_params & p, const float (&q_unit)[MT],
                                                        float (&s)[MT][J][2]) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                s[mt][j][0] *= q_unit[mt];
                s[mt][j][1] *= q_unit[mt];
            }
        }
        if (p.softcap != 0.0f) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                for (int j = 0; j < J; ++j) {
                    s[mt][j][0] = p.softcap * LOG2E * tanhf(s[mt][j][0]);
                    s[mt][j][1] = p.softcap * LOG2E * tanhf(s[mt][j][1]);
                }
            }
        }
    }

    static __device__ __forceinline__ void add_mask(const uint32_t (&seen)[MT][J], const float (&slope)[MT],
                                                    float (&s)[MT][J][2]) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int j = 0; j < J; ++j) {  // -infinity whatever a hidden key scores
                const float2 bias = __half22float2(*(const half2 *) &seen[mt][j]);
                s[mt][j][0]       = bias.x == -INFINITY ? -INFINITY : s[mt][j][0] + slope[mt] * bias.x;
                s[mt][j][1]       = bias.y == -INFINITY ? -INFINITY : s[mt][j][1] + slope[mt] * bias.y;
            }
        }
    }

    // ---- output: o[mt][n][i] += sum over the keys of p * V, of column g, value v_place(n, 2t + i)

    static __device__ __forceinline__ int v_place(const decode_params & p, int tile, int g) {
        if constexpr (VF == KV_F16) {
            return 16 * (tile / 2) + 2 * g + tile % 2;
        } else {
            constexpr int TILES = v_codec::BLOCK / 8;
            return tile / TILES * v_codec::BLOCK +
                   v_codec::place(g, tile % TILES / v_codec::PART, tile % v_codec::PART, p.v.interleaved);
        }
    }

    // `prob` are the probabilities of keys 8j + 2t + i, `weight` is what the tile counts for.
    static __device__ __forceinline__ void add_values(const decode_params & p, const uint8_t * rows,
                                                      const float (&prob)[MT][J][2], const float (&weight)[MT], int lane,
                                                      float (&o)[MT][V_TILES][2]) {
        const int g = lane >> 2, t = lane & 3;
        if constexpr (VF == KV_F16) {
            uint4 a[MT][J / 2];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                uint32_t x[J][2];
#pragma unroll
                for (int j = 0; j < J; ++j) {
                    const half2 high = __floats2half2_rn(prob[mt][j][0], prob[mt][j][1]);
                    const half2 low =
                        __floats2half2_rn(prob[mt][j][0] - __low2float(high), prob[mt][j][1] - __high2float(high));
                    x[j][0] = *(const uint32_t *) &high;
                    x[j][1] = *(const uint32_t *) &low;
                }
#pragma unroll
                for (int k = 0; k < J / 2; ++k) {
                    a[mt][k] = { x[2 * k][0], x[2 * k][1], x[2 * k + 1][0], x[2 * k + 1][1] };
                }
            }
#pragma unroll
            for (int pair = 0; pair < V_TILES / 2; ++pair) {
                uint32_t b[2][J];  // even and odd value, keys 8j + 2t and the next
#pragma unroll
                for (int j = 0; j < J; ++j) {
                    const uint8_t * row = rows + (8 * j + 2 * t) * p.v.row + 32 * pair + 4 * g;
                    const uint32_t  x = load_u32(row), y = load_u32(row + p.v.row);
                    b[0][j] = permute_bytes(x, y, 0x5410);
                    b[1][j] = permute_bytes(x, y, 0x7632);
                }
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
                    for (int mt = 0; mt < MT; ++mt) {
                        float4 c = { };
#pragma unroll
                        for (int k = 0; k < J / 2; ++k) {
                            c = mma_f16(a[mt][k], b[odd][2 * k], b[odd][2 * k + 1], c);
                        }
                        o[mt][2 * pair + odd][0] += (c.x + c.z) * weight[mt];
                        o[mt][2 * pair + odd][1] += (c.y + c.w) * weight[mt];
                    }
                }
            }
        } else {
            using raw                 = typename v_codec::raw;
            constexpr int BLOCK_TILES = v_codec::BLOCK / 8;
            constexpr int STEPS       = TILE / 32;
#pragma unroll
            for (int block = 0; block < D / v_codec::BLOCK; ++block) {
                const uint8_t * first = rows + 2 * t * p.v.row + block * v_codec::BYTES;
                float           d[J][2];
                raw             packed[J / 2][4];
#pragma unroll
                for (int j = 0; j < J; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint8_t * row          = first + (8 * j + i) * p.v.row;
                        d[j][i]                      = load_half(row + v_codec::SCALE);
                        packed[j / 2][j % 2 * 2 + i] = v_codec::load(row, g);
                    }
                }
                uint4 a[MT][STEPS];
                float unit[MT];
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    unit[mt] = weight[mt] * fixed_point(prob[mt], d, a[mt]);
                }
#pragma unroll
                for (int part = 0; part < v_codec::PARTS; ++part) {
                    uint32_t b[J / 2][v_codec::PART];
#pragma unroll
                    for (int k = 0; k < J / 2; ++k) {
                        v_codec::v_operands(packed[k], g, part, p.v.levels, b[k]);
                    }
#pragma unroll
                    for (int n = 0; n < v_codec::PART; ++n) {
                        const int tile = block * BLOCK_TILES + part * v_codec::PART + n;
#pragma unroll
                        for (int mt = 0; mt < MT; ++mt) {
                            int4 c = { };
#pragma unroll
                            for (int k = 0; k < STEPS; ++k) {
                                c = mma_s8(a[mt][k], b[2 * k][n], b[2 * k + 1][n], c);
                            }
                            o[mt][tile][0] += (float) (c.x * 256 + c.z) * unit[mt];
                            o[mt][tile][1] += (float) (c.y * 256 + c.w) * unit[mt];
                        }
                    }
                }
            }
        }
    }

    // Probability times scale as 16-bit numbers; returns their unit, without the step. Not finite where a key that
    // counts has a scale that is not: as unsigned numbers, infinity and NaN are above all finite floats.
    static __device__ __forceinline__ float fixed_point(const float (&prob)[J][2], const float (&d)[J][2],
                                                        uint4 (&a)[TILE / 32]) {
        float    x[J][2];
        uint32_t top = 0;
#pragma unroll
        for (int j = 0; j < J; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                x[j][i] = prob[j][i] == 0.0f ? 0.0f : prob[j][i] * d[j][i];
                top     = max(top, __float_as_uint(x[j][i]) & 0x7fffffff);
            }
        }
        top              = max(top, __shfl_xor_sync(0xffffffff, top, 1));
        top              = max(top, __shfl_xor_sync(0xffffffff, top, 2));
        const float most = __uint_as_float(top);
        const float unit = __fdividef(32512.0f, fmaxf(most, 1e-30f));
        uint32_t    n[J][2];
#pragma unroll
        for (int j = 0; j < J; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                n[j][i] = __float_as_uint(x[j][i] * unit + (MAGIC + 128.0f));
            }
        }
#pragma unroll
        for (int k = 0; k < TILE / 32; ++k) {
            split_bytes(n[4 * k][0], n[4 * k][1], n[4 * k + 1][0], n[4 * k + 1][1], a[k].x, a[k].y);
            split_bytes(n[4 * k + 2][0], n[4 * k + 2][1], n[4 * k + 3][0], n[4 * k + 3][1], a[k].z, a[k].w);
        }
        return (most + (most - most)) * (1.0f / 32512.0f);
    }

    // ---- staging

    // Starts copying the tile's rows; those behind the last key repeat it. LANES lanes share a row.
    template <class codec>
    static __device__ __forceinline__ void stage(const decode_operand & x, const char * head, int first, int n_kv,
                                                 uint8_t * rows, int lane) {
        constexpr int BYTES  = D / codec::BLOCK * codec::BYTES;
        constexpr int PIECES = kv_pieces(BYTES);
        constexpr int LANES  = PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : 8;
        constexpr int ROWS   = 32 / LANES;  // at a time
        const int     row    = lane / LANES;
        const int     piece  = lane % LANES;
        const char *  tile   = head + first * x.nb1;
        const int     offset = (uintptr_t) tile & 15;

        if (x.nb1 % 16 == 0 && first + TILE <= n_kv) {  // all rows lie the same
            const char * from = tile - offset + row * x.nb1 + 16 * piece;
            uint8_t *    to   = rows + row * x.row + 16 * piece;
#pragma unroll
            for (int j = 0; j < TILE; j += ROWS, from += ROWS * x.nb1, to += ROWS * x.row) {
#pragma unroll
                for (int i = 0; i < PIECES; i += LANES) {
                    if (16 * (piece + i) < offset + BYTES) {
                        copy_async_16(to + 16 * i, from + 16 * i);
                    }
                }
            }
            return;
        }
        for (int j = row; j < TILE; j += ROWS) {
            const uintptr_t from = (uintptr_t) (head + min(first + j, n_kv - 1) * x.nb1);
            uint8_t *       to   = rows + ((offset + j * x.row) & ~15);
            for (int i = piece; 16 * i < (int) (from & 15) + BYTES; i += LANES) {
                copy_async_16(to + 16 * i, (const char *) (from & ~(uintptr_t) 15) + 16 * i);
            }
        }
    }

    // The mask's values for keys 8j + 2t and the next of a tile, as two fp16 each; hidden where there is no key.
    static __device__ __forceinline__ void load_mask(const decode_params & p, const half * const (&mask)[MT], int first,
                                                     int t, uint32_t (&x)[MT][J]) {
        constexpr uint32_t HIDDEN = 0xfc00;  // -infinity
        const bool         whole  = first + TILE <= p.n_kv;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const uint16_t * m = (const uint16_t *) mask[mt] + first + 2 * t;
            if (whole && (!p.mask || p.mask_pairs)) {
#pragma unroll
                for (int j = 0; j < J; ++j) {
                    x[mt][j] = p.mask ? *(const uint32_t *) (m + 8 * j) : 0;
                }
                continue;
            }
#pragma unroll
            for (int j = 0; j < J; ++j) {
                const int left = p.n_kv - (first + 8 * j + 2 * t);
                x[mt][j]       = (left < 1 ? HIDDEN : p.mask ? m[8 * j] : 0) |
                           (left < 2 ? HIDDEN : p.mask ? m[8 * j + 1] : 0) << 16;
            }
        }
    }
};

template <int D, int MT, kv_format KF, kv_format VF>
__launch_bounds__(32 * decode_max_warps(D, MT), 1)
static __global__ void flash_attn_decode(const __grid_constant__ decode_params p) {
#if __CUDA_ARCH__ >= 750
    using kernel = decode_kernel<D, MT, KF, VF>;
    constexpr int COLUMNS = kernel::COLUMNS, TILE = kernel::TILE, J = kernel::J;

    const int lane = threadIdx.x, warp = threadIdx.y, n_warps = blockDim.y;
    const int g = lane >> 2, t = lane & 3;
    const int kv_head      = blockIdx.x;
    const int split        = blockIdx.y;
    const int column_tile  = blockIdx.z % p.n_column_tiles;
    const int stream       = blockIdx.z / p.n_column_tiles;
    const int first_column = column_tile * COLUMNS;
    const int n_columns    = min(COLUMNS, p.n_q * p.gqa - first_column);

    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t * q_operands = (uint32_t *) shared;

    __shared__ float units[COLUMNS];

    // Query token and head of column c of the block; behind the last column, those of the last.
    const auto place_of = [&](int c) {
        const int column = first_column + min(c, n_columns - 1);
        const int token  = ((uint32_t) column * p.gqa_inverse) >> 22;
        return make_int2(token, kv_head * p.gqa + column - token * p.gqa);
    };
    ggml_cuda_pdl_sync();  // what is read from here on may be another kernel's output

    // 1. The first tile of this warp is on its way: every n_split * n_warps-th is its own.
    const int    kv_stream   = stream / p.n_stream_q_per_kv;
    const char * k_head      = p.k.data + kv_head * p.k.nb2 + kv_stream * p.k.nb3;
    const char * v_head      = p.v.data + kv_head * p.v.nb2 + kv_stream * p.v.nb3;
    const int    n_tiles     = (p.n_kv + TILE - 1) / TILE;
    const int    first_tile  = split * n_warps + warp;
    const int    step        = p.n_split * n_warps;
    const int    k_bytes     = TILE * p.k.row + 16;
    const int    warp_bytes  = (int) kernel::warp_bytes(p.k.row, p.v.row);
    uint8_t *    k_stage     = shared + kernel::HEAD_BYTES + warp * warp_bytes;
    uint8_t *    v_stage     = k_stage + k_bytes;
    const auto   stage_k     = [&](int tile) {
        if (tile < n_tiles) {
            kernel::template stage<typename kernel::k_codec>(p.k, k_head, tile * TILE, p.n_kv, k_stage, lane);
        }
        copy_async_commit();  // an empty group, too: waiting counts groups
    };
    const auto stage_v = [&](int tile) {
        if (tile < n_tiles) {
            kernel::template stage<typename kernel::v_codec>(p.v, v_head, tile * TILE, p.n_kv, v_stage, lane);
        }
        copy_async_commit();
    };
    const auto query = [&](int c) {
        const int2 place = place_of(c);
        return c < n_columns ? (const float *) (p.q + place.x * p.q_nb1 + place.y * p.q_nb2 + stream * p.q_nb3) : nullptr;
    };
    float x[D / 32];  // of the query of column `warp`: under way before the tile is
    kernel::fetch_query(query(warp), x, lane);
    stage_k(first_tile);
    stage_v(first_tile);

    // 2. The query: permuted and split as K needs it.
    for (int c = warp; c < COLUMNS; c += n_warps) {
        if (c != warp) {
            kernel::fetch_query(query(c), x, lane);
        }
        float *     scratch = (float *) (shared + kernel::Q_BYTES) + c * D;
        const float unit    = kernel::load_query(p, x, scratch, q_operands, c, lane);
        if (lane == 0) {
            units[c] = unit;
        }
    }
    __syncthreads();

    const uint4 * q_shared = (const uint4 *) q_operands;
    uint4         q[kernel::Q_IN_REGISTERS ? MT * kernel::K_STEPS : 1];
    if constexpr (kernel::Q_IN_REGISTERS) {
#pragma unroll
        for (int i = 0; i < MT * kernel::K_STEPS; ++i) {
            q[i] = q_shared[i * 32 + lane];
        }
    }

    float        q_unit[MT], slope[MT];
    const half * mask[MT];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
        const int  c     = DECODE_COLUMNS * mt + g;
        const int2 place = place_of(c);
        q_unit[mt]       = units[c] * p.scale * p.k.step * (p.softcap == 0.0f ? LOG2E : 1.0f);
        slope[mt]        = LOG2E;
        if (p.max_bias > 0.0f) {
            const bool low = place.y < (int) p.n_head_log2;
            slope[mt] *= powf(low ? p.m0 : p.m1, low ? place.y + 1 : 2 * (place.y - (int) p.n_head_log2) + 1);
        }
        mask[mt] = (const half *) (p.mask + place.x * p.mask_nb1 + place.y % p.mask_ne2 * p.mask_nb2 +
                                   stream % p.mask_ne3 * p.mask_nb3);
    }

    // 3. The tiles.
    float o[MT][kernel::V_TILES][2] = { };
    float top[MT], sum[MT];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
        top[mt] = -INFINITY;
        sum[mt] = 0.0f;
    }

    // Whether any column sees any key of the tile, and whether the mask says more than that all are seen. Known a tile
    // ahead, from loads that are under way while K is scored.
    bool any, biased, any_next, biased_next;
    const auto look = [&](const uint32_t (&seen)[MT][J]) {
        any_next = biased_next = false;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int j = 0; j < J; ++j) {
                any_next    = any_next || seen[mt][j] != 0xfc00fc00;
                biased_next = biased_next || seen[mt][j] != 0;
            }
        }
        any_next    = __any_sync(0xffffffff, any_next);
        biased_next = __any_sync(0xffffffff, biased_next);
    };
    {
        uint32_t seen[MT][J];
        kernel::load_mask(p, mask, first_tile * TILE, t, seen);
        look(seen);
    }
    for (int tile = first_tile; tile < n_tiles; tile += step) {
        const int first = tile * TILE;

        any    = any_next;
        biased = biased_next;

        const uint8_t * k_rows = k_stage + ((uintptr_t) (k_head + first * p.k.nb1) & 15);
        const uint8_t * v_rows = v_stage + ((uintptr_t) (v_head + first * p.v.nb1) & 15);

        copy_async_wait<1>();
        float s[MT][J][2];
        uint32_t seen_next[MT][J];
        kernel::load_mask(p, mask, first + step * TILE, t, seen_next);
        if (any) {
            kernel::scores(p, k_rows, q, q_shared, lane, s);
            kernel::scale_scores(p, q_unit, s);
            if (biased) {
                uint32_t seen[MT][J];
                kernel::load_mask(p, mask, first, t, seen);
                kernel::add_mask(seen, slope, s);
            }
        }
        look(seen_next);
        stage_k(tile + step);

        float weight[MT];
        if (any) {
            bool rescale = false;
            float factor[MT];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < J; ++j) {
                    most = fmaxf(most, fmaxf(s[mt][j][0], s[mt][j][1]));
                }
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
                const float base     = most == -INFINITY ? 0.0f : most;  // nothing to see: probabilities of 0
                float       tile_sum = 0.0f;
#pragma unroll
                for (int j = 0; j < J; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        s[mt][j][i] = exp2_approx(s[mt][j][i] - base);
                        tile_sum += s[mt][j][i];
                    }
                }
                const float new_top = fmaxf(top[mt], most);
                const float new_base = new_top == -INFINITY ? 0.0f : new_top;
                factor[mt]           = exp2_approx(top[mt] - new_base);
                weight[mt]           = exp2_approx(most - new_base);
                sum[mt]             = sum[mt] * factor[mt] + tile_sum * weight[mt];
                top[mt]             = new_top;
                rescale             = rescale || factor[mt] != 1.0f;
                weight[mt] *= p.v.step;
            }
            if (__any_sync(0xffffffff, rescale)) {
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                    for (int n = 0; n < kernel::V_TILES; ++n) {
                        o[mt][n][0] *= factor[mt];
                        o[mt][n][1] *= factor[mt];
                    }
                }
            }
        }

        copy_async_wait<1>();
        if (any) {
            kernel::add_values(p, v_rows, s, weight, lane, o);
        }
        __syncwarp();
        stage_v(tile + step);
    }
    copy_async_wait<0>();
    ggml_cuda_pdl_lc();  // flash_attn_combine may be set up

    // 4. The warps of the block are merged.
    __syncthreads();
    const auto merge_o    = [&](int w) { return (float *) (shared + kernel::HEAD_BYTES + w * warp_bytes); };
    const auto merge_meta = [&](int w) { return (float2 *) (merge_o(w) + COLUMNS * D); };
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
        sum[mt] += __shfl_xor_sync(0xffffffff, sum[mt], 1);
        sum[mt] += __shfl_xor_sync(0xffffffff, sum[mt], 2);
        const int c = DECODE_COLUMNS * mt + g;
        if (t == 0) {
            merge_meta(warp)[c] = make_float2(top[mt], sum[mt]);
        }
        if (c < n_columns) {
#pragma unroll
            for (int n = 0; n < kernel::V_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    merge_o(warp)[c * D + kernel::v_place(p, n, 2 * t + i)] = o[mt][n][i];
                }
            }
        }
    }
    __syncthreads();
    for (int i = warp * 32 + lane; i < n_columns * D; i += 32 * n_warps) {
        const int     c     = i / D;
        const int2    place = place_of(c);
        const int64_t at    = (((int64_t) stream * p.n_head + place.y) * p.n_q + place.x) * p.n_split + split;

        float most = -INFINITY;
        for (int w = 0; w < n_warps; ++w) {
            most = fmaxf(most, merge_meta(w)[c].x);
        }
        float value = 0.0f, total = 0.0f;
        for (int w = 0; w < n_warps; ++w) {
            const float2 m      = merge_meta(w)[c];
            const float  weight = m.x == -INFINITY && m.y == 0.0f ? 0.0f : exp2_approx(m.x - most);
            value += merge_o(w)[i] * weight;
            total += m.y * weight;
        }
        p.partial[at * D + i % D] = value;
        if (i % D == 0) {
            p.meta[at] = make_float2(most, total);
        }
    }
#else
    (void) p;
    __trap();  // turbokv_cuda_flash_attn_ext_supported has not let anybody come here
#endif
}
