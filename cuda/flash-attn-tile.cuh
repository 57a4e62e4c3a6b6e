// What the attention kernel for few queries does with one tile of keys: scores and sums. The layout of the operands is
// that of flash-attn-formats.cuh; see flash-attn-decode.cuh for the whole.

#pragma once

#include "common.cuh"
#include "flash-attn-formats.cuh"
#include "flash-attn-mma.cuh"

#define DECODE_COLUMNS 8   // of a tensor core tile
#define DECODE_TILE    32  // keys

// One of K and V.
struct decode_operand {
    const char * data;
    int64_t      nb1, nb2, nb3;  // bytes from key to key, KV head to KV head, stream to stream
    int          row;            // bytes from row to row in shared memory, = nb1 modulo 16
    int          slice;          // bytes of a row that a block stages: those of its KV heads
    int          lanes_log2;     // so many lanes copy a row
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
    int      n_head_block;  // KV heads of a block
    int      n_stage;       // 2 .. 4
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

template <int D, int MT, kv_format KF, kv_format VF> struct decode_tile {
    using k_codec = kv_codec<KF, D>;
    using v_codec = kv_codec<VF, D>;

    static constexpr int  K_STEPS        = D / (KF == KV_F16 ? 16 : 32);
    static constexpr int  V_TILES        = D / 8;
    static constexpr int  COLUMNS        = DECODE_COLUMNS * MT;
    static constexpr int  K_HEAD         = D / k_codec::BLOCK * k_codec::BYTES;  // bytes of a head in a row
    static constexpr int  V_HEAD         = D / v_codec::BLOCK * v_codec::BYTES;
    static constexpr bool Q_IN_REGISTERS = MT * K_STEPS <= 8;
    static constexpr int  TILE           = DECODE_TILE;
    static constexpr int  J              = TILE / 8;  // a tile is so many tensor core tiles of keys

    // ---- the query

    // The query of column c among the operands, [MT][K_STEPS][lane][4]: rotated as K is, in the order of K's packed
    // values. Returns what a product of the operand is worth. `scratch`: D floats of this warp. q NULL: zeros.
    static __device__ __forceinline__ float load_query(const decode_params & p, const float * q, float * scratch,
                                                       uint32_t * operands, int c, int lane) {
        if constexpr (D % 128 == 0) {
            if (p.k.rotated && q) {
                __syncwarp();
#pragma unroll
                for (int block = 0; block < D / 128; ++block) {
                    float y[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        y[i] = q[128 * block + 4 * lane + i] * srht_sign(p.srht_signs, 4 * lane + i);
                    }
                    hadamard_128(y, lane);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        scratch[128 * block + 4 * lane + i] = y[i];
                    }
                }
                __syncwarp();
                q = scratch;
            }
        }
        // Words of the operands: step, half, lane of four; this lane's are lane, lane + 32, ..
        constexpr int N_WORDS   = K_STEPS * 8;
        constexpr int PER_LANE  = (N_WORDS + 31) / 32;
        constexpr int VALUES    = KF == KV_F16 ? 2 : 4;  // of a word
        float         x[PER_LANE][VALUES];
        uint32_t      top = 0;  // as unsigned numbers, infinity and NaN are above all finite floats
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int word = 32 * i + lane, s = word / 8, h = word / 4 % 2, t = word % 4;
#pragma unroll
            for (int l = 0; l < VALUES; ++l) {
                int value;
                if constexpr (KF == KV_F16) {
                    value = 16 * s + 8 * h + 2 * t + l;
                } else {
                    constexpr int STEPS = k_codec::BLOCK / 32;
                    value = s / STEPS * k_codec::BLOCK + k_codec::k_place(s % STEPS, t, h, l, p.k.interleaved);
                }
                x[i][l] = q && word < N_WORDS ? q[value] : 0.0f;
                top     = max(top, __float_as_uint(x[i][l]) & 0x7fffffff);
            }
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            top = max(top, __shfl_xor_sync(0xffffffff, top, distance));
        }
        // fp16: relative to the greatest, so that no query overflows. Else 127 * 256.
        constexpr float LIMIT = KF == KV_F16 ? 1.0f : 32512.0f;
        const float     most  = __uint_as_float(top);
        const float     unit  = most > 0.0f ? LIMIT / most : 0.0f;
        operands += (c / DECODE_COLUMNS * K_STEPS * 32 + c % DECODE_COLUMNS * 4) * 4;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int  word = 32 * i + lane, s = word / 8, h = word / 4 % 2, t = word % 4;
            uint32_t * to = operands + (s * 32 + t) * 4 + 2 * h;
            uint32_t   high, low;
            if constexpr (KF == KV_F16) {  // the low part is what the high part has lost
                const half2 a = __floats2half2_rn(x[i][0] * unit, x[i][1] * unit);
                const half2 b = __floats2half2_rn(x[i][0] * unit - __low2float(a), x[i][1] * unit - __high2float(a));
                high          = *(const uint32_t *) &a;
                low           = *(const uint32_t *) &b;
            } else {
                uint32_t number[4];
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    number[l] = __float_as_uint(x[i][l] * unit + (MAGIC + 128.0f));
                }
                split_bytes(number[0], number[1], number[2], number[3], high, low);
            }
            if (word < N_WORDS) {
                to[0] = high;
                to[1] = low;
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

    // Scores -> probabilities relative to the greatest of the tile and column, which count `weight`; what was summed before
    // counts `factor`. True if that is not 1 for all.
    static __device__ __forceinline__ bool softmax(float (&s)[MT][J][2], float (&top)[MT], float (&sum)[MT],
                                                   float (&weight)[MT], float (&factor)[MT]) {
        bool rescale = false;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            float most = -INFINITY;
#pragma unroll
            for (int j = 0; j < J; ++j) {
                most = fmaxf(most, fmaxf(s[mt][j][0], s[mt][j][1]));
            }
            most                 = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
            most                 = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
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
            const float new_top  = fmaxf(top[mt], most);
            const float new_base = new_top == -INFINITY ? 0.0f : new_top;
            factor[mt]           = exp2_approx(top[mt] - new_base);
            weight[mt]           = exp2_approx(most - new_base);
            sum[mt]              = sum[mt] * factor[mt] + tile_sum * weight[mt];
            top[mt]              = new_top;
            rescale              = rescale || factor[mt] != 1.0f;
        }
        return __any_sync(0xffffffff, rescale);
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

    // ---- the mask

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
