// Flash attention over a quantized KV cache.
//
// Each K and V row is decoded once for all query heads of its group, into tiles of TILE keys (turbokv-tile.h). Scores
// are int8 dot products: the query gets one scale per block of K. Probabilities times the scales of V become 14-bit
// integers, and V is summed in integers, too; only the softmax and the sums over tiles are in float. Types that do not
// fit into int8 tiles take the same way with float tiles.
//
// Batch invariance: keys are cut into chunks at fixed places, a chunk is summed tile by tile, and chunks are merged in
// order. Threads share either blocks of rows, each of which one thread takes through all chunks, or, where there are
// few rows, blocks and chunks. Both do the same additions in the same order.
//
// Truth: float64 attention over dequantized rows; tests/c/attention-truth.h derives the bounds of the error.

#include "turbokv-attention.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "ggml-cpu-impl.h"
#include "turbokv-simd.h"
#include "turbokv-srht.h"
#include "turbokv-tile.h"

enum {
    ROWS        = 64,        // query rows that share a decoded tile
    CHUNK       = 8 * TILE,  // keys
    ROW_GROUP   = 4,         // query rows that are multiplied with K at a time
    PROB_BITS   = 14,        // of a probability, in two factors of 7
    MAX_BLOCK   = 128,       // values of an int8 format
    HEADER      = 16,        // floats before the values of a result: maximum, sum, padding to a cache line
    UNITS       = 4,         // per thread: with fewer blocks of rows than that, chunks are shared out, too,
    SHARED_ROWS = 512,       // but not for more rows than this: results of all chunks take memory
};

// Scores, masks and maxima are in units of log2, because 2^x is cheaper than exp(x).
static const float LOG2E = 1.44269504f;

struct attention {
    const struct ggml_tensor * q;      // [dk, n_q, n_head, n_seq] f32
    const struct ggml_tensor * k;      // [dk, n_kv, n_head_kv, n_seq_kv]
    const struct ggml_tensor * v;      // [dv, n_kv, n_head_kv, n_seq_kv]
    const struct ggml_tensor * mask;   // [n_kv, n_q, 1 or n_head, 1 or n_seq] f16, or NULL
    const float *              sinks;  // [n_head], or NULL
    const struct ggml_tensor * dst;    // [dv, n_head, n_q, n_seq] f32

    const struct int8_format * kf;  // NULL: float tiles
    const struct int8_format * vf;

    int   dk, dv, k_blocks, v_blocks;
    int   n_q, n_kv, n_head, n_head_kv, n_seq;
    int   group;   // query heads per KV head
    int   n_rows;  // query rows per KV head and sequence; row = position * group + head of the group
    int   row_blocks, chunks;
    float scale;    // of a dot product with q: to a score, or to the argument of tanh
    float softcap;  // 0: none; otherwise score = softcap * tanh
    float max_bias;
};

// Query rows, ready to be multiplied; all of the op's, or from the first of a block on.
struct queries {
    uint32_t * q_int8;    // [rows][dk / 4], in tile order: int8 K tiles
    int32_t *  q_offset;  // [rows][k_blocks]: takes TURBOKV_K_OFFSET out of the dot products
    float *    q_scale;   // [rows][k_blocks]
    float *    q_float;   // [rows][dk]: float K tiles
    float *    slope;     // [rows]: of ALiBi
};

// What a thread needs for one block of rows.
struct scratch {
    float *    mask;  // [ROWS][TILE], one row per slot: see read_mask
    void *     k_tile;
    float *    k_scale;
    void *     v_tile;
    float *    v_scale;
    uint64_t * v_bad;
    float *    row;    // [max(dk, dv)]
    float *    chunk;  // [ROWS][HEADER + dv]: of the present chunk
    float *    total;  // [ROWS][HEADER + dv]: of all chunks before
};

