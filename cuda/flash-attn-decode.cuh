// The attention kernel for few queries: FLASH_ATTN_EXT with 1 to 16 query tokens over a packed cache.
//
//   flash_attn_decode   a block stages tiles of 32 whole rows of the cache, of up to 16 KV heads. A warp has one KV head,
//                       and all query heads that share it; it keeps a running softmax. With fewer heads than warps,
//                       groups of warps take turns with the tiles, and are merged in the end.
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
// Rows are staged whole because a head's part of a row is not aligned to the 32 bytes that memory moves: copied head by
// head, twice the bytes went through the L2 cache, and that was the limit. In shared memory rows lie an odd number of
// 16-byte pieces apart where the cache's rows are aligned: then no two lanes hit the same bank.
//
// Truth: tests/c/test-turbokv-ops.cpp (float64); on the CPU turbokv-attention.c.

#pragma once

#include "flash-attn-tile.cuh"

// What registers allow, with one block per SM.
constexpr __host__ __device__ int decode_max_warps(int head_size, int column_tiles) {
    return head_size * column_tiles <= 128 ? 16 : 8;
}

// Bytes of shared memory: the query's operands of each KV head, what they are worth, a row of floats for each warp;
// then the stages of each group, where in the end the warps are merged.
template <class tile> struct decode_shared {
    static constexpr int OPERANDS = tile::COLUMNS / DECODE_COLUMNS * tile::K_STEPS * 32 * 16;
    static constexpr int MERGE    = tile::COLUMNS * (tile::V_TILES * 8 * 4 + 8);  // of a warp

    static __host__ __device__ int head(int n_heads, int n_warps) {
        return n_heads * (OPERANDS + tile::COLUMNS * 4) + n_warps * tile::V_TILES * 8 * 4;
    }

    static __host__ __device__ int stage(int k_row, int v_row) { return DECODE_TILE * (k_row + v_row) + 32; }

    static __host__ int all(int n_heads, int n_groups, int n_stage, int k_row, int v_row) {
        const int stages = n_groups * n_stage * stage(k_row, v_row), merge = n_heads * n_groups * MERGE;
        return head(n_heads, n_heads * n_groups) + (stages > merge ? stages : merge);
    }
};

// Starts copying rows first .. of a tile; those behind the last key repeat it. The warps of a group share the rows.
static __device__ __forceinline__ void stage_rows(const decode_operand & x, const char * data, int first, int n_kv,
                                                  uint8_t * stage, int warp, int n_warps, int lane) {
    const int  lanes  = 1 << x.lanes_log2;
    const int  piece  = lane & (lanes - 1);
    const int  step   = n_warps << (5 - x.lanes_log2);
    const int  offset = (uintptr_t) (data + first * x.nb1) & 15;
    for (int row = (warp << (5 - x.lanes_log2)) + (lane >> x.lanes_log2); row < DECODE_TILE; row += step) {
        const uintptr_t from = (uintptr_t) (data + min(first + row, n_kv - 1) * x.nb1);
        const char *    base = (const char *) (from & ~(uintptr_t) 15);
        uint8_t *       to   = stage + ((offset + row * x.row) & ~15);
        const int       end  = (int) (from & 15) + x.slice;
        for (int at = 16 * piece; at < end; at += 16 * lanes) {
            copy_async_16(to + at, base + at);
        }
    }
}

// Of the warps of a group. There are at most 8 groups of more than one warp, and 16 barriers, of which one is taken.
static __device__ __forceinline__ void group_barrier(int group, int n_warps) {
    if (n_warps == 1) {
        __syncwarp();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(32 * n_warps) : "memory");
    }
}

