// The attention kernel for few queries: FLASH_ATTN_EXT with few query tokens over a packed cache.
//
//   flash_attn_decode   a block stages tiles of 64 or 32 whole rows of the cache, of up to 16 KV heads. A warp has one
//                       KV head, and all query heads that share it; it keeps a running softmax. With fewer heads than
//                       warps, groups of warps take turns with the tiles, and are merged in the end.
//   flash_attn_combine  (flash-attn-decode.cu) merges the blocks, adds the sinks, rotates back what tbqN has rotated
//
// A column is a query of the group: (query token, query head of the KV head), head fastest. Queries and probabilities
// are 16-bit fixed point numbers, so that products with int8 levels cost no accuracy: tensor cores have rate to spare.
//
// K is scored as sum(q16 * level) * (scale of the key's block) * step. V is summed with p * (scale of the key's block)
// as the probability, relative to the greatest of the tile, so that the fixed point fits whatever the scores are.
// No value is decoded more than once for the 4 * NT columns of a block, and none is written anywhere.
//
// Rows are staged whole because a head's part of a row is not aligned to the 32 bytes that memory moves: copied head by
// head, twice the bytes went through the L2 cache, and that was the limit. In shared memory rows lie an odd number of
// 16-byte pieces apart where the cache's rows allow it: then no two lanes hit the same bank.
//
// Truth: tests/c/test-turbokv-ops.cpp (float64); on the CPU turbokv-attention.c.

#pragma once

#include "common.cuh"
#include "flash-attn-tile.cuh"

#define DECODE_MAX_WARPS  16
#define DECODE_MAX_STAGES 4

// Bytes of shared memory: the query's operands of each KV head, what they are worth, a row of floats for each warp;
// then the stages of each group, where in the end the warps are merged.
template <class tile>
struct decode_shared {
    static constexpr int OPERANDS = tile::COLUMNS / DECODE_COLUMNS * tile::K_STEPS * 32 * 8;
    static constexpr int MERGE    = tile::COLUMNS * (tile::V_TILES * 8 * 4 + 8);  // of a warp

    static __host__ __device__ int head(int n_heads, int n_warps) {
        return n_heads * (OPERANDS + tile::COLUMNS * 4) + n_warps * tile::V_TILES * 8 * 4;
    }

    static __host__ __device__ int stage(int k_row, int v_row) { return tile::KEYS * (k_row + v_row) + 32; }

    static __host__ int all(int n_heads, int n_groups, int n_stage, int k_row, int v_row) {
        const int stages = n_groups * n_stage * stage(k_row, v_row), merge = n_heads * n_groups * MERGE;
        return head(n_heads, n_heads * n_groups) + (stages > merge ? stages : merge);
    }
};

// Starts copying rows first .. of a tile; those behind the last key repeat it, where rows are multiples of 16 bytes.
// The warps of a group share the rows.
template <int KEYS>
static __device__ __forceinline__ void stage_rows(const decode_operand & x, const char * data, int first, int n_kv,
                                                  uint8_t * stage, int warp, int n_warps, int lane) {
    const int lanes  = 1 << x.lanes_log2;
    const int piece  = lane & (lanes - 1);
    const int step   = n_warps << (5 - x.lanes_log2);
    const int offset = (uintptr_t) (data + first * x.nb1) & 15;
    for (int row = (warp << (5 - x.lanes_log2)) + (lane >> x.lanes_log2); row < KEYS; row += step) {
        const uintptr_t from = (uintptr_t) (data + min(first + row, n_kv - 1) * x.nb1);
        const char *    base = (const char *) (from & ~(uintptr_t) 15);
        uint8_t *       to   = stage + ((offset + row * x.row) & ~15);
        const int       end  = (int) (from & 15) + x.slice;
        for (int at = 16 * piece; at < end; at += 16 * lanes) {
            copy_async_16(to + at, base + at);
        }
    }
}