static bool set_up(struct attention * a, const struct ggml_tensor * dst) {
    const struct ggml_tensor * q = dst->src[0];
    const struct ggml_tensor * k = dst->src[1];
    const struct ggml_tensor * v = dst->src[2];

    bool ours = k->type >= GGML_TYPE_TURBOKV_FIRST || v->type >= GGML_TYPE_TURBOKV_FIRST;
#if defined(TURBOKV_ATTENTION_UPSTREAM_TYPES)
    // Not f16 and its like: upstream's kernels for them are faster than our float tiles.
    ours |= turbokv_int8_format(k->type) && turbokv_int8_format(v->type);
#endif
    if (!ours || q->type != GGML_TYPE_F32 || k->ne[0] % 32 != 0 || v->ne[0] % 32 != 0 || k->ne[2] != v->ne[2] ||
        k->ne[3] != v->ne[3]) {
        return false;
    }
    *a = (struct attention) {
        .q     = q,
        .k     = k,
        .v     = v,
        .mask  = dst->src[3],
        .sinks = dst->src[4] ? dst->src[4]->data : NULL,
        .dst   = dst,
#if !defined(TURBOKV_ATTENTION_FLOAT)
        .kf = turbokv_int8_format(k->type),
        .vf = turbokv_int8_format(v->type),
#endif
        .dk        = (int) k->ne[0],
        .dv        = (int) v->ne[0],
        .n_q       = (int) q->ne[1],
        .n_kv      = (int) k->ne[1],
        .n_head    = (int) q->ne[2],
        .n_head_kv = (int) k->ne[2],
        .n_seq     = (int) q->ne[3],
        .group     = (int) (q->ne[2] / k->ne[2]),
    };
    if (a->vf && a->vf->signed_scale) {
        a->vf = NULL;  // probabilities times scales are unsigned integers
    }
    a->k_blocks   = a->kf ? a->dk / a->kf->block : 1;
    a->v_blocks   = a->vf ? a->dv / a->vf->block : 1;
    a->n_rows     = a->group * a->n_q;
    a->row_blocks = (a->n_rows + ROWS - 1) / ROWS;
    a->chunks     = (a->n_kv + CHUNK - 1) / CHUNK;
    memcpy(&a->scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a->max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a->softcap, (const float *) dst->op_params + 2, sizeof(float));
    a->scale = a->softcap != 0.0f ? a->scale / a->softcap : a->scale * LOG2E;
    a->softcap *= LOG2E;
    return true;
}

// ---- memory

// Addresses are numbers here, so that a layout from 0 on tells the size.
static void * take(uintptr_t * at, size_t bytes) {
    const uintptr_t taken = *at;
    *at += (bytes + 63) / 64 * 64;
    return (void *) taken;
}

static int64_t total_rows(const struct attention * a) {
    return (int64_t) a->n_seq * a->n_head_kv * a->n_rows;
}

// Row of a KV head and sequence among all.
static size_t row_index(const struct attention * a, int seq, int head_kv, int row) {
    return ((size_t) seq * a->n_head_kv + head_kv) * a->n_rows + row;
}

// Lays out the queries from `base` on and returns their size.
static size_t lay_out_queries(const struct attention * a, uintptr_t base, struct queries * q) {
    const size_t rows = (size_t) total_rows(a);
    uintptr_t    at   = base;
    q->q_int8         = take(&at, a->kf ? rows * a->dk : 0);
    q->q_offset       = take(&at, a->kf ? sizeof(int32_t) * rows * a->k_blocks : 0);
    q->q_scale        = take(&at, a->kf ? sizeof(float) * rows * a->k_blocks : 0);
    q->q_float        = take(&at, a->kf ? 0 : sizeof(float) * rows * a->dk);
    q->slope          = take(&at, sizeof(float) * rows);
    return at - base;
}

// The same for a thread's scratch.
static size_t lay_out_scratch(const struct attention * a, uintptr_t base, struct scratch * s) {
    uintptr_t at = base;

    s->mask    = take(&at, sizeof(float) * ROWS * TILE);
    s->k_tile  = take(&at, (a->kf ? 1 : sizeof(float)) * TILE * a->dk);
    s->k_scale = take(&at, sizeof(float) * TILE * a->k_blocks);
    s->v_tile  = take(&at, (a->vf ? 1 : sizeof(float)) * TILE * a->dv);
    s->v_scale = take(&at, sizeof(float) * TILE * a->v_blocks);
    s->v_bad   = take(&at, sizeof(uint64_t) * a->v_blocks);
    s->row     = take(&at, sizeof(float) * (a->dk > a->dv ? a->dk : a->dv));
    s->chunk   = take(&at, sizeof(float) * ROWS * (HEADER + a->dv));
    s->total   = take(&at, sizeof(float) * ROWS * (HEADER + a->dv));
    return at - base;
}

static struct queries queries_from(const struct attention * a, const struct queries * all, size_t row) {
    return (struct queries) {
        .q_int8   = all->q_int8 + row * (a->dk / 4),
        .q_offset = all->q_offset + row * a->k_blocks,
        .q_scale  = all->q_scale + row * a->k_blocks,
        .q_float  = all->q_float + row * a->dk,
        .slope    = all->slope + row,
    };
}

// Few rows: threads share out the chunks, too, and their results meet in memory.
static bool chunks_are_shared(const struct attention * a, int n_threads) {
    const int64_t blocks = (int64_t) a->n_seq * a->n_head_kv * a->row_blocks;
    return n_threads > 1 && a->chunks > 1 && blocks < UNITS * n_threads && total_rows(a) <= SHARED_ROWS;
}

