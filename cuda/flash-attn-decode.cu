// Host side of the attention for few queries, and the kernel that merges its parts.

#include "flash-attn-decode.cuh"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "common.cuh"
#include "flash-attn-decode-instances.cuh"
#include "flash-attn.cuh"
#include "turbokv-tables.h"
#include "turbokv-tile.h"

#define COMBINE_THREADS     256
#define DECODE_MAX_SPLITS   COMBINE_THREADS
#define DECODE_STATIC_BYTES (2 * (int) sizeof(slot_barriers))  // of shared memory

// Merges the parts of rows, a query token of a head each: [n_stream][n_head][n_q] as flash_attn_decode has written
// them, in `order`; `dst` as the operation wants it, [n_stream][n_q][n_head][head_size]. A block has 32, 64, 128 or 256
// places of a row, `width`.
__launch_bounds__(COMBINE_THREADS) static __global__
    void flash_attn_combine(const float * partial, const float2 * meta, const float * sinks, float * dst,
                            const int head_size, const int width, const int n_q, const int n_head, const int n_split,
                            const value_order order, const bool rotated, const uint4 srht_signs) {
    constexpr int WARPS  = COMBINE_THREADS / 32;
    constexpr int AHEAD  = 9;  // loads under way
    const int     row    = blockIdx.x;
    const int     thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int     quads    = width / 4;             // a thread has four places
    const int     place    = 4 * (thread % quads);  // from this one on
    const int     group    = thread / quads;        // and takes every n_groups-th split
    const int     n_groups = COMBINE_THREADS / quads;
    const int     team     = max(quads, 32);  // threads that have different places, or exchange them
    const int     at       = row * n_split;

    __shared__ float tops[WARPS], sums[WARPS], weights[DECODE_MAX_SPLITS];
    __shared__ __align__(16) float totals[4 * COMBINE_THREADS];
    partial += (int64_t) at * head_size + blockIdx.y * width + place;
    ggml_cuda_pdl_lc();  // whatever comes next may be set up, and waits there
    ggml_cuda_pdl_sync();

    // 1. What each split counts for, and the sum of all. The first values are on their way.
    const float2 mine = thread < n_split ? meta[at + thread] : make_float2(-INFINITY, 0.0f);
    float4       part[AHEAD];
    const auto   fetch = [&](int first) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int split = first + i * n_groups;
            if (split < n_split) {
                part[i] = *(const float4 *) (partial + split * head_size);
            }
        }
    };
    fetch(group);
    const int   head = row / n_q % n_head;
    const float sink = sinks ? sinks[head] * LOG2E : -INFINITY;

    tops[warp] = warp_reduce_max(mine.x);
    __syncthreads();
    float top = sink;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        top = fmaxf(top, tops[i]);
    }
    const float weight = part_weight(mine, top);
    weights[thread]    = weight;
    sums[warp]         = warp_reduce_sum(mine.y * weight);
    __syncthreads();

    // 2. The values.
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = group; first < n_split; first += AHEAD * n_groups) {
        if (first != group) {
            fetch(first);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int split = first + i * n_groups;
            if (split < n_split) {
                const float w = weights[split];
                total.x += part[i].x * w;
                total.y += part[i].y * w;
                total.z += part[i].z * w;
                total.w += part[i].w * w;
            }
        }
    }
    for (int distance = quads; distance < 32; distance *= 2) {
        total.x += __shfl_xor_sync(0xffffffff, total.x, distance);
        total.y += __shfl_xor_sync(0xffffffff, total.y, distance);
        total.z += __shfl_xor_sync(0xffffffff, total.z, distance);
        total.w += __shfl_xor_sync(0xffffffff, total.w, distance);
    }
    if (thread % team < quads) {
        *(float4 *) (totals + thread / team * width + place) = total;
    }
    __syncthreads();
    const int q = row % n_q, stream = row / n_q / n_head;
    float *   to = dst + (((int64_t) stream * n_q + q) * n_head + head) * head_size;
    if (thread < width) {
        float sum = sinks ? exp2_approx(sink - top) : 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            sum += sums[i];
        }
        float x = 0.0f;
        for (int i = 0; i < COMBINE_THREADS / team; ++i) {
            x += totals[i * width + thread];
        }
        x = sum == 0.0f ? 0.0f : x / sum;  // a query that sees nothing: zeros, as on the CPU
        if (!rotated) {
            to[order.value_at(blockIdx.y * width + thread)] = x;
        }
        totals[thread] = x;
    }
    if (rotated) {  // in blocks of 128, of which a lane takes four: the same whatever the order of the bits
        __syncthreads();
        if (thread < quads) {
            const float4   y        = ((const float4 *) totals)[thread];
            float          x[4]     = { y.x, y.y, y.z, y.w };
            const uint32_t signs[4] = { srht_signs.x, srht_signs.y, srht_signs.z, srht_signs.w };
            hadamard_128(x, lane);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int value = order.value_at(4 * thread + i);
                to[value]       = x[i] * srht_sign(signs, value % 128);
            }
        }
    }
}

