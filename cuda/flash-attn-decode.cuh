// The attention kernel for few queries: FLASH_ATTN_EXT with few query tokens over a packed cache.
//
//   flash_attn_decode   a block stages tiles of 64 or 32 whole rows of the cache, of up to 16 KV heads. A warp has one
//                       KV head, and all query heads that share it; it keeps a running softmax. With fewer heads than
//                       warps, groups of warps take turns with the tiles, and are merged in the end. Tiles are in slots
//                       of shared memory; the copy engine fills one again when the last warp has done with it.
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

#define DECODE_MAX_WARPS 16
#define DECODE_MAX_SLOTS 32  // of shared memory, a tile each

// What is known of a column, in shared memory: registers are scarce.
struct decode_column {
    const half * mask;   // of its query token and head
    float        slope;  // of what the mask holds, log2(e) without ALiBi
    float        unit;   // of its products with K
    int          row;    // [n_stream][n_head][n_q] of its query
};

// Bytes of shared memory: the query's operands and the columns of each KV head; then the slots, where in the end the
// warps are merged.
template <class tile>
struct decode_shared {
    static constexpr int OPERANDS = tile::COLUMNS / DECODE_COLUMNS * tile::K_STEPS * 32 * 8;
    static constexpr int HEAD     = OPERANDS + tile::COLUMNS * (int) sizeof(decode_column);
    static constexpr int MERGE = tile::COLUMNS * tile::V_TILES * 8 * 4;  // of a warp; a float2 for each column besides

    static __host__ __device__ int slot(int keys, int k_row, int v_row) { return keys * (k_row + v_row) + 32; }

    static __host__ int all(int n_heads, int n_groups, int n_slots, int keys, int k_row, int v_row) {
        const int slots = n_slots * slot(keys, k_row, v_row);
        const int merge = n_heads * (n_groups / 2) * (MERGE + tile::COLUMNS * (int) sizeof(float2));
        return n_heads * HEAD + (slots > merge ? slots : merge);
    }
};

// Starts copying the rows of a tile from row `first` on; those behind the last key repeat it, where rows are multiples
// of 16 bytes. The warps of a group share the rows.
template <int KEYS>
static __device__ __forceinline__ void stage_rows(const decode_operand & x, const char * data, int first, int n_kv,
                                                  uint8_t * slot, int warp, int n_warps, int lane) {
    const int lanes  = 1 << x.lanes_log2;
    const int piece  = lane & (lanes - 1);
    const int step   = n_warps << (5 - x.lanes_log2);
    const int offset = (uintptr_t) (data + (int64_t) first * x.nb1) & 15;
    for (int row = (warp << (5 - x.lanes_log2)) + (lane >> x.lanes_log2); row < KEYS; row += step) {
        const uintptr_t from = (uintptr_t) (data + (int64_t) min(first + row, n_kv - 1) * x.nb1);
        const char *    base = (const char *) (from & ~(uintptr_t) 15);
        uint8_t *       to   = slot + ((offset + row * x.row) & ~15);
        const int       end  = (int) (from & 15) + x.slice;
        for (int at = 16 * piece; at < end; at += 16 * lanes) {
            copy_async_16(to + at, base + at);
        }
    }
}

// The same through the copy engine, by one warp: n rows; what is behind them is left as it is. `expected` bytes are to
// come to the barrier, with those of other copies; 0 if it has been told already.
static __device__ __forceinline__ void stage_in_bulk(const decode_operand & x, const char * from, int n, uint8_t * slot,
                                                     bulk_barrier * barrier, int expected, int lane) {
    if (expected != 0 && lane == 0) {
        bulk_barrier_expect(barrier, expected);
    }
    __syncwarp();
    if (x.copy == COPY_TILE) {
        if (lane == 0) {
            bulk_copy(slot, from, n * x.slice, barrier);
        }
        return;
    }
#pragma unroll 1
    for (int row = lane; row < n; row += 32) {
        bulk_copy(slot + row * x.row, from + (int64_t) row * x.nb1, x.slice, barrier);
    }
}

// What the copy engine and the warps tell each other about K, or V, of the slots.
struct slot_barriers {
    // Has a slot's tile arrived for the n-th time? There is a barrier for even n and one for odd n: it is always the
    // same group that waits for one, and so none is two uses behind, which a barrier could not tell from none.
    bulk_barrier arrived[2][DECODE_MAX_SLOTS];
    bulk_barrier done[DECODE_MAX_SLOTS];  // its threads need it no more
};