static size_t partial_bytes(const struct attention * a, int n_threads) {
    const size_t bytes = (size_t) total_rows(a) * a->chunks * (HEADER + a->dv) * sizeof(float);
    return chunks_are_shared(a, n_threads) ? bytes : 0;
}

// ---- float functions

// 2^x for x <= 126, 0 below -126; relative error 2e-7. 2^(n + r) = 2^n P(r), |r| <= 1/2, P the minimax polynomial of
// degree 5 for the relative error with P(0) = 1.
static inline vf vf_exp2(vf x) {
    const vi n = vi_round(x);
    const vf r = vf_sub(x, vf_from_int(n));
    vf       p = vf_set1(0.0013264727f);
    p          = vf_add(vf_mul(p, r), vf_set1(0.009671513f));
    p          = vf_add(vf_mul(p, r), vf_set1(0.055507336f));
    p          = vf_add(vf_mul(p, r), vf_set1(0.24022242f));
    p          = vf_add(vf_mul(p, r), vf_set1(0.693147f));
    p          = vf_add(vf_mul(p, r), vf_set1(1.0f));
    const vf y = vf_bits(vi_add(vi_from_bits(p), vi_shl(n, 23)));
    return vf_select_lt(x, vf_set1(-126.0f), vf_set1(0.0f), y);
}

static inline float exp2_one(float x) {
    float lanes[VEC_LANES];
    vf_store(lanes, vf_exp2(vf_set1(x)));
    return lanes[0];
}

// 1 - 2 / (exp(2x) + 1); absolute error 2e-7. tanh(10) is 1 in float.
static inline vf vf_tanh(vf x) {
    x          = vf_select_lt(x, vf_set1(-10.0f), vf_set1(-10.0f), x);
    x          = vf_select_lt(vf_set1(10.0f), x, vf_set1(10.0f), x);
    const vf e = vf_exp2(vf_mul(x, vf_set1(2.0f * LOG2E)));
    return vf_sub(vf_set1(1.0f), vf_div(vf_set1(2.0f), vf_add(e, vf_set1(1.0f))));
}

// The same tree for every number of lanes: 16 sums of every sixteenth value, then halves.
static inline float tile_sum(const float * x) {
    enum { VECTORS = 16 / VEC_LANES };

    vf sums[VECTORS];
    for (int i = 0; i < VECTORS; ++i) {
        sums[i] = vf_load(x + i * VEC_LANES);
        for (int j = 16; j < TILE; j += 16) {
            sums[i] = vf_add(sums[i], vf_load(x + j + i * VEC_LANES));
        }
    }
    for (int half = VECTORS / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            sums[i] = vf_add(sums[i], sums[i + half]);
        }
    }
    return vf_reduce_add(sums[0]);
}

// ---- query

static float slope_of(const struct attention * a, int head) {
    if (a->max_bias <= 0.0f) {
        return 1.0f;
    }
    const int   n    = 1 << (int) floor(log2(a->n_head));
    const float base = powf(2.0f, -(head < n ? a->max_bias : a->max_bias / 2.0f) / n);
    return powf(base, head < n ? head + 1 : 2 * (head - n) + 1);
}

// One block of K's values: to int8, at most 127 in magnitude, in tile order. x is rotated in place if K is.
static void quantize_query(const struct attention * a, float * x, int8_t * q, float * scale, int32_t * offset) {
    const struct int8_format * f = a->kf;
    if (f->rotates) {
        turbokv_srht(x);
    }
    // The largest magnitude as bits, which order like the values; those of infinity and NaN are above all others.
    uint32_t max_bits = 0;
    for (int i = 0; i < f->block; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7fffffff;
        max_bits = bits > max_bits ? bits : max_bits;
    }
    float max;
    memcpy(&max, &max_bits, sizeof(max));

    const bool  finite  = max_bits < 0x7f800000;
    const float inverse = finite && max > 1e-30f ? 127.0f / max : 0.0f;  // below, the quotient would overflow
    int32_t     values[MAX_BLOCK];
    for (int i = 0; i < f->block; i += VEC_LANES) {
        vi_store(values + i, vi_round(vf_mul(vf_load(x + i), vf_set1(inverse))));
    }
    int sum = 0;
    for (int p = 0; p < f->block; ++p) {
        q[p] = finite ? (int8_t) values[turbokv_tile_order(f, p)] : 0;
        sum += q[p];
    }
    *scale  = finite ? max / 127.0f * a->scale : NAN;
    *offset = -TURBOKV_K_OFFSET * sum;
}