// The same through the copy engine, every warp its share; what is behind the last key is left as it is.
template <int KEYS>
static __device__ __forceinline__ void stage_in_bulk(const decode_operand & x, const char * data, int first, int n_kv,
                                                     uint8_t * stage, bulk_barrier * barrier, int warp, int n_warps,
                                                     int lane) {
    const int    share = (KEYS + n_warps - 1) / n_warps;
    const int    begin = warp * share;
    const int    n     = min(share, min(KEYS, n_kv - first) - begin);
    const char * from  = data + (first + begin) * x.nb1;
    uint8_t *    to    = stage + begin * x.row;
    if (x.copy == COPY_SHARE) {
        if (lane == 0 && n > 0) {
            bulk_copy(to, from, n * x.slice, barrier);
        }
        return;
    }
    for (int row = lane; row < n; row += 32) {
        bulk_copy(to + row * x.row, from + row * x.nb1, x.slice, barrier);
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

template <int D, int NT, kv_format KF, kv_format VF>
__launch_bounds__(32 * decode_max_warps(D, NT), 1) static __global__
    void flash_attn_decode(const __grid_constant__ decode_params p) {
#if __CUDA_ARCH__ >= 750
    using tile            = decode_tile<D, NT, KF, VF>;
    using memory          = decode_shared<tile>;
    constexpr int COLUMNS = tile::COLUMNS;
    constexpr int KEYS    = tile::KEYS;

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
    uint32_t *                              operands = (uint32_t *) (shared + head_of_block * memory::OPERANDS);
    float *   units   = (float *) (shared + p.n_head_block * memory::OPERANDS) + head_of_block * COLUMNS;
    float *   scratch = (float *) (shared + p.n_head_block * (memory::OPERANDS + COLUMNS * 4)) + warp * D;
    uint8_t * stages  = shared + memory::head(p.n_head_block, n_warps);

    // Query token and query head of column c of a KV head; behind the last column, those of the last.
    const auto place_of = [&](int c) {
        const int column = first_column + min(c, n_columns - 1);
        const int token  = (int) ((column * p.gqa_inverse) >> 32);
        return make_int2(token, kv_head * p.gqa + column - token * p.gqa);
    };
    const auto query_of = [&](int c) {
        const int2 place = place_of(c);
        return c < n_columns ? (const float *) (p.q + place.x * p.q_nb1 + place.y * p.q_nb2 + stream * p.q_nb3)
                             : nullptr;
    };
    ggml_cuda_pdl_sync();  // what is read from here on may be another kernel's output
    float fetched[D / 32];
    tile::fetch_query(query_of(group), fetched, lane);

    // 1. The first tiles of this group are on their way: every n_split * n_groups-th is its own.
    const int    kv_stream   = stream / p.n_stream_q_per_kv;
    const char * k_data      = p.k.data + first_head * p.k.nb2 + kv_stream * p.k.nb3;
    const char * v_data      = p.v.data + first_head * p.v.nb2 + kv_stream * p.v.nb3;
    const int    n_tiles     = (p.n_kv + KEYS - 1) / KEYS;
    const int    first_tile  = split * n_groups + group;
    const int    step        = p.n_split * n_groups;
    const int    k_bytes     = KEYS * p.k.row + 16;
    const int    stage_bytes = memory::stage(p.k.row, p.v.row);
    stages += group * p.n_stage * stage_bytes;
#    ifdef TURBOKV_BULK_COPIES
    const bool bulk = p.k.copy != COPY_PIECES;
#    else
    constexpr bool bulk = false;
#    endif
    __shared__ bulk_barrier arrived[DECODE_MAX_WARPS * DECODE_MAX_STAGES];  // [group][slot]
    if (bulk) {
        if (warp == 0) {
            for (int i = lane; i < n_groups * p.n_stage; i += 32) {
                bulk_barrier_init(&arrived[i]);
            }
        }
        __syncthreads();
    }
    const auto stage = [&](int tile, int slot) {
        if (tile < n_tiles) {
            const int first = tile * KEYS;
            uint8_t * to    = stages + slot * stage_bytes;
            if (bulk) {
                bulk_barrier * barrier = &arrived[group * p.n_stage + slot];
                if (head_of_block == 0 && lane == 0) {
                    bulk_barrier_expect(barrier, min(KEYS, p.n_kv - first) * (p.k.slice + p.v.slice));
                }
                stage_in_bulk<KEYS>(p.k, k_data, first, p.n_kv, to, barrier, head_of_block, p.n_head_block, lane);
                stage_in_bulk<KEYS>(p.v, v_data, first, p.n_kv, to + k_bytes, barrier, head_of_block, p.n_head_block,
                                    lane);
                return;
            }
            stage_rows<KEYS>(p.k, k_data, first, p.n_kv, to, head_of_block, p.n_head_block, lane);
            stage_rows<KEYS>(p.v, v_data, first, p.n_kv, to + k_bytes, head_of_block, p.n_head_block, lane);
        }
        copy_async_commit();  // an empty group of copies, too: waiting counts them
    };
    for (int i = 0; i < p.n_stage - 1; ++i) {
        stage(first_tile + i * step, i);
    }

    // 2. The query.
    for (int c = group; c < COLUMNS; c += n_groups) {
        float next[D / 32];
        tile::fetch_query(query_of(c + n_groups), next, lane);
        const float unit = tile::store_query(p, fetched, scratch, operands, c, lane);
        if (lane == 0) {
            units[c] = unit;
        }
#    pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            fetched[i] = next[i];
        }
    }
    float        slope[NT];
    const half * mask[NT];
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const int2 place = place_of(DECODE_COLUMNS * nt + t);
        slope[nt]        = LOG2E;
        if (p.max_bias > 0.0f) {
            const bool low = place.y < (int) p.n_head_log2;
            slope[nt] *= powf(low ? p.m0 : p.m1, low ? place.y + 1 : 2 * (place.y - (int) p.n_head_log2) + 1);
        }
        mask[nt] = (const half *) (p.mask + place.x * p.mask_nb1 + place.y % p.mask_ne2 * p.mask_nb2 +
                                   stream % p.mask_ne3 * p.mask_nb3);
    }
    // Whether any column sees any key of a tile, and whether the mask says more than that all are seen. Known a tile
    // ahead, from loads that are under way while K is scored.
    bool       any_next, biased_next;
    const auto look = [&](const uint32_t(&seen)[NT][tile::R / 2]) {
        any_next = biased_next = false;
#    pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#    pragma unroll
            for (int r = 0; r < tile::R / 2; ++r) {
                any_next    = any_next || seen[nt][r] != tile::HIDDEN * 0x10001;
                biased_next = biased_next || seen[nt][r] != 0;
            }
        }
        any_next    = __any_sync(0xffffffff, any_next);
        biased_next = __any_sync(0xffffffff, biased_next);
    };
    {
        uint32_t seen[NT][tile::R / 2];
        tile::glance(p, mask, first_tile * KEYS, g, seen);
        look(seen);
    }
    __syncthreads();

    const uint2 *                 q_shared = (const uint2 *) operands;
    typename tile::query_operands q;
    if constexpr (tile::Q_IN_REGISTERS) {
#    pragma unroll
        for (int i = 0; i < NT * tile::K_STEPS; ++i) {
            q[i] = q_shared[i * 32 + lane];
        }
    }
    float q_unit[NT];
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        q_unit[nt] = units[DECODE_COLUMNS * nt + t] * p.scale * p.k.step * (p.softcap == 0.0f ? LOG2E : 1.0f);
    }

    // 3. The tiles.
    float o[NT][tile::V_TILES] = {};
    float top[NT], sum[NT];
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        top[nt] = -INFINITY;
        sum[nt] = 0.0f;
    }
    int slot = 0, next_slot = p.n_stage - 1, parity = 0;
    for (int i = first_tile; i < n_tiles; i += step) {
        const int  first  = i * KEYS;
        const bool any    = any_next;
        const bool biased = biased_next;

        if (bulk) {
            bulk_barrier_wait(&arrived[group * p.n_stage + slot], parity);
        } else if (p.n_stage == 2) {
            copy_async_wait<0>();
        } else if (p.n_stage == 3) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<2>();
        }
        group_barrier(group, p.n_head_block);  // all have this tile, and nobody needs the one before it
        stage(i + (p.n_stage - 1) * step, next_slot);
        const uint8_t * k_rows =
            stages + slot * stage_bytes + ((uintptr_t) (k_data + first * p.k.nb1) & 15) + head_of_block * tile::K_HEAD;
        const uint8_t * v_rows = stages + slot * stage_bytes + k_bytes + ((uintptr_t) (v_data + first * p.v.nb1) & 15) +
                                 head_of_block * tile::V_HEAD;
        next_slot = slot;
        if (++slot == p.n_stage) {
            slot = 0;
            parity ^= 1;
        }

        uint32_t seen_next[NT][tile::R / 2];
        tile::glance(p, mask, first + step * KEYS, g, seen_next);
        if (!any) {
            look(seen_next);
            continue;
        }
        float s[NT][tile::R];
        tile::scores(p, k_rows, q, q_shared, lane, s);
        tile::scale_scores(p, q_unit, s);
        if (biased) {
            uint32_t seen[NT][tile::R / 2];
            tile::load_mask(p, mask, first, g, seen);
            tile::add_mask(seen, slope, s);
        }
        look(seen_next);

        float weight[NT], factor[NT];
        if (tile::softmax(s, top, sum, weight, factor)) {
#    pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
#    pragma unroll
                for (int n = 0; n < tile::V_TILES; ++n) {
                    o[nt][n] *= factor[nt];
                }
            }
        }