template <int D, int MT, kv_format KF, kv_format VF>
__launch_bounds__(32 * decode_max_warps(D, MT), 1)
static __global__ void flash_attn_decode(const __grid_constant__ decode_params p) {
#if __CUDA_ARCH__ >= 750
    using tile             = decode_tile<D, MT, KF, VF>;
    using memory           = decode_shared<tile>;
    constexpr int COLUMNS  = tile::COLUMNS;
    constexpr int J        = tile::J;

    const int lane = threadIdx.x, warp = threadIdx.y, n_warps = blockDim.y;
    const int g = lane >> 2, t = lane & 3;
    const int group = warp / p.n_head_block, n_groups = n_warps / p.n_head_block;
    const int head_of_block = warp - group * p.n_head_block;
    const int first_head    = blockIdx.x * p.n_head_block;
    const int kv_head       = first_head + head_of_block;
    const int split         = blockIdx.y;
    const int column_tile   = blockIdx.z % p.n_column_tiles;
    const int stream        = blockIdx.z / p.n_column_tiles;
    const int first_column  = column_tile * COLUMNS;
    const int n_columns     = min(COLUMNS, p.n_q * p.gqa - first_column);

    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t * operands = (uint32_t *) (shared + head_of_block * memory::OPERANDS);
    float *    units    = (float *) (shared + p.n_head_block * memory::OPERANDS) + head_of_block * COLUMNS;
    float *    scratch  = (float *) (shared + p.n_head_block * (memory::OPERANDS + COLUMNS * 4)) + warp * D;
    uint8_t *  stages   = shared + memory::head(p.n_head_block, n_warps);

    // Query token and query head of column c of a KV head; behind the last column, those of the last.
    const auto place_of = [&](int c, int kv_head) {
        const int column = first_column + min(c, n_columns - 1);
        const int token  = ((uint32_t) column * p.gqa_inverse) >> 22;
        return make_int2(token, kv_head * p.gqa + column - token * p.gqa);
    };
    ggml_cuda_pdl_sync();  // what is read from here on may be another kernel's output

    // 1. The first tiles of this group are on their way: every n_split * n_groups-th is its own.
    const int    kv_stream   = stream / p.n_stream_q_per_kv;
    const char * k_data      = p.k.data + first_head * p.k.nb2 + kv_stream * p.k.nb3;
    const char * v_data      = p.v.data + first_head * p.v.nb2 + kv_stream * p.v.nb3;
    const int    n_tiles     = (p.n_kv + DECODE_TILE - 1) / DECODE_TILE;
    const int    first_tile  = split * n_groups + group;
    const int    step        = p.n_split * n_groups;
    const int    k_bytes     = DECODE_TILE * p.k.row + 16;
    const int    stage_bytes = memory::stage(p.k.row, p.v.row);
    stages += group * p.n_stage * stage_bytes;
    const auto stage = [&](int tile, int slot) {
        if (tile < n_tiles) {
            uint8_t * to = stages + slot * stage_bytes;
            stage_rows(p.k, k_data, tile * DECODE_TILE, p.n_kv, to, head_of_block, p.n_head_block, lane);
            stage_rows(p.v, v_data, tile * DECODE_TILE, p.n_kv, to + k_bytes, head_of_block, p.n_head_block, lane);
        }
        copy_async_commit();  // an empty group of copies, too: waiting counts them
    };
    for (int i = 0; i < p.n_stage - 1; ++i) {
        stage(first_tile + i * step, i);
    }

    // 2. The query.
    for (int c = group; c < COLUMNS; c += n_groups) {
        const int2    place = place_of(c, kv_head);
        const float * q     = (const float *) (p.q + place.x * p.q_nb1 + place.y * p.q_nb2 + stream * p.q_nb3);
        const float   unit  = tile::load_query(p, c < n_columns ? q : nullptr, scratch, operands, c, lane);
        if (lane == 0) {
            units[c] = unit;
        }
    }
    float        slope[MT];
    const half * mask[MT];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
        const int2 place = place_of(DECODE_COLUMNS * mt + g, kv_head);
        slope[mt]        = LOG2E;
        if (p.max_bias > 0.0f) {
            const bool low = place.y < (int) p.n_head_log2;
            slope[mt] *= powf(low ? p.m0 : p.m1, low ? place.y + 1 : 2 * (place.y - (int) p.n_head_log2) + 1);
        }
        mask[mt] = (const half *) (p.mask + place.x * p.mask_nb1 + place.y % p.mask_ne2 * p.mask_nb2 +
                                   stream % p.mask_ne3 * p.mask_nb3);
    }
    // Whether any column sees any key of a tile, and whether the mask says more than that all are seen. Known a tile
    // ahead, from loads that are under way while K is scored.
    bool       any_next, biased_next;
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
        tile::load_mask(p, mask, first_tile * DECODE_TILE, t, seen);
        look(seen);
    }
    __syncthreads();

    const uint4 * q_shared = (const uint4 *) operands;
    uint4         q[tile::Q_IN_REGISTERS ? MT * tile::K_STEPS : 1];
    if constexpr (tile::Q_IN_REGISTERS) {
#pragma unroll
        for (int i = 0; i < MT * tile::K_STEPS; ++i) {
            q[i] = q_shared[i * 32 + lane];
        }
    }
    float q_unit[MT];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
        q_unit[mt] = units[DECODE_COLUMNS * mt + g] * p.scale * p.k.step * (p.softcap == 0.0f ? LOG2E : 1.0f);
    }

    // 3. The tiles.
    float o[MT][tile::V_TILES][2] = { };
    float top[MT], sum[MT];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
        top[mt] = -INFINITY;
        sum[mt] = 0.0f;
    }
    int slot = 0, next_slot = p.n_stage - 1;
    for (int i = first_tile; i < n_tiles; i += step) {
        const int  first  = i * DECODE_TILE;
        const bool any    = any_next;
        const bool biased = biased_next;

        if (p.n_stage == 2) {
            copy_async_wait<0>();
        } else if (p.n_stage == 3) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<2>();
        }
        group_barrier(group, p.n_head_block);  // all have this tile, and nobody needs the one before it
        stage(i + (p.n_stage - 1) * step, next_slot);
        const uint8_t * k_rows = stages + slot * stage_bytes + ((uintptr_t) (k_data + first * p.k.nb1) & 15) +
                                 head_of_block * tile::K_HEAD;
        const uint8_t * v_rows = stages + slot * stage_bytes + k_bytes +
                                 ((uintptr_t) (v_data + first * p.v.nb1) & 15) + head_of_block * tile::V_HEAD;
        next_slot = slot;
        slot      = slot + 1 == p.n_stage ? 0 : slot + 1;

        uint32_t seen_next[MT][J];
        tile::load_mask(p, mask, first + step * DECODE_TILE, t, seen_next);
        if (!any) {
            look(seen_next);
            continue;
        }
        float s[MT][J][2];
        tile::scores(p, k_rows, q, q_shared, lane, s);
        tile::scale_scores(p, q_unit, s);
        if (biased) {
            uint32_t seen[MT][J];
            tile::load_mask(p, mask, first, t, seen);
            tile::add_mask(seen, slope, s);
        }
        look(seen_next);

        float weight[MT], factor[MT];
        if (tile::softmax(s, top, sum, weight, factor)) {
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                for (int n = 0; n < tile::V_TILES; ++n) {
                    o[mt][n][0] *= factor[mt];
                    o[mt][n][1] *= factor[mt];
                }
            }
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            weight[mt] *= p.v.step;
        }
        tile::add_values(p, v_rows, s, weight, lane, o);
    }
    copy_async_wait<0>();
    ggml_cuda_pdl_lc();  // flash_attn_combine may be set up

    // 4. The groups are merged.
    __syncthreads();
    stages                = shared + memory::head(p.n_head_block, n_warps);
    const auto merge_o    = [&](int w) { return (float *) (stages + w * memory::MERGE); };
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
            for (int n = 0; n < tile::V_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    merge_o(warp)[c * D + tile::v_place(p, n, 2 * t + i)] = o[mt][n][i];
                }
            }
        }
    }
    __syncthreads();
    for (int c = group; c < n_columns; c += n_groups) {
        const int2    place = place_of(c, kv_head);
        const int64_t at    = (((int64_t) stream * p.n_head + place.y) * p.n_q + place.x) * p.n_split + split;

        float most = -INFINITY, total = 0.0f, value[D / 32] = { };
        for (int w = head_of_block; w < n_warps; w += p.n_head_block) {
            most = fmaxf(most, merge_meta(w)[c].x);
        }
        for (int w = head_of_block; w < n_warps; w += p.n_head_block) {
            const float2 m      = merge_meta(w)[c];
            const float  weight = m.x == -INFINITY && m.y == 0.0f ? 0.0f : exp2_approx(m.x - most);
            total += m.y * weight;
#pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                value[i] += merge_o(w)[c * D + 32 * i + lane] * weight;
            }
        }
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            p.partial[at * D + 32 * i + lane] = value[i];
        }
        if (lane == 0) {
            p.meta[at] = make_float2(most, total);
        }
    }
#else
    (void) p;
    __trap();  // turbokv_cuda_flash_attn_ext_supported has not let anybody come here
#endif
}