// ---- which kernel, and what it needs

struct operand_format {
    kv_format           format;
    const int8_format * table;  // of our types
};

static const int8_format * our_format(ggml_type type) {
    switch ((int) type) {
#include "turbokv-int8-formats.inc"
        default:
            return nullptr;
    }
}

static bool find_format(ggml_type type, operand_format & f) {
    f.table = our_format(type);
    if (f.table) {
        switch (f.table->packing) {
            case PACKING_PLANE2:
                f.format = KV_PLANE2;
                return true;
            case PACKING_PLANE21:
                f.format = KV_PLANE21;
                return true;
            case PACKING_PLANE4:
                f.format = KV_PLANE4;
                return true;
            case PACKING_STREAM3:
                f.format = KV_STREAM3;
                return true;
            case PACKING_INT8:
                break;
        }
        return false;
    }
    switch (type) {
        case GGML_TYPE_Q8_0:
            f.format = KV_Q8_0;
            return true;
        case GGML_TYPE_Q4_0:
            f.format = KV_Q4_0;
            return true;
        case GGML_TYPE_F16:
            f.format = KV_F16;
            return true;
        default:
            return false;
    }
}

static decode_launch find_kernel(kv_format k, kv_format v, int head_size, int column_tiles) {
    switch (v) {
        case KV_PLANE2:
            return decode_kernel_v_plane2(k, head_size, column_tiles);
        case KV_PLANE21:
            return decode_kernel_v_plane21(k, head_size, column_tiles);
        case KV_STREAM3:
            return decode_kernel_v_stream3(k, head_size, column_tiles);
        case KV_PLANE4:
            return decode_kernel_v_plane4(k, head_size, column_tiles);
        case KV_Q8_0:
            return decode_kernel_v_q8_0(k, head_size, column_tiles);
        case KV_Q4_0:
            return decode_kernel_v_q4_0(k, head_size, column_tiles);
        case KV_F16:
            return decode_kernel_v_f16(k, head_size, column_tiles);
    }
    return {};
}

// What a block stages of the rows of x: the part of n_heads heads. Rows begin at even addresses.
struct row_plan {
    int         slice, pieces, row;
    decode_copy copy;

    row_plan() = default;

    // Banks: the lanes that read together are in 8 neighbouring rows of K, or in every other of 8 of V. With an odd
    // number of 16-byte pieces from row to row, none wants another's bank.
    row_plan(const ggml_tensor * x, int n_heads, int keys) {
        const int64_t nb1           = x->nb[1];
        const int64_t to_next_heads = n_heads == x->ne[2] ? 0 : n_heads * x->nb[2];
        const bool    here          = (to_next_heads | x->nb[3] | x->view_offs | (uintptr_t) x->data) % 16 == 0;
        slice                       = n_heads == 1 ? ggml_row_size(x->type, x->ne[0]) : n_heads * x->nb[2];
        // The copy engine leaves what is behind the last key as it is, and f16 values are multiplied whatever they are.
        const bool known            = x->type != GGML_TYPE_F16 || x->ne[1] % keys == 0;
        if (here && slice == nb1 && x->ne[1] * nb1 % 16 == 0 && nb1 % 32 != 0 && known) {
            copy   = COPY_TILE;
            pieces = (slice + 15) / 16;
            row    = slice;
        } else if (here && (slice | nb1) % 16 == 0 && known) {
            copy   = COPY_ROWS;
            pieces = slice / 16;
            row    = 16 * (pieces | 1);
        } else {
            in_pieces(x);
        }
    }

    void in_pieces(const ggml_tensor * x) {
        copy   = COPY_PIECES;
        pieces = (14 + slice + 15) / 16;
        row    = 16 * (pieces | 1) + x->nb[1] % 16;
    }
};