// Of the warps of a group. There are at most 8 groups of more than one warp, and 16 barriers; 0 is __syncthreads.
static __device__ __forceinline__ void group_barrier(int group, int n_warps) {
    if (n_warps == 1) {
        __syncwarp();
    } else {
        named_barrier(group + 1, 32 * n_warps);
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

    const int lane = threadIdx.x, head_of_block = threadIdx.y, group = threadIdx.z;
    const int n_heads = blockDim.y, n_groups = blockDim.z;
    const int warp = group * n_heads + head_of_block, n_warps = n_groups * n_heads;
    const int g = lane >> 2, t = lane & 3;
    const int first_head   = blockIdx.x * n_heads;
    const int kv_head      = first_head + head_of_block;
    const int split        = blockIdx.y;
    const int stream       = p.n_column_tiles == 1 ? blockIdx.z : blockIdx.z / p.n_column_tiles;
    const int first_column = (blockIdx.z - stream * p.n_column_tiles) * COLUMNS;
    const int n_columns    = min(COLUMNS, p.n_q * p.gqa - first_column);

    uint8_t *       shared   = dynamic_shared();
    uint32_t *      operands = (uint32_t *) (shared + head_of_block * memory::HEAD);
    decode_column * columns  = (decode_column *) ((uint8_t *) operands + memory::OPERANDS);
    uint8_t *       slots    = shared + n_heads * memory::HEAD;

    // Query token and query head of column c of a KV head; behind the last column, those of the last.
    const auto place_of = [&](int c) {
        const int column = first_column + min(c, n_columns - 1);
        const int token  = p.gqa == 1 ? column : __umulhi(column, p.gqa_inverse);
        return make_int2(token, kv_head * p.gqa + column - token * p.gqa);
    };
    const char * q_data   = p.q + stream * p.q_nb3;
    const auto   query_of = [&](int c) {
        const int2 place = place_of(c);
        return c < n_columns ? (const float *) (q_data + (int64_t) place.x * p.q_nb1 + (int64_t) place.y * p.q_nb2)
                               : nullptr;
    };

    // Tile j of this block is tile split + j * n_split of all; it has slot j % n_slots, and group j % n_groups.
    const int                kv_stream  = p.n_stream_q_per_kv == 1 ? stream : stream / p.n_stream_q_per_kv;
    const char *             k_data     = p.k.data + (int64_t) first_head * p.k.nb2 + kv_stream * p.k.nb3;
    const char *             v_data     = p.v.data + (int64_t) first_head * p.v.nb2 + kv_stream * p.v.nb3;
    const int                n_tiles    = (p.n_kv + KEYS - 1) / KEYS;
    const int                first_tile = split + group * p.n_split;
    const int                step       = n_groups * p.n_split;
    const int                k_bytes    = KEYS * p.k.row + 16;
    const int                slot_bytes = memory::slot(KEYS, p.k.row, p.v.row);
    __shared__ slot_barriers k_barriers, v_barriers;
    const bool               bulk = decode_copies_in_bulk(TURBOKV_ARCH) && p.k.copy != COPY_PIECES;

    // K and V of a tile, by one warp. They arrive apart at a slot's first tile, whose V is asked for later, and where K
    // of a slot is asked for earlier; else K's barrier is that of both.
    const auto come_apart = [&](int use) { return tile::K_EARLY || use == 0; };
    const auto fetch_keys = [&](int tile_index, int slot, int use) {
        if (tile_index < n_tiles) {
            const int first = tile_index * KEYS, n = min(KEYS, p.n_kv - first);
            stage_in_bulk(p.k, k_data + (int64_t) first * p.k.nb1, n, slots + slot * slot_bytes,
                          &k_barriers.arrived[use & 1][slot], n * (come_apart(use) ? p.k.slice : p.k.slice + p.v.slice),
                          lane);
        }
    };
    const auto fetch_values = [&](int tile_index, int slot, int use) {
        if (tile_index < n_tiles) {
            const int first = tile_index * KEYS, n = min(KEYS, p.n_kv - first);
            stage_in_bulk(p.v, v_data + (int64_t) first * p.v.nb1, n, slots + slot * slot_bytes + k_bytes,
                          &(come_apart(use) ? v_barriers : k_barriers).arrived[use & 1][slot],
                          come_apart(use) ? n * p.v.slice : 0, lane);
        }
    };
    // This warp needs K, or V, of a slot no more. True for the last one, which has it filled again. That lane 0 arrives
    // when all have read would be enough, but racecheck takes it for a race; that all do costs 0 to 2 %.
    const auto release = [&](slot_barriers & barriers, int slot, int use) {
        if (lane != 0) {
            bulk_barrier_arrive(&barriers.done[slot]);
        }
        __syncwarp();
        bool last = false;
        if (lane == 0) {
            last = bulk_barrier_arrive(&barriers.done[slot]);
        }
        last = __shfl_sync(0xffffffff, last, 0);
        if (last) {
            bulk_barrier_wait(&barriers.done[slot], use & 1);  // it does not; what the others have read has been read
        }
        return last;
    };
    const auto fetch_in_pieces = [&](int tile, int slot) {  // by the warps of a group
        if (tile < n_tiles) {
            uint8_t * to = slots + slot * slot_bytes;
            stage_rows<KEYS>(p.k, k_data, tile * KEYS, p.n_kv, to, head_of_block, n_heads, lane);
            stage_rows<KEYS>(p.v, v_data, tile * KEYS, p.n_kv, to + k_bytes, head_of_block, n_heads, lane);
        }
        copy_async_commit();  // an empty group of copies, too: waiting counts them
    };
    if (bulk && lane == 0) {
#    pragma unroll 1
        for (int i = warp; i < p.n_slots; i += n_warps) {  // those that this warp will fill first
            for (slot_barriers * b : { &k_barriers, &v_barriers }) {
                bulk_barrier_init(&b->arrived[0][i], 1);
                bulk_barrier_init(&b->arrived[1][i], 1);
                bulk_barrier_init(&b->done[i], 32 * n_heads);
            }
        }
    }
    // Whether any column sees any key of a tile, and whether the mask says more than that all are seen. Known a tile
    // ahead, from loads that are under way while K is scored.
    bool       any_next, biased_next;
    const auto look = [&](const uint32_t(&seen)[NT][tile::R / 2], int tile_index) {
        uint32_t not_hidden = 0, not_zero = 0;
#    pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#    pragma unroll
            for (int r = 0; r < tile::R / 2; ++r) {
                not_hidden |= seen[nt][r] ^ tile::HIDDEN * 0x10001;
                not_zero |= seen[nt][r];
            }
        }
        any_next    = __any_sync(0xffffffff, not_hidden != 0);
        biased_next = __any_sync(0xffffffff, not_zero != 0) || (tile_index + 1) * KEYS > p.n_kv;
    };
    const auto    column_of = [&](int nt) { return DECODE_COLUMNS * nt + lane / 8; };  // whose query a lane prepares
    const float * query     = group < NT ? query_of(column_of(group)) : nullptr;

    // 1. Much that needs no other kernel's output has been done. What comes from far away is asked for in the order in
    // which it is needed: K of the first tile of each group, the queries of this warp, its part of the mask, V.
    ggml_cuda_pdl_sync();
    __syncwarp();
    if (bulk) {
        if (warp < n_groups) {
            fetch_keys(split + warp * p.n_split, warp, 0);
        }
    } else {
#    pragma unroll 1
        for (int i = group; i < p.n_slots - n_groups; i += n_groups) {
            fetch_in_pieces(split + i * p.n_split, i);
        }
    }
    float fetched[D / 8];
    tile::fetch_queries(query, fetched, lane);
    const char * mask_data = p.mask + (p.mask_ne3 == 1 ? 0 : stream % p.mask_ne3) * p.mask_nb3;
    const half * mask[NT];
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const int  c         = DECODE_COLUMNS * nt + t;
        const int2 place     = place_of(c);
        const int  mask_head = p.mask_ne2 == 1 ? 0 : place.y % p.mask_ne2;
        mask[nt] = (const half *) (mask_data + (int64_t) place.x * p.mask_nb1 + (int64_t) mask_head * p.mask_nb2);
        if (group == 0 && g == 0) {
            float slope = LOG2E;
            if (p.max_bias > 0.0f) {
                const bool low = place.y < (int) p.n_head_log2;
                slope *= exp2_approx(low ? p.slope_step * (place.y + 1)
                                         : p.slope_step / 2 * (2 * (place.y - (int) p.n_head_log2) + 1));
            }
            columns[c].mask  = mask[nt];
            columns[c].slope = slope;
            columns[c].row   = (stream * p.n_head + place.y) * p.n_q + place.x;
        }
    }
    uint32_t seen_first[NT][tile::R / 2];
    tile::glance(p, mask, first_tile * KEYS, g, seen_first);
    if (bulk && warp < n_groups) {
        fetch_values(split + warp * p.n_split, warp, 0);
    }

    // 2. The queries.