// Row `index` of all.
static void load_query(const struct attention * a, const struct queries * all, float * scratch_row, int64_t index) {
    const struct queries q        = queries_from(a, all, (size_t) index);
    const int            row      = (int) (index % a->n_rows);
    const int            head_kv  = (int) (index / a->n_rows % a->n_head_kv);
    const int            seq      = (int) (index / a->n_rows / a->n_head_kv);
    const int            position = row / a->group;
    const int            head     = head_kv * a->group + row % a->group;
    const char * data = (const char *) a->q->data + position * a->q->nb[1] + head * a->q->nb[2] + seq * a->q->nb[3];

    *q.slope = slope_of(a, head) * LOG2E;
    if (!a->kf) {
        for (int d = 0; d < a->dk; ++d) {
            q.q_float[d] = ((const float *) data)[d] * a->scale;
        }
        return;
    }
    memcpy(scratch_row, data, a->dk * sizeof(float));
    for (int b = 0; b < a->k_blocks; ++b) {
        const int first = b * a->kf->block;
        quantize_query(a, scratch_row + first, (int8_t *) q.q_int8 + first, &q.q_scale[b], &q.q_offset[b]);
    }
}

// ---- mask

enum visibility { HIDDEN, PLAIN, MASKED };  // no key; every key with mask 0; read the mask

// Rows whose masks are the same share a slot: the heads of a position, unless the mask has heads of its own.
static int slot_of(const struct attention * a, int row0, int i) {
    return a->mask && a->mask->ne[2] > 1 ? i : (row0 + i) / a->group - row0 / a->group;
}

// The mask of `n_keys` keys from key0 on for one slot. Keys behind the last are hidden.
static enum visibility read_mask(const ggml_fp16_t * in, int n_keys, float * out) {
    ggml_fp16_t half[TILE];
    int         any_bit = 0;
    if (n_keys == TILE && in) {
        for (int i = 0; i < TILE; ++i) {
            any_bit |= in[i];
        }
    }
    if (n_keys == TILE && any_bit == 0) {
        return PLAIN;
    }
    for (int i = 0; i < TILE; ++i) {
        half[i] = i >= n_keys ? 0xfc00 : in ? in[i] : 0;  // minus infinity
    }
    vf max = vf_set1(-INFINITY);
    for (int i = 0; i < TILE; i += VEC_LANES) {
        const vf m = vf_half(half + i);
        max        = vf_max(max, m);
        vf_store(out + i, m);
    }
    return vf_reduce_max(max) == -INFINITY ? HIDDEN : MASKED;
}

// ---- scores

// Scores of `n` query rows (their indices in `rows`) with a tile of int8 K.
TURBOKV_INLINE void scores_int8_rows(const struct attention * a, const struct queries * q, const struct scratch * s,
                                     const int n, const int * rows, float (*score)[TILE]) {
    enum { VECTORS = VEC_LANES == 8 ? 2 : 4, KEYS = VECTORS * VEC_LANES };  // as many as registers allow

    const int        words = a->kf->block / 4;
    const uint32_t * tile  = s->k_tile;
    for (int key = 0; key < TILE; key += KEYS) {
        for (int b = 0; b < a->k_blocks; ++b) {
            const uint32_t * x[ROW_GROUP];
            vi               sum[ROW_GROUP][VECTORS];
            TURBOKV_UNROLL
            for (int r = 0; r < n; ++r) {
                x[r] = q->q_int8 + rows[r] * (a->dk / 4) + b * words;
                TURBOKV_UNROLL
                for (int j = 0; j < VECTORS; ++j) {
                    sum[r][j] = vi_set1((uint32_t) q->q_offset[rows[r] * a->k_blocks + b]);
                }
            }
            for (int c = 0; c < words; ++c) {
                const uint32_t * k = tile + (b * words + c) * TILE + key;
                TURBOKV_UNROLL
                for (int j = 0; j < VECTORS; ++j) {
                    const vi kj = vi_load(k + j * VEC_LANES);
                    TURBOKV_UNROLL
                    for (int r = 0; r < n; ++r) {
                        sum[r][j] = vi_dot_k(sum[r][j], kj, vi_set1(x[r][c]));
                    }
                }
            }
            TURBOKV_UNROLL
            for (int r = 0; r < n; ++r) {
                const vf scale = vf_set1(q->q_scale[rows[r] * a->k_blocks + b]);
                TURBOKV_UNROLL
                for (int j = 0; j < VECTORS; ++j) {
                    float *  out = score[r] + key + j * VEC_LANES;
                    const vf d   = vf_load(s->k_scale + b * TILE + key + j * VEC_LANES);
                    const vf y   = vf_mul(vf_mul(vf_from_int(sum[r][j]), scale), d);
                    vf_store(out, b == 0 ? y : vf_add(vf_load(out), y));
                }
            }
        }
    }
}