struct decode_plan {
    operand_format k, v;
    row_plan       k_rows, v_rows;
    decode_launch  launch;
    int            n_columns, column_tiles, n_column_tiles, n_heads, n_groups, n_slots, n_split, n_rows;
    size_t         shared_bytes;
    size_t         partial, meta, end;  // in bytes from dst->data
};

// As many warps as possible, of as many KV heads as possible, with as many slots as fit into shared memory. A group has
// two at least; but two groups can share three, where they need not wait for each other (see flash_attn_decode).
static bool fit_block(const ggml_tensor * k, const ggml_tensor * v, int keys, int max_warps, size_t memory,
                      bool can_bulk, decode_plan & plan) {
    const int64_t head_bytes[] = { (int64_t) ggml_row_size(k->type, k->ne[0]),
                                   (int64_t) ggml_row_size(v->type, v->ne[0]) };
    for (int warps = max_warps; warps >= 1; warps /= 2) {
        for (int heads = std::min<int64_t>(warps, k->ne[2]); heads >= 1; --heads) {
            if (k->ne[2] % heads != 0 ||
                (heads > 1 && ((int64_t) k->nb[2] != head_bytes[0] || (int64_t) v->nb[2] != head_bytes[1]))) {
                continue;
            }
            row_plan   k_rows(k, heads, keys), v_rows(v, heads, keys);
            const bool bulk = can_bulk && k_rows.copy != COPY_PIECES && v_rows.copy != COPY_PIECES;
            if (!bulk) {
                k_rows.in_pieces(k);
                v_rows.in_pieces(v);
            }
            const int groups = warps / heads;
            for (int slots = std::min(4 * groups, DECODE_MAX_SLOTS); slots > groups; --slots) {
                if (slots % groups != 0 && !(bulk && groups == 2)) {
                    continue;
                }
                const size_t bytes = plan.launch.shared_bytes(heads, groups, slots, keys, k_rows.row, v_rows.row);
                if (bytes <= memory) {
                    plan.n_heads      = heads;
                    plan.n_groups     = groups;
                    plan.n_slots      = slots;
                    plan.k_rows       = k_rows;
                    plan.v_rows       = v_rows;
                    plan.shared_bytes = bytes;
                    return true;
                }
            }
        }
    }
    return false;
}