#    pragma unroll 1
    for (int nt = group; nt < NT; nt += n_groups) {
        const float unit = tile::store_queries(p, fetched, operands + nt * tile::K_STEPS * 64, lane);
        if (lane % 8 == 0) {
            columns[column_of(nt)].unit = unit * p.scale * p.k.step * (p.softcap == 0.0f ? LOG2E : 1.0f);
        }
        if (nt + n_groups < NT) {
            tile::fetch_queries(query_of(column_of(nt + n_groups)), fetched, lane);
        }
    }
    look(seen_first, first_tile);
    __syncthreads();
    if (bulk) {  // all the rest, but not before K of the first tile is there: it would be late in some blocks
        if (first_tile < n_tiles) {
            bulk_barrier_wait(&k_barriers.arrived[0][group], 0);
        }
#    pragma unroll 1
        for (int i = warp < n_groups ? warp + n_warps : warp; i < p.n_slots; i += n_warps) {
            fetch_keys(split + i * p.n_split, i, 0);
            fetch_values(split + i * p.n_split, i, 0);
        }
    }

    const uint2 *                 q_shared = (const uint2 *) operands;
    typename tile::query_operands q;
    if constexpr (tile::Q_IN_REGISTERS) {
#    pragma unroll
        for (int i = 0; i < NT * tile::K_STEPS; ++i) {
            q[i] = q_shared[i * 32 + lane];
        }
    }

    // 3. The tiles.
    float o[NT][tile::V_TILES] = {};
    float top[NT], sum[NT];
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        top[nt] = -INFINITY;
        sum[nt] = 0.0f;
    }
    int slot = group, use = 0;
    int i = first_tile;
    for (; i < n_tiles; i += step) {
        const int  first  = i * KEYS;
        const bool any    = any_next;
        const bool biased = biased_next;

        const uint8_t * k_rows = slots + slot * slot_bytes + head_of_block * tile::K_HEAD;
        const uint8_t * v_rows = slots + slot * slot_bytes + head_of_block * tile::V_HEAD + k_bytes;
        if (bulk) {
            bulk_barrier_wait(&k_barriers.arrived[use & 1][slot], use >> 1 & 1);
        } else {
            const int ahead = p.n_slots / n_groups - 1;
            if (ahead == 1) {
                copy_async_wait<0>();
            } else if (ahead == 2) {
                copy_async_wait<1>();
            } else {
                copy_async_wait<2>();
            }
            group_barrier(group, n_heads);  // all have this tile, and nobody needs the one before it
            fetch_in_pieces(i + ahead * step, slot < n_groups ? slot + ahead * n_groups : slot - n_groups);
            k_rows += (uintptr_t) (k_data + (int64_t) first * p.k.nb1) & 15;  // pieces are aligned, rows need not be
            v_rows += (uintptr_t) (v_data + (int64_t) first * p.v.nb1) & 15;
        }

        uint32_t     seen_next[NT][tile::R / 2];
        const half * mask[NT];
#    pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            mask[nt] = columns[DECODE_COLUMNS * nt + t].mask;
        }
        tile::glance(p, mask, first + step * KEYS, g, seen_next);
        const int  again      = i + p.n_slots * p.n_split;  // the tile that has this slot next
        const bool fill_again = bulk && again < n_tiles;
        const auto pass_on_k  = [&] {
            if (tile::K_EARLY && fill_again && release(k_barriers, slot, use)) {
                fetch_keys(again, slot, use + 1);
            }
        };
        const auto wait_for_v = [&] {
            if (bulk && come_apart(use)) {
                bulk_barrier_wait(&v_barriers.arrived[use & 1][slot], use >> 1 & 1);
            }
        };
        if (!any) {
            pass_on_k();
            wait_for_v();  // or it might come when the slot is filled again
            look(seen_next, i + step);
        } else {
            float s[NT][tile::R];
            tile::scores(p, k_rows, q, q_shared, lane, s);
            pass_on_k();
            float unit[NT], slope[NT];
#    pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                unit[nt]  = columns[DECODE_COLUMNS * nt + t].unit;
                slope[nt] = columns[DECODE_COLUMNS * nt + t].slope;
            }
            tile::scale_scores(p, unit, s);
            if (biased) {
                uint32_t seen[NT][tile::R / 2];
                tile::load_mask(p, mask, first, g, seen);
                tile::add_mask(seen, slope, s);
            }
            look(seen_next, i + step);

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
            wait_for_v();
            tile::add_values(p, v_rows, s, weight, biased, lane, o);
        }
        if (fill_again && release(v_barriers, slot, use)) {
            if (!tile::K_EARLY) {
                fetch_keys(again, slot, use + 1);
            }
            fetch_values(again, slot, use + 1);
        }
        slot += n_groups;
        if (slot >= p.n_slots) {
            slot -= p.n_slots;
            use++;
        }
    }
    copy_async_wait<0>();
    ggml_cuda_pdl_lc();  // flash_attn_combine may be set up
    if (!bulk && i - group * p.n_split < n_tiles) {
        group_barrier(group, n_heads);  // racecheck wants all groups to have met the same number of times
    }

    // 4. The groups are merged: the second half of them is added to the first until one is left.