// The same with a tile of float K.
TURBOKV_INLINE void scores_float_rows(const struct attention * a, const struct queries * q, const struct scratch * s,
                                      const int n, const int * rows, float (*score)[TILE]) {
    enum { VECTORS = VEC_LANES == 8 ? 2 : 4, KEYS = VECTORS * VEC_LANES };

    for (int key = 0; key < TILE; key += KEYS) {
        const float * x[ROW_GROUP];
        vf            sum[ROW_GROUP][VECTORS];
        TURBOKV_UNROLL
        for (int r = 0; r < n; ++r) {
            x[r] = q->q_float + rows[r] * a->dk;
            TURBOKV_UNROLL
            for (int j = 0; j < VECTORS; ++j) {
                sum[r][j] = vf_set1(0.0f);
            }
        }
        for (int d = 0; d < a->dk; ++d) {
            const float * k = (const float *) s->k_tile + d * TILE + key;
            TURBOKV_UNROLL
            for (int j = 0; j < VECTORS; ++j) {
                const vf kj = vf_load(k + j * VEC_LANES);
                TURBOKV_UNROLL
                for (int r = 0; r < n; ++r) {
                    sum[r][j] = vf_fma(vf_set1(x[r][d]), kj, sum[r][j]);
                }
            }
        }
        TURBOKV_UNROLL
        for (int r = 0; r < n; ++r) {
            TURBOKV_UNROLL
            for (int j = 0; j < VECTORS; ++j) {
                vf_store(score[r] + key + j * VEC_LANES, sum[r][j]);
            }
        }
    }
}

// A row's result does not depend on the rows beside it: only speed does.
static void scores(const struct attention * a, const struct queries * q, const struct scratch * s, int n,
                   const int * rows, float (*score)[TILE]) {
    if (n == ROW_GROUP) {
        if (a->kf) {
            scores_int8_rows(a, q, s, ROW_GROUP, rows, score);
        } else {
            scores_float_rows(a, q, s, ROW_GROUP, rows, score);
        }
        return;
    }
    for (int r = 0; r < n; ++r) {
        if (a->kf) {
            scores_int8_rows(a, q, s, 1, rows + r, score + r);
        } else {
            scores_float_rows(a, q, s, 1, rows + r, score + r);
        }
    }
}

// ---- softmax

// Turns scores into 2^(score - maximum), in place, and brings `state` (maximum, sum) up to date. Hidden keys become
// exactly 0. Returns the factor for what was summed before.
static float softmax(const struct attention * a, float * score, const float * mask, float slope, float * state) {
    vf max = vf_set1(-INFINITY);
    TURBOKV_UNROLL
    for (int i = 0; i < TILE; i += VEC_LANES) {
        vf x = vf_load(score + i);
        if (a->softcap != 0.0f) {
            x = vf_mul(vf_tanh(x), vf_set1(a->softcap));
        }
        if (mask) {
            const vf m = vf_mul(vf_load(mask + i), vf_set1(slope));
            x          = vf_select_lt(m, vf_set1(-FLT_MAX), vf_set1(-INFINITY), vf_add(x, m));
        }
        vf_store(score + i, x);
        max = vf_max(max, x);
    }
    const float before  = state[0];
    const float tile    = vf_reduce_max(max);
    const float now     = before > tile ? before : tile;
    const float rescale = before == now ? 1.0f : exp2_one(before - now);
    for (int i = 0; i < TILE; i += VEC_LANES) {
        vf_store(score + i, vf_exp2(vf_sub(vf_load(score + i), vf_set1(now))));
    }
    state[0] = now;
    state[1] = state[1] * rescale + tile_sum(score);
    return rescale;
}

// ---- values

// sum = sum * rescale + step * (the tile's sum of probability * value) for VECTORS * VEC_LANES places.
TURBOKV_INLINE void values_int8_places(const int vectors, const uint32_t * high, const uint32_t * low,
                                       const uint32_t * tile, int stride, float step, float rescale, float * sum) {
    vi h[8];
    vi l[8];
    TURBOKV_UNROLL
    for (int j = 0; j < vectors; ++j) {
        h[j] = l[j] = vi_set1(0);
    }
    for (int quad = 0; quad < TILE / 4; ++quad) {
        const vi ph = vi_set1(high[quad]);
        const vi pl = vi_set1(low[quad]);
        TURBOKV_UNROLL
        for (int j = 0; j < vectors; ++j) {
            const vi v = vi_load(tile + quad * stride + j * VEC_LANES);
            h[j]       = vi_dot_v(h[j], ph, v);
            l[j]       = vi_dot_v(l[j], pl, v);
        }
    }
    TURBOKV_UNROLL
    for (int j = 0; j < vectors; ++j) {
        const vf x   = vf_mul(vf_from_int(vi_add(vi_shl(h[j], PROB_BITS / 2), l[j])), vf_set1(step));
        float *  out = sum + j * VEC_LANES;
        vf_store(out, vf_add(vf_mul(vf_load(out), vf_set1(rescale)), x));
    }
}

