// What the attention kernel for few queries does with one tile of keys: scores and sums. See flash-attn-decode.cuh for
// the whole; the layout of the operands is that of flash-attn-formats.cuh.
//
// In the tensor cores' products the packed values are the rows: scores are K * Q, keys x columns, and the output is
// V * P, values x columns. A column takes two of the eight of an operand: its high and its low bytes, or in fp16 its
// value and what rounding has lost of it. So lane 4g + t has keys 8r + g and values of slice g, of column t of four.

#pragma once

#include "flash-attn-mma.cuh"
#include "flash-attn-params.cuh"

// NT: column tiles of DECODE_COLUMNS.
template <int D, int NT, kv_format KF, kv_format VF>
struct decode_tile {
    using k_codec = kv_codec<KF, D>;
    using v_codec = kv_codec<VF, D>;

    static constexpr int K_STEPS = D / (KF == KV_F16 ? 16 : 32);
    static constexpr int V_TILES = D / 8;  // values of a lane
    static constexpr int COLUMNS = DECODE_COLUMNS * NT;
    static constexpr int K_HEAD  = D / k_codec::BLOCK * k_codec::BYTES;  // bytes of a head in a row
    static constexpr int V_HEAD  = D / v_codec::BLOCK * v_codec::BYTES;
    static constexpr int KEYS    = decode_keys(D, NT, K_HEAD + V_HEAD, TURBOKV_ARCH);
    static constexpr int R       = KEYS / 8;  // keys of a lane

    // Whether K of a slot's next tile is asked for before V of this one has been used. That takes instructions, but
    // where two tiles for each warp do not fit into shared memory there is less waiting.
    static constexpr bool K_EARLY = 2 * decode_max_warps(D, NT) * KEYS * (K_HEAD + V_HEAD) >
                                    decode_slot_bytes(TURBOKV_ARCH);

    static constexpr bool Q_IN_REGISTERS = NT == 1 && K_STEPS <= 8;

    // ---- the queries: a warp has the four of a column tile. x[4j + i] of lane 8c + e: value 32j + 4e + i of column c.

    // q: of this lane's column; NULL: zeros. Around L1, which is small beside the slots.
    static __device__ __forceinline__ void fetch_queries(const float * q, float (&x)[D / 8], int lane) {
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            const float4 y = q ? __ldcg((const float4 *) q + 8 * j + lane % 8) : float4{};
            memcpy(&x[4 * j], &y, sizeof(y));
        }
    }

    // Rotated as the keys of tbqN are, in blocks of 128.
    static __device__ __forceinline__ void rotate_queries(const decode_params & p, float (&x)[D / 8], int lane) {
#pragma unroll
        for (int m = 0; m < D / 8; ++m) {
            x[m] *= srht_sign(p.srht_signs, 32 * (m / 4 % 4) + 4 * (lane % 8) + m % 4);
        }
#pragma unroll
        for (int distance = 1; distance < 16; distance *= 2) {  // of a lane's 16 values of a block
#pragma unroll
            for (int m = 0; m < D / 8; ++m) {
                if ((m & distance) == 0) {
                    const float a = x[m], b = x[m + distance];
                    x[m]            = a + b;
                    x[m + distance] = a - b;
                }
            }
        }
#pragma unroll
        for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
            for (int m = 0; m < D / 8; ++m) {
                const float other = __shfl_xor_sync(0xffffffff, x[m], distance);
                x[m]              = lane & distance ? other - x[m] : x[m] + other;
            }
        }