#    pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            weight[nt] *= p.v.step;
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
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        sum[nt] += __shfl_xor_sync(0xffffffff, sum[nt], 4);
        sum[nt] += __shfl_xor_sync(0xffffffff, sum[nt], 8);
        sum[nt] += __shfl_xor_sync(0xffffffff, sum[nt], 16);
        const int c = DECODE_COLUMNS * nt + t;
        if (g == 0) {
            merge_meta(warp)[c] = make_float2(top[nt], sum[nt]);
        }
        if (c < n_columns) {
#    pragma unroll
            for (int n = 0; n < tile::V_TILES; ++n) {
                merge_o(warp)[c * D + tile::v_place(p, n, g)] = o[nt][n];
            }
        }
    }
    __syncthreads();
    for (int c = group; c < n_columns; c += n_groups) {
        const int2    place = place_of(c);
        const int64_t at    = (((int64_t) stream * p.n_head + place.y) * p.n_q + place.x) * p.n_split + split;

        float most = -INFINITY, total = 0.0f, value[D / 32] = {};
        for (int w = head_of_block; w < n_warps; w += p.n_head_block) {
            most = fmaxf(most, merge_meta(w)[c].x);
        }
        for (int w = head_of_block; w < n_warps; w += p.n_head_block) {
            const float2 m      = merge_meta(w)[c];
            const float  weight = m.x == -INFINITY && m.y == 0.0f ? 0.0f : exp2_approx(m.x - most);
            total += m.y * weight;
#    pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                value[i] += merge_o(w)[c * D + 32 * i + lane] * weight;
            }
        }
#    pragma unroll
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