TURBOKV_INLINE void values_float_places(const int vectors, const float * prob, const float * tile, int stride,
                                        float rescale, float * sum) {
    vf x[8];
    TURBOKV_UNROLL
    for (int j = 0; j < vectors; ++j) {
        x[j] = vf_set1(0.0f);
    }
    for (int key = 0; key < TILE; ++key) {
        if (prob[key] == 0.0f) {
            continue;  // a hidden value may be NaN
        }
        TURBOKV_UNROLL
        for (int j = 0; j < vectors; ++j) {
            x[j] = vf_fma(vf_set1(prob[key]), vf_load(tile + key * stride + j * VEC_LANES), x[j]);
        }
    }
    TURBOKV_UNROLL
    for (int j = 0; j < vectors; ++j) {
        float * out = sum + j * VEC_LANES;
        vf_store(out, vf_add(vf_mul(vf_load(out), vf_set1(rescale)), x[j]));
    }
}

// Probabilities times the scales of V as integers in two factors of 7 bits; returns what one unit is worth.
static float quantize_probabilities(const float * prob, const float * scale, uint64_t bad, uint8_t * high,
                                    uint8_t * low) {
    const float largest = (1 << PROB_BITS) - 1;

    vf max = vf_set1(0.0f);
    for (int i = 0; i < TILE; i += VEC_LANES) {
        max = vf_max(max, vf_mul(vf_load(prob + i), vf_load(scale + i)));
    }
    const float top     = vf_reduce_max(max);
    const bool  any     = top > 1e-30f;  // below, 1 / top would overflow; fp16 scales end at 6e-8
    const float inverse = any ? largest / top : 0.0f;
    for (int i = 0; i < TILE; i += VEC_LANES) {
        const vf w = vf_mul(vf_load(prob + i), vf_load(scale + i));
        const vi p = vi_round(vf_mul(w, vf_set1(inverse)));
        vi_store_bytes(high + i, vi_and(vi_shr(p, PROB_BITS / 2), vi_set1(127)));
        vi_store_bytes(low + i, vi_and(p, vi_set1(127)));
    }
    for (int i = 0; bad != 0; ++i, bad >>= 1) {
        if ((bad & 1) && prob[i] != 0.0f) {
            return NAN;
        }
    }
    return any ? top / largest : 0.0f;
}

// Calls places() for blocks of `n` places in the largest groups of vectors that registers allow.
#define TURBOKV_FOR_PLACES(n, places)                                                                                  \
    do {                                                                                                               \
        const int vectors = (n) / VEC_LANES;                                                                           \
        int       j       = 0;                                                                                         \
        for (; VEC_LANES != 8 && j + 8 <= vectors; j += 8) {                                                           \
            places(8);                                                                                                 \
        }                                                                                                              \
        for (; j + 4 <= vectors; j += 4) {                                                                             \
            places(4);                                                                                                 \
        }                                                                                                              \
        for (; j + 2 <= vectors; j += 2) {                                                                             \
            places(2);                                                                                                 \
        }                                                                                                              \
    } while (0)

static void values(const struct attention * a, const struct scratch * s, const float * prob, float rescale,
                   float * sum) {
    if (!a->vf) {
        const float * tile = s->v_tile;
#define PLACES(n) values_float_places(n, prob, tile + j * VEC_LANES, a->dv, rescale, sum + j * VEC_LANES)
        TURBOKV_FOR_PLACES(a->dv, PLACES);
#undef PLACES
        return;
    }
    for (int b = 0; b < a->v_blocks; ++b) {
        uint32_t    high[TILE / 4];
        uint32_t    low[TILE / 4];
        const float step =
            quantize_probabilities(prob, s->v_scale + b * TILE, s->v_bad[b], (uint8_t *) high, (uint8_t *) low);
        const uint32_t * tile = (const uint32_t *) s->v_tile + b * a->vf->block;
        float *          out  = sum + b * a->vf->block;
#define PLACES(n) values_int8_places(n, high, low, tile + j * VEC_LANES, a->dv, step, rescale, out + j * VEC_LANES)
        TURBOKV_FOR_PLACES(a->vf->block, PLACES);
#undef PLACES
    }
}

// ---- a block of rows and a chunk of keys

static struct tile_source keys_of(const struct ggml_tensor * t, const struct int8_format * f, int key, int n_keys,
                                  int head, int seq) {
    return (struct tile_source) {
        .type   = t->type,
        .format = f,
        .data   = (const char *) t->data + key * t->nb[1] + head * t->nb[2] + seq * t->nb[3],
        .stride = t->nb[1],
        .n      = (int) t->ne[0],
        .n_keys = n_keys,
    };
}