#    pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        sum[nt] += __shfl_xor_sync(0xffffffff, sum[nt], 4);
        sum[nt] += __shfl_xor_sync(0xffffffff, sum[nt], 8);
        sum[nt] += __shfl_xor_sync(0xffffffff, sum[nt], 16);
    }
#    pragma unroll 1
    for (int n = n_groups; n > 1;) {
        const int half  = (n + 1) / 2;
        const int place = group % half * n_heads + head_of_block;
        float4 *  to    = (float4 *) slots + place * (memory::MERGE / 16) + lane;
        float2 *  meta  = (float2 *) (slots + n_heads * (n_groups / 2) * memory::MERGE) + place * COLUMNS + t;

        __syncthreads();  // nobody needs what has been there
        if (group >= half && group < n) {
#    pragma unroll
            for (int i = 0; i < NT * tile::V_TILES; i += 4) {
                const float * x = &o[i / tile::V_TILES][i % tile::V_TILES];
                to[8 * i]       = make_float4(x[0], x[1], x[2], x[3]);
            }
#    pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                if (g == 0) {
                    meta[DECODE_COLUMNS * nt] = make_float2(top[nt], sum[nt]);  // greatest score, sum
                }
            }
        }
        __syncthreads();
        if (group < n - half) {
#    pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                const float2 mine = make_float2(top[nt], sum[nt]), other = meta[DECODE_COLUMNS * nt];
                const float  most   = fmaxf(mine.x, other.x);
                const float  weight = part_weight(mine, most), other_weight = part_weight(other, most);
                top[nt] = most;
                sum[nt] = mine.y * weight + other.y * other_weight;
#    pragma unroll
                for (int i = 0; i < tile::V_TILES; i += 4) {
                    const float4 x = to[8 * (nt * tile::V_TILES + i)];
                    float *      y = &o[nt][i];
                    y[0]           = y[0] * weight + x.x * other_weight;
                    y[1]           = y[1] * weight + x.y * other_weight;
                    y[2]           = y[2] * weight + x.z * other_weight;
                    y[3]           = y[3] * weight + x.w * other_weight;
                }
            }
        }
        n = half;
    }
    if (group == 0) {
#    pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const int c = DECODE_COLUMNS * nt + t;
            if (c < n_columns) {
                const int64_t at = (int64_t) columns[c].row * p.n_split + split;
                float4 *      to = (float4 *) (p.partial + at * D) + g;
#    pragma unroll
                for (int i = 0; i < tile::V_TILES; i += 4) {
                    to[2 * i] = make_float4(o[nt][i], o[nt][i + 1], o[nt][i + 2], o[nt][i + 3]);
                }
                if (g == 0) {
                    p.meta[at] = make_float2(top[nt], sum[nt]);
                }
            }
        }
    }
#else
    (void) p;
    __trap();  // turbokv_cuda_flash_attn_ext_supported has not let anybody come here
#endif
}