static bool make_plan(int device, const ggml_tensor * dst, decode_plan & plan) {
    const ggml_tensor * q   = dst->src[0];
    const ggml_tensor * k   = dst->src[1];
    const ggml_tensor * v   = dst->src[2];
    const auto &        gpu = ggml_cuda_info().devices[device];

    const int64_t head_size = k->ne[0];
    if (!GGML_CUDA_CC_IS_NVIDIA(gpu.cc) || !turing_mma_available(gpu.cc) || v->ne[0] != head_size ||
        !find_format(k->type, plan.k) || !find_format(v->type, plan.v)) {
        return false;
    }
    const int block = head_size == 64 ? 64 : 128;
    if ((plan.k.table && plan.k.table->block != block) || (plan.v.table && plan.v.table->block != block)) {
        return false;
    }
    for (const ggml_tensor * x : { k, v }) {  // rows of a head are whole, and begin at even addresses
        if (x->nb[0] != ggml_type_size(x->type) || x->nb[1] % 2 != 0 || x->nb[2] % 2 != 0 || x->nb[3] % 2 != 0 ||
            x->ne[1] > INT_MAX / 2) {
            return false;
        }
    }
    if ((q->nb[1] | q->nb[2] | q->nb[3] | q->view_offs) % 16 != 0) {  // queries are loaded 16 bytes at a time
        return false;
    }
    for (const ggml_tensor * x : { q, k, v, (const ggml_tensor *) dst->src[3] }) {
        if (x && (x->nb[1] > INT_MAX || x->nb[2] > INT_MAX)) {
            return false;
        }
    }

    const int64_t gqa = q->ne[2] / k->ne[2];
    plan.n_columns    = gqa * q->ne[1];
    const int most    = 4;  // column tiles that flash-attn-decode-v.cuh knows
    for (plan.column_tiles = 1; plan.column_tiles < most && DECODE_COLUMNS * plan.column_tiles < plan.n_columns;) {
        plan.column_tiles *= 2;
    }
    plan.n_column_tiles =
        (plan.n_columns + DECODE_COLUMNS * plan.column_tiles - 1) / (DECODE_COLUMNS * plan.column_tiles);
    plan.launch = find_kernel(plan.k.format, plan.v.format, head_size, plan.column_tiles);
    if (!plan.launch.kernel) {
        return false;
    }
    const int arch = ggml_cuda_highest_compiled_arch(gpu.cc);
    const int keys = decode_keys(head_size, plan.column_tiles,
                                 ggml_row_size(k->type, head_size) + ggml_row_size(v->type, head_size), arch);
    if (!fit_block(k, v, keys, decode_max_warps(head_size, plan.column_tiles), gpu.smpbo - DECODE_STATIC_BYTES,
                   decode_copies_in_bulk(arch), plan)) {
        return false;
    }

    // The keys are split so that all blocks run at once; if there are more than fit, the last wave is well filled.
    const int64_t n_parts = k->ne[2] / plan.n_heads * q->ne[3] * plan.n_column_tiles;
    const int64_t n_tiles = (k->ne[1] + keys - 1) / keys;
    const int64_t most_splits =
        std::max<int64_t>(1, std::min<int64_t>((n_tiles + plan.n_groups - 1) / plan.n_groups, DECODE_MAX_SPLITS));
    plan.n_split = std::min(std::max<int64_t>(1, gpu.nsm / n_parts), most_splits);
    if (n_parts > gpu.nsm / 8) {
        double best = 0.0;
        for (int64_t n = 1; n <= std::min<int64_t>(most_splits, 4 * gpu.nsm / n_parts + 1); ++n) {
            const int64_t waves      = (n * n_parts + gpu.nsm - 1) / gpu.nsm;
            const double  efficiency = (double) (n * n_parts) / (waves * gpu.nsm);
            if (efficiency > best + 0.02) {
                best         = efficiency;
                plan.n_split = n;
            }
        }
    }

    // Scratch for as many splits as there can be with any number of keys, any alignment and any part of the heads: the
    // size is asked for once and kept, by an RPC client for all contexts, by a split model for all its devices.
    const int64_t fewest_parts = (k->ne[2] + DECODE_MAX_WARPS - 1) / DECODE_MAX_WARPS * q->ne[3] * plan.n_column_tiles;
    const int64_t max_split    = std::min<int64_t>(4 * gpu.nsm / fewest_parts + 1, DECODE_MAX_SPLITS);
    GGML_ASSERT(plan.n_split <= max_split);

    plan.n_rows  = q->ne[1] * q->ne[2] * q->ne[3];
    plan.partial = GGML_PAD(ggml_nbytes(dst), 128);
    plan.meta    = plan.partial + (size_t) plan.n_rows * max_split * head_size * sizeof(float);
    plan.end     = plan.meta + (size_t) plan.n_rows * max_split * sizeof(float2);
    return true;
}

size_t turbokv_cuda_decode_alloc_size(int device, const ggml_tensor * dst) {
    decode_plan plan;
    return make_plan(device, dst, plan) ? plan.end : 0;
}

static decode_operand make_operand(const ggml_tensor * x, const operand_format & f, const row_plan & rows) {
    decode_operand o = {};
    o.data           = (const char *) x->data;
    o.nb1            = x->nb[1];
    o.nb2            = x->nb[2];
    o.nb3            = x->nb[3];
    o.row            = rows.row;
    o.slice          = rows.slice;
    o.copy           = rows.copy;
    while (o.lanes_log2 < 5 && 1 << o.lanes_log2 < rows.pieces) {
        o.lanes_log2++;
    }
    o.step = 1.0f;
    if (f.table) {
        o.interleaved = f.table->interleaved;
        o.rotated     = f.table->rotates;
        o.step        = f.table->step;
        int8_t level[16];
        for (int i = 0; i < 16; ++i) {  // see look_up
            level[i] = f.table->level[i] + (i < 8 ? 0 : 1);
            GGML_ASSERT(f.format != KV_PLANE4 || (i < 8 ? level[i] < 0 : level[i] > 0));
        }
        memcpy(o.levels.bytes, level, sizeof(level));
    }
    return o;
}

static value_order order_of(const decode_launch & launch, int64_t head_size, bool interleaved) {
    value_order order = {};
    for (int i = 0; 1 << i < head_size; ++i) {
        const int place = 1 << i;
        const int value = launch.v_place(place / 32 * 4 + place % 4, place / 4 % 8, interleaved);
        GGML_ASSERT((value & (value - 1)) == 0);
        while (value >> order.bit[i] > 1) {
            order.bit[i]++;
        }
    }
    return order;
}