// Asks for the rows of the tile after this one: rows of one head are too far apart for the hardware's prefetchers.
static void prefetch_after(const struct tile_source * src, int n_kv_left) {
#if defined(__GNUC__)
    const char * data = src->data + TILE * src->stride;
    const size_t last = ggml_row_size(src->type, src->n) - 1;
    for (int key = 0; key < TILE && key < n_kv_left; ++key, data += src->stride) {
        for (size_t byte = 0; byte < last; byte += 64) {
            __builtin_prefetch(data + byte, 0, 2);
        }
        __builtin_prefetch(data + last, 0, 2);
    }
#else
    (void) src;
    (void) n_kv_left;
#endif
}

static void reset(const struct attention * a, float * states, int n) {
    for (int i = 0; i < n; ++i) {
        float * state = states + i * (HEADER + a->dv);
        memset(state, 0, sizeof(float) * (HEADER + a->dv));
        state[0] = -INFINITY;
    }
}

// Attention of n query rows, the first of which is row0 of its KV head, over one chunk, into s->chunk.
static void attend(const struct attention * a, const struct queries * q, struct scratch * s, int seq, int head_kv,
                   int row0, int n, int chunk) {
    const int seq_kv = (int) (seq / (a->n_seq / a->k->ne[3]));
    const int last   = (chunk + 1) * CHUNK < a->n_kv ? (chunk + 1) * CHUNK : a->n_kv;
    reset(a, s->chunk, n);

    for (int key0 = chunk * CHUNK; key0 < last; key0 += TILE) {
        const int       n_keys = last - key0 < TILE ? last - key0 : TILE;
        enum visibility seen[ROWS];  // by slot
        int             rows[ROWS];  // that see a key
        int             n_seen = 0;
        for (int i = 0, n_slots = 0; i < n; ++i) {
            const int slot = slot_of(a, row0, i);
            if (slot == n_slots) {
                const ggml_fp16_t * in = NULL;
                if (a->mask) {
                    const int position = (row0 + i) / a->group;
                    const int head     = head_kv * a->group + (row0 + i) % a->group;
                    in = (const ggml_fp16_t *) ((const char *) a->mask->data + position * a->mask->nb[1] +
                                                head % a->mask->ne[2] * a->mask->nb[2] +
                                                seq % a->mask->ne[3] * a->mask->nb[3]) +
                         key0;
                }
                seen[slot] = read_mask(in, n_keys, s->mask + slot * TILE);
                n_slots++;
            }
            if (seen[slot] != HIDDEN) {
                rows[n_seen++] = i;
            }
        }
        if (n_seen == 0) {
            continue;
        }
        const struct tile_source k = keys_of(a->k, a->kf, key0, n_keys, head_kv, seq_kv);
        const struct tile_source v = keys_of(a->v, a->vf, key0, n_keys, head_kv, seq_kv);
        prefetch_after(&k, a->n_kv - key0 - TILE);
        prefetch_after(&v, a->n_kv - key0 - TILE);
        if (a->kf) {
            turbokv_k_tile_int8(&k, s->k_tile, s->k_scale);
        } else {
            turbokv_k_tile_float(&k, s->k_tile, s->row);
        }
        if (a->vf) {
            turbokv_v_tile_int8(&v, s->v_tile, s->v_scale, s->v_bad);
        } else {
            turbokv_v_tile_float(&v, s->v_tile);
        }
        for (int first = 0; first < n_seen; first += ROW_GROUP) {
            const int n_group = n_seen - first < ROW_GROUP ? n_seen - first : ROW_GROUP;
            float     score[ROW_GROUP][TILE];
            scores(a, q, s, n_group, rows + first, score);
            for (int r = 0; r < n_group; ++r) {
                const int     i       = rows[first + r];
                const int     slot    = slot_of(a, row0, i);
                const float * mask    = seen[slot] == MASKED ? s->mask + slot * TILE : NULL;
                float *       state   = s->chunk + i * (HEADER + a->dv);
                const float   rescale = softmax(a, score[r], mask, q->slope[i], state);
                values(a, s, score[r], rescale, state + HEADER);
            }
        }
    }
}

static void merge(const struct attention * a, float * total, const float * part) {
    if (part[1] == 0.0f) {
        return;  // it saw no key
    }
    const float max      = total[0] > part[0] ? total[0] : part[0];
    const float of_total = exp2_one(total[0] - max);
    const float of_part  = exp2_one(part[0] - max);
    for (int d = 1; d < HEADER + a->dv; ++d) {
        total[d] = total[d] * of_total + part[d] * of_part;
    }
    total[0] = max;
}