#pragma unroll
        for (int m = 0; m < D / 8; ++m) {
            x[m] *= HADAMARD_128_SCALE;
        }
    }

    // The order of K's operands: for a column, value_at(position) of position 8 VALUES step + 2 VALUES t + VALUES half
    // + l, l of the VALUES of a word. Every bit of a position is a bit of the value.
    static constexpr int VALUES = KF == KV_F16 ? 2 : 4;

    static constexpr __host__ __device__ int value_at(int position, bool interleaved) {
        const int step = position / (8 * VALUES), t = position / (2 * VALUES) % 4;
        const int half = position / VALUES % 2, l = position % VALUES;
        if constexpr (KF == KV_F16) {
            return 16 * step + 8 * half + 2 * t + l;
        } else {
            constexpr int STEPS = k_codec::BLOCK / 32;
            return step / STEPS * k_codec::BLOCK + k_codec::k_place(step % STEPS, t, half, l, interleaved);
        }
    }

    static constexpr __host__ __device__ int position_of(int value, bool interleaved) {
        int position = 0;
        for (int bit = 1; bit < D; bit *= 2) {
            position |= value & value_at(bit, interleaved) ? bit : 0;
        }
        return position;
    }

    // Numbers -> high and low parts of a column, at their places among the operands of a tile.
    template <bool interleaved>
    static __device__ __forceinline__ void store_operands(const float (&x)[D / 8], float unit, uint8_t * operands,
                                                          int lane) {
        const auto bytes_to = [](int position) {
            return position / (8 * VALUES) * 256 + position % (8 * VALUES) * (4 / VALUES);
        };
        // Are the values of a word in one lane? Not those of tbq2, which is stored byte by byte.
        constexpr int  BETWEEN_LANES = 28;  // bits of a value
        constexpr bool WORDS = ((value_at(1, interleaved) | value_at(VALUES / 2, interleaved)) & BETWEEN_LANES) == 0;
        operands += lane / 8 * 64 + bytes_to(position_of(4 * (lane % 8), interleaved));  // lane 4g + t of column g / 2
#pragma unroll
        for (int m = 0; m < D / 8; ++m) {
            const int position = position_of(32 * (m / 4) + m % 4, interleaved);
            uint8_t * high     = operands + bytes_to(position);
            uint8_t * low      = high + 32;  // lane 4(g + 1) + t
            if constexpr (!WORDS) {
                const uint32_t number = __float_as_uint(x[m] * unit + (MAGIC + 128.0f));
                *high                 = number >> 8;
                *low                  = number ^ 0x80;
            } else if (position % VALUES == 0) {
                const auto value = [&](int l) {
                    const int v = value_at(position + l, interleaved);
                    return x[v / 32 * 4 + v % 4] * unit;
                };
                if constexpr (KF == KV_F16) {
                    split_floats(value(0), value(1), *(uint32_t *) high, *(uint32_t *) low);
                } else {
                    uint32_t number[4];
#pragma unroll
                    for (int l = 0; l < 4; ++l) {
                        number[l] = __float_as_uint(value(l) + (MAGIC + 128.0f));
                    }
                    split_bytes(number[0], number[1], number[2], number[3], *(uint32_t *) high, *(uint32_t *) low);
                }
            }
        }
    }

    // The queries of a column tile as operands, [K_STEPS][lane][2]. Returns what a product with this lane's column is
    // worth.
    static __device__ __forceinline__ float store_queries(const decode_params & p, float (&x)[D / 8],
                                                          uint32_t * operands, int lane) {
        if constexpr (D >= 128) {
            if (p.k.rotated) {
                rotate_queries(p, x, lane);
            }
        }
        uint32_t top = 0;  // as unsigned numbers, infinity and NaN are above all finite floats
#pragma unroll
        for (int m = 0; m < D / 8; ++m) {
            top = max(top, __float_as_uint(x[m]) & 0x7fffffff);
        }
        top                   = max(top, __shfl_xor_sync(0xffffffff, top, 1));
        top                   = max(top, __shfl_xor_sync(0xffffffff, top, 2));
        top                   = max(top, __shfl_xor_sync(0xffffffff, top, 4));
        // fp16: relative to the greatest, so that no query overflows. Else 127 * 256.
        constexpr float LIMIT = KF == KV_F16 ? 1.0f : 32512.0f;
        const float     most  = __uint_as_float(top);
        const float     unit  = __fdividef(LIMIT, fmaxf(most, 1e-30f));
        if ((KF == KV_PLANE2 || KF == KV_PLANE4) && p.k.interleaved) {
            store_operands<true>(x, unit, (uint8_t *) operands, lane);
        } else {
            store_operands<false>(x, unit, (uint8_t *) operands, lane);
        }
        return (most + (most - most)) * (1.0f / LIMIT);  // NaN if not finite
    }

    using query_operands = uint2[Q_IN_REGISTERS ? NT * K_STEPS : 1];

    static __device__ __forceinline__ uint2 query(const query_operands & q, const uint2 * q_shared, int i, int lane) {
        return Q_IN_REGISTERS ? q[i] : q_shared[i * 32 + lane];
    }

    // ---- scores: s[nt][r] of key 8r + g and column 4nt + t

    // The products. `rows` is where the head's part of the tile's first row begins.
    static __device__ __forceinline__ void scores(const decode_params & p, const uint8_t * rows,
                                                  const query_operands & q, const uint2 * q_shared, int lane,
                                                  float (&s)[NT][R]) {
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int r = 0; r < R; r += 2) {
            const uint8_t * row  = rows + (8 * r + g) * p.k.row;
            const uint8_t * row8 = row + 8 * p.k.row;
            if constexpr (KF == KV_F16) {
                float4 c[NT] = {};
#pragma unroll
                for (int step = 0; step < K_STEPS; ++step) {
                    const int   at = 32 * step + 4 * t;
                    const uint4 a  = { load_u32(row + at), load_u32(row8 + at), load_u32(row + at + 16),
                                       load_u32(row8 + at + 16) };
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        const uint2 b = query(q, q_shared, nt * K_STEPS + step, lane);
                        c[nt]         = mma_f16(a, b.x, b.y, c[nt]);
                    }
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    s[nt][r]     = c[nt].x + c[nt].y;
                    s[nt][r + 1] = c[nt].z + c[nt].w;
                }
            } else {
                constexpr int STEPS = k_codec::BLOCK / 32;
#pragma unroll
                for (int block = 0; block < D / k_codec::BLOCK; ++block) {
                    uint32_t a[STEPS][k_codec::TERMS][2], a8[STEPS][k_codec::TERMS][2];
                    k_codec::k_operands(row + block * k_codec::BYTES, t, p.k.levels, a);
                    k_codec::k_operands(row8 + block * k_codec::BYTES, t, p.k.levels, a8);
                    const float d  = load_half(row + block * k_codec::BYTES + k_codec::SCALE);
                    const float d8 = load_half(row8 + block * k_codec::BYTES + k_codec::SCALE);
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        int4 c = {};
#pragma unroll
                        for (int step = 0; step < STEPS; ++step) {
                            const uint2 b = query(q, q_shared, nt * K_STEPS + block * STEPS + step, lane);
#pragma unroll
                            for (int i = 0; i < k_codec::TERMS; ++i) {
                                c = mma_s8({ a[step][i][0], a8[step][i][0], a[step][i][1], a8[step][i][1] }, b.x, b.y,
                                           c);
                            }
                        }
                        const float x  = (float) (c.x * 256 + c.y) * d;
                        const float x8 = (float) (c.z * 256 + c.w) * d8;
                        s[nt][r]       = block == 0 ? x : s[nt][r] + x;
                        s[nt][r + 1]   = block == 0 ? x8 : s[nt][r + 1] + x8;
                    }
                }
            }
        }
    }

    // Products -> scores in units of log 2: scaled and capped.
    static __device__ __forceinline__ void scale_scores(const decode_params & p, const float (&q_unit)[NT],
                                                        float (&s)[NT][R]) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                s[nt][r] *= q_unit[nt];
            }
        }
        if (p.softcap != 0.0f) {
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    s[nt][r] = p.softcap * LOG2E * tanhf(s[nt][r]);
                }
            }
        }
    }

    // The mask's values for a lane's keys, two fp16 to a word; hidden where there is no key.
    static constexpr uint32_t HIDDEN = 0xfc00;  // -infinity

    static __device__ __forceinline__ void load_mask(const decode_params & p, const half * const (&mask)[NT], int first,
                                                     int g, uint32_t (&x)[NT][R / 2]) {
        const bool whole = first + KEYS <= p.n_kv;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const uint16_t * m = (const uint16_t *) mask[nt] + first + g;
#pragma unroll
            for (int r = 0; r < R / 2; ++r) {
                if (!p.mask) {
                    x[nt][r] = 0;
                } else if (whole) {
                    x[nt][r] = multiply_add(m[16 * r + 8], 0x10000, m[16 * r]);
                }
                if (!whole) {
                    const int left = p.n_kv - (first + 16 * r + g);
                    x[nt][r]       = (left < 1 ? HIDDEN
                                      : p.mask ? m[16 * r]
                                               : 0) |
                               (left < 9 ? HIDDEN
                                : p.mask ? m[16 * r + 8]
                                         : 0)
                                   << 16;
                }
            }
        }
    }

    // The same in another order, a lane's share of the tile in one piece where it is aligned. Zeros behind the last
    // key: what is loaded is not looked at here, so that nobody waits for it.
    static __device__ __forceinline__ void glance(const decode_params & p, const half * const (&mask)[NT], int first,
                                                  int g, uint32_t (&x)[NT][R / 2]) {
        const bool whole = first + KEYS <= p.n_kv;
        if (p.mask && first < p.n_kv && !(p.mask_aligned && whole)) {
            load_mask(p, mask, first, g, x);
            return;
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const char * from = (const char *) (mask[nt] + first) + g * (R * sizeof(half));
#pragma unroll
            for (int r = 0; r < R / 2; r += 2) {
                const uint2 y = p.mask && whole ? *(const uint2 *) (from + r * 4) : make_uint2(0, 0);
                x[nt][r]      = y.x;
                x[nt][r + 1]  = y.y;
            }
        }
    }

    static __device__ __forceinline__ void add_mask(const uint32_t (&seen)[NT][R / 2], const float (&slope)[NT],
                                                    float (&s)[NT][R]) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int r = 0; r < R / 2; ++r) {  // -infinity whatever a hidden key scores
                const float2 bias = __half22float2(*(const half2 *) &seen[nt][r]);
                s[nt][2 * r]      = bias.x == -INFINITY ? -INFINITY : s[nt][2 * r] + slope[nt] * bias.x;
                s[nt][2 * r + 1]  = bias.y == -INFINITY ? -INFINITY : s[nt][2 * r + 1] + slope[nt] * bias.y;
            }
        }
    }

    // Scores -> probabilities relative to the greatest of the tile and column, which count `weight`; what was summed
    // before counts `factor`. True if that is not 1 for all. `sum` is of this lane's keys.
    static __device__ __forceinline__ bool softmax(float (&s)[NT][R], float (&top)[NT], float (&sum)[NT],
                                                   float (&weight)[NT], float (&factor)[NT]) {
        bool rescale = false;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            float most = s[nt][0];
#pragma unroll
            for (int r = 1; r < R; ++r) {
                most = fmaxf(most, s[nt][r]);
            }
            most                 = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 4));
            most                 = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
            most                 = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
            const float base     = most == -INFINITY ? 0.0f : most;  // nothing to see: probabilities of 0
            float       tile_sum = 0.0f;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                s[nt][r] = exp2_approx(s[nt][r] - base);
                tile_sum += s[nt][r];
            }
            const float new_top  = fmaxf(top[nt], most);
            const float new_base = new_top == -INFINITY ? 0.0f : new_top;
            factor[nt]           = exp2_approx(top[nt] - new_base);
            weight[nt]           = exp2_approx(most - new_base);
            sum[nt]              = sum[nt] * factor[nt] + tile_sum * weight[nt];
            top[nt]              = new_top;
            rescale              = rescale || factor[nt] != 1.0f;
        }
        return __any_sync(0xffffffff, rescale);
    }

    // ---- output: o[nt][n] += sum over the keys of p * V, of column 4nt + t, value v_place(n, g)

    static constexpr __host__ __device__ int v_place(int n, int g, bool interleaved) {
        if constexpr (VF == KV_F16) {
            return 16 * (n / 2) + 2 * g + n % 2;
        } else {
            constexpr int TILES = v_codec::BLOCK / 8;
            return n / TILES * v_codec::BLOCK +
                   v_codec::place(g, n % TILES / v_codec::PART, n % v_codec::PART, interleaved);
        }
    }

    // What the lanes hold of P -> an operand. Lane 4g + t has a word of the high and one of the low parts for k group g
    // of column t; it needs groups 2t and 2t + 1 of column g / 2, high for an even g.
    static __device__ __forceinline__ uint2 exchange(uint32_t high, uint32_t low, int lane) {
        const int      from = 8 * (lane & 3) + (lane >> 3);
        const uint32_t h0 = __shfl_sync(0xffffffff, high, from), h1 = __shfl_sync(0xffffffff, high, from + 4);
        const uint32_t l0 = __shfl_sync(0xffffffff, low, from), l1 = __shfl_sync(0xffffffff, low, from + 4);
        return lane & 4 ? make_uint2(l0, l1) : make_uint2(h0, h1);
    }

    // `prob` are the probabilities of a lane's keys, `weight` is what the tile counts for, `hidden` says that some are
    // 0 because nobody may see the key, whatever it holds.
    static __device__ __forceinline__ void add_values(const decode_params & p, const uint8_t * rows,
                                                      const float (&prob)[NT][R], const float (&weight)[NT],
                                                      bool hidden, int lane, float (&o)[NT][V_TILES]) {
        const int g = lane >> 2, t = lane & 3;
        if constexpr (VF == KV_F16) {
            uint2 b[NT][KEYS / 16];
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                for (int k = 0; k < KEYS / 16; ++k) {
                    uint32_t high, low;
                    split_floats(prob[nt][2 * k], prob[nt][2 * k + 1], high, low);
                    b[nt][k] = exchange(high, low, lane);
                }
            }
#pragma unroll
            for (int pair = 0; pair < V_TILES / 2; ++pair) {
                float4 c[NT] = {};
#pragma unroll
                for (int k = 0; k < KEYS / 16; ++k) {  // values 2g and 2g + 1 of four keys
                    const uint8_t * row = rows + (16 * k + 2 * t) * p.v.row + 32 * pair + 4 * g;
                    const uint32_t  x0 = load_u32(row), x8 = load_u32(row + 8 * p.v.row);
                    const uint32_t  x1 = load_u32(row + p.v.row), x9 = load_u32(row + 9 * p.v.row);
                    const uint4     a = { permute_bytes(x0, x8, 0x5410), permute_bytes(x0, x8, 0x7632),
                                          permute_bytes(x1, x9, 0x5410), permute_bytes(x1, x9, 0x7632) };
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        c[nt] = mma_f16(a, b[nt][k].x, b[nt][k].y, c[nt]);
                    }
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    o[nt][2 * pair] += (c[nt].x + c[nt].y) * weight[nt];
                    o[nt][2 * pair + 1] += (c[nt].z + c[nt].w) * weight[nt];
                }
            }
        } else {
            using raw                 = typename v_codec::raw;
            constexpr int BLOCK_TILES = v_codec::BLOCK / 8;
            constexpr int STEPS       = KEYS / 32;
#pragma unroll
            for (int block = 0; block < D / v_codec::BLOCK; ++block) {
                const uint8_t * part_of_row = rows + block * v_codec::BYTES;
                float           d[R];
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    d[r] = load_half(part_of_row + (8 * r + g) * p.v.row + v_codec::SCALE);
                }
                // The order of fixed_point: [step][half][i] is key 32 step + 16 half + 8 (i % 2) + 2t + i / 2.
                raw packed[STEPS][2][4];
#pragma unroll
                for (int r = 0; r < R; ++r) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        packed[r / 4][r / 2 % 2][r % 2 + 2 * odd] =
                            v_codec::load(part_of_row + (8 * r + 2 * t + odd) * p.v.row, g);
                    }
                }
                uint2 b[NT][STEPS];
                float unit[NT];
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    unit[nt] = weight[nt] * fixed_point(prob[nt], d, hidden, lane, b[nt]);
                }