bool turbokv_cuda_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    decode_plan plan;
    if (!make_plan(ctx.device, dst, plan)) {
        return false;
    }
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];

    decode_params p = {};
    p.k             = make_operand(k, plan.k, plan.k_rows);
    p.v             = make_operand(v, plan.v, plan.v_rows);
    p.q             = (const char *) q->data;
    p.q_nb1         = q->nb[1];
    p.q_nb2         = q->nb[2];
    p.q_nb3         = q->nb[3];
    p.mask_ne2      = 1;
    p.mask_ne3      = 1;
    if (mask) {
        p.mask         = (const char *) mask->data;
        p.mask_nb1     = mask->nb[1];
        p.mask_nb2     = mask->nb[2];
        p.mask_nb3     = mask->nb[3];
        p.mask_ne2     = mask->ne[2];
        p.mask_ne3     = mask->ne[3];
        p.mask_aligned = (mask->nb[1] | mask->nb[2] | mask->nb[3] | (uintptr_t) mask->data) % 8 == 0;
    }
    p.partial           = (float *) ((char *) dst->data + plan.partial);
    p.meta              = (float2 *) ((char *) dst->data + plan.meta);
    p.n_kv              = k->ne[1];
    p.n_q               = q->ne[1];
    p.n_head            = q->ne[2];
    p.gqa               = q->ne[2] / k->ne[2];
    p.gqa_inverse       = (uint32_t) (((UINT64_C(1) << 32) + p.gqa - 1) / p.gqa);
    p.n_stream_q_per_kv = q->ne[3] / k->ne[3];
    p.n_slots           = plan.n_slots;
    p.n_split           = plan.n_split;
    p.n_column_tiles    = plan.n_column_tiles;
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    if (p.softcap != 0.0f) {
        p.scale /= p.softcap;
    }
    p.n_head_log2 = 1u << (uint32_t) floorf(log2f((float) p.n_head));
    p.slope_step  = -p.max_bias / p.n_head_log2;
    for (int i = 0; i < TURBOKV_SRHT_SIZE; ++i) {
        p.srht_signs[i / 32] |= (turbokv_srht_signs[i] < 0 ? 1u : 0u) << (i % 32);
    }

    const cudaStream_t stream = ctx.stream();
    const dim3         blocks(k->ne[2] / plan.n_heads, plan.n_split, plan.n_column_tiles * q->ne[3]);
    const size_t       max_shared = ggml_cuda_info().devices[ctx.device].smpbo - DECODE_STATIC_BYTES;
    CUDA_CHECK(cudaFuncSetAttribute((const void *) plan.launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int) max_shared));  // of all plans
    ggml_cuda_kernel_launch(plan.launch.kernel,
                            { blocks, dim3(32, plan.n_heads, plan.n_groups), plan.shared_bytes, stream }, p);

    const uint4   signs      = { p.srht_signs[0], p.srht_signs[1], p.srht_signs[2], p.srht_signs[3] };
    const float * sinks_data = sinks ? (const float *) sinks->data : nullptr;
    const int     nsm        = ggml_cuda_info().devices[ctx.device].nsm;
    int           width      = k->ne[0];  // of a block of threads; what is rotated stays together
    while (!p.v.rotated && width > 32 && plan.n_rows * k->ne[0] / width <= nsm / 2) {
        width /= 2;
    }
    // The few blocks that there are go to an SM each: they wait for memory, and two on one SM for each other.
    const dim3   combine_blocks(plan.n_rows, k->ne[0] / width);
    const size_t alone = combine_blocks.x * combine_blocks.y <= (unsigned) nsm ? max_shared / 2 : 0;
    CUDA_CHECK(cudaFuncSetAttribute((const void *) flash_attn_combine, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int) (max_shared / 2)));
    ggml_cuda_kernel_launch(flash_attn_combine, { combine_blocks, dim3(COMBINE_THREADS), alone, stream }, p.partial,
                            p.meta, sinks_data, (float *) dst->data, (int) k->ne[0], width, p.n_q, p.n_head, p.n_split,
                            order_of(plan.launch, k->ne[0], p.v.interleaved), p.v.rotated, signs);
    return true;
}