// Of row `index` of all: adds the sink, divides by the sum, brings the values back into their order and domain, and
// writes them.
static void finish(const struct attention * a, float * state, float * row, size_t index) {
    const size_t head_kv  = index / a->n_rows % a->n_head_kv;
    const size_t seq      = index / a->n_rows / a->n_head_kv;
    const size_t position = index % a->n_rows / a->group;
    const size_t head     = head_kv * a->group + index % a->n_rows % a->group;
    if (a->sinks) {
        const float sink = a->sinks[head] * LOG2E;
        const float max  = state[0] > sink ? state[0] : sink;
        const float old  = exp2_one(state[0] - max);
        state[1]         = state[1] * old + exp2_one(sink - max);
        for (int d = 0; d < a->dv; ++d) {
            state[HEADER + d] *= old;
        }
    }
    const float   inverse = state[1] == 0.0f ? 0.0f : 1.0f / state[1];
    const float * sum     = state + HEADER;
    const int     block   = a->vf ? a->vf->block : a->dv;
    for (int b = 0; b < a->dv; b += block) {
        for (int p = 0; p < block; ++p) {
            row[b + (a->vf ? turbokv_tile_order(a->vf, p) : p)] = sum[b + p] * inverse;
        }
        if (a->vf && a->vf->rotates) {
            turbokv_srht_inverse(row + b);
        }
    }
    const size_t place = (seq * a->n_q + position) * a->n_head + head;
    memcpy((char *) a->dst->data + place * a->dst->nb[1], row, sizeof(float) * a->dv);
}

// ---- the op

static size_t work_size(const struct attention * a, int n_threads) {
    struct queries q;
    struct scratch s;
    return lay_out_queries(a, 0, &q) + n_threads * lay_out_scratch(a, 0, &s) + partial_bytes(a, n_threads) +
           64;  // to begin on a cache line
}

size_t turbokv_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_threads) {
    struct attention a;
    return set_up(&a, dst) ? work_size(&a, n_threads) : 0;
}

bool turbokv_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    struct attention a;
    struct queries   queries;
    struct scratch   s;
    if (params->use_ref || !set_up(&a, dst)) {
        return false;
    }
    GGML_ASSERT(work_size(&a, params->nth) <= params->wsize);

    uintptr_t at = ((uintptr_t) params->wdata + 63) / 64 * 64;
    at += lay_out_queries(&a, at, &queries);
    const size_t per_thread = lay_out_scratch(&a, at, &s);
    lay_out_scratch(&a, at + params->ith * per_thread, &s);
    float *    partials = (float *) (at + params->nth * per_thread);
    const bool shared   = chunks_are_shared(&a, params->nth);

    for (int64_t row = params->ith; row < total_rows(&a); row += params->nth) {
        load_query(&a, &queries, s.row, row);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // KV heads change fastest: their rows lie side by side in the cache.
    const size_t state    = HEADER + a.dv;  // floats of a result: maximum, sum, .., values
    const int    n_chunks = shared ? a.chunks : 1;
    const int    n_units  = a.n_seq * a.row_blocks * n_chunks * a.n_head_kv;
    for (int unit = params->ith; unit < n_units; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int            head_kv = unit % a.n_head_kv;
        const int            chunk   = unit / a.n_head_kv % n_chunks;
        const int            row0    = unit / a.n_head_kv / n_chunks % a.row_blocks * ROWS;
        const int            seq     = unit / a.n_head_kv / n_chunks / a.row_blocks;
        const int            n       = a.n_rows - row0 < ROWS ? a.n_rows - row0 : ROWS;
        const size_t         first   = row_index(&a, seq, head_kv, row0);
        const struct queries q       = queries_from(&a, &queries, first);
        if (shared) {
            attend(&a, &q, &s, seq, head_kv, row0, n, chunk);
            for (int i = 0; i < n; ++i) {
                memcpy(partials + ((first + i) * a.chunks + chunk) * state, s.chunk + i * state, sizeof(float) * state);
            }
            continue;
        }
        reset(&a, s.total, n);
        for (int c = 0; c < a.chunks; ++c) {
            attend(&a, &q, &s, seq, head_kv, row0, n, c);
            for (int i = 0; i < n; ++i) {
                merge(&a, s.total + i * state, s.chunk + i * state);
            }
        }
        for (int i = 0; i < n; ++i) {
            finish(&a, s.total + i * state, s.row, first + i);
        }
    }
    if (!shared) {
        return true;
    }

    ggml_barrier(params->threadpool);
    for (int64_t row = params->ith; row < total_rows(&a); row += params->nth) {
        reset(&a, s.total, 1);
        for (int c = 0; c < a.chunks; ++c) {
            merge(&a, s.total, partials + (row * a.chunks + c) * state);
        }
        finish(&a, s.total, s.row, (size_t) row);
    }
    return true;
}