#pragma unroll
                for (int part = 0; part < v_codec::PARTS; ++part) {
                    uint32_t a[STEPS][2][v_codec::TERMS][v_codec::PART];
#pragma unroll
                    for (int i = 0; i < STEPS * 2; ++i) {
                        v_codec::v_operands(packed[i / 2][i % 2], g, part, p.v.levels, a[i / 2][i % 2]);
                    }
#pragma unroll
                    for (int n = 0; n < v_codec::PART; n += 2) {
                        const int at = block * BLOCK_TILES + part * v_codec::PART + n;
#pragma unroll
                        for (int nt = 0; nt < NT; ++nt) {
                            int4 c = {};
#pragma unroll
                            for (int k = 0; k < STEPS; ++k) {
#pragma unroll
                                for (int i = 0; i < v_codec::TERMS; ++i) {
                                    c = mma_s8({ a[k][0][i][n], a[k][0][i][n + 1], a[k][1][i][n], a[k][1][i][n + 1] },
                                               b[nt][k].x, b[nt][k].y, c);
                                }
                            }
                            o[nt][at] += (float) (c.y * 256 + c.x) * unit[nt];
                            o[nt][at + 1] += (float) (c.w * 256 + c.z) * unit[nt];
                        }
                    }
                }
            }
        }
    }

    // Probability times scale as 16-bit numbers; returns their unit, without the step. Not finite where a key that
    // counts has a scale that is not: as unsigned numbers, infinity and NaN are above all finite floats.
    static __device__ __forceinline__ float fixed_point(const float (&prob)[R], const float (&d)[R], bool hidden,
                                                        int lane, uint2 (&b)[KEYS / 32]) {
        float    x[R];
        uint32_t top = 0;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            x[r] = prob[r] * d[r];
        }
        if (hidden) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                x[r] = prob[r] == 0.0f ? 0.0f : x[r];
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            top = max(top, __float_as_uint(x[r]) & 0x7fffffff);
        }
        top              = max(top, __shfl_xor_sync(0xffffffff, top, 4));
        top              = max(top, __shfl_xor_sync(0xffffffff, top, 8));
        top              = max(top, __shfl_xor_sync(0xffffffff, top, 16));
        const float most = __uint_as_float(top);
        const float unit = __fdividef(32512.0f, fmaxf(most, 1e-30f));
#pragma unroll
        for (int k = 0; k < KEYS / 32; ++k) {
            uint32_t number[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                number[i] = __float_as_uint(x[4 * k + i] * unit + (MAGIC + 128.0f));
            }
            // Low bytes, then high bytes, of two keys: an element of the even columns, and one of the odd.
            b[k].x = transpose_halves(permute_bytes(number[0], number[1], 0x5140) ^ 0x8080);
            b[k].y = transpose_halves(permute_bytes(number[2], number[3], 0x5140) ^ 0x8080);
        }
        return (most + (most - most)) * (1.0f / 32512.0f);
    }
};
