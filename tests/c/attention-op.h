// Shared by the parts of test-turbokv-attention: random numbers, cases, and the op called directly, with our own
// threads.

#pragma once

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-cpu-impl.h"
#include "splitmix64.h"
#include "turbokv-attention.h"
#include "turbokv-tile.h"

enum { MAX_REPORTS = 20, MAX_THREADS = 7 };

static const enum ggml_type types[] = {
#include "turbokv-cache-types.inc"
    GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_F32,  GGML_TYPE_Q8_0,   GGML_TYPE_Q4_0,
    GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL,
};
#define N_TYPES ((int) (sizeof(types) / sizeof(types[0])))

static int n_failures = 0;

static void fail(const char * format, ...) {
    if (++n_failures > MAX_REPORTS) {
        return;
    }
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAIL ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
}

static void * allocate(size_t size) {
    void * p = malloc(size > 0 ? size : 1);
    if (p == NULL) {
        fprintf(stderr, "FAIL: out of memory\n");
        exit(1);
    }
    return p;
}

static bool same(const float * a, const float * b, int n) {
    return memcmp(a, b, n * sizeof(float)) == 0;
}

static bool all_nan(const float * x, int n) {
    int n_nan = 0;
    for (int i = 0; i < n; ++i) {
        n_nan += isnan(x[i]) != 0;
    }
    return n_nan == n;
}

// The format in which the attention multiplies a type, NULL where it takes floats.
static const struct int8_format * format_of(enum ggml_type type, bool is_v) {
#if defined(TURBOKV_ATTENTION_FLOAT)
    (void) type;
    (void) is_v;
    return NULL;
#else
    const struct int8_format * f = turbokv_int8_format(type);
    return f && is_v && f->signed_scale ? NULL : f;
#endif
}

// Pairs that the attention does not leave to upstream's.
static bool is_accepted(enum ggml_type type_k, enum ggml_type type_v) {
#if defined(TURBOKV_ATTENTION_UPSTREAM_TYPES)
    if (turbokv_int8_format(type_k) && turbokv_int8_format(type_v)) {
        return true;
    }
#endif
    return type_k >= GGML_TYPE_TURBOKV_FIRST || type_v >= GGML_TYPE_TURBOKV_FIRST;
}

// ---- random numbers

static int random_below(int n) {
    return (int) (random_u64() >> 33) % n;
}

static float random_normal(void) {  // the sum of eight uniform values; standard deviation 0.98
    int sum = -4 * 65535;
    for (int i = 0; i < 2; ++i) {
        const uint64_t r = random_u64();
        sum += (int) (r & 0xffff) + (int) (r >> 16 & 0xffff) + (int) (r >> 32 & 0xffff) + (int) (r >> 48);
    }
    return (float) sum * (1.2f / 65536.0f);
}

// ---- cases

enum mask_kind { NO_MASK, CAUSAL, WINDOW, HOLES, TILES, BIAS };

struct shape {
    enum ggml_type type_k, type_v;
    int            dk, dv, n_head_kv, group, n_q, n_kv, n_seq, n_seq_kv;
    enum mask_kind mask;
    bool           mask_per_head, mask_per_seq, sinks;
    float          scale, max_bias, softcap;
    char           name[256];
};

struct inputs {
    float *       q;      // [n_seq][n_q][n_head][dk]
    char *        k;      // [n_seq_kv][n_kv][n_head_kv] rows
    char *        v;      //
    ggml_fp16_t * mask;   // [n_seq or 1][n_head or 1][n_q][n_kv]
    float *       sinks;  // [n_head]
};

static int n_head(const struct shape * c) {
    return c->n_head_kv * c->group;
}

static size_t n_rows_kv(const struct shape * c) {
    return (size_t) c->n_seq_kv * c->n_kv * c->n_head_kv;
}

// What is varied, and how many values of it there are.
enum { HEADS, GROUP, BATCH, KEYS, SEQ, MASK, MASK_SHAPE, MAX_BIAS, SOFTCAP, SINKS, N_CHOICES };

static const int n_values[N_CHOICES] = { 8, 6, 4, 8, 4, 6, 4, 2, 2, 2 };

static struct shape shape_of(enum ggml_type type_k, enum ggml_type type_v, const int * pick) {
    static const char * const masks[]    = { "no mask", "causal", "window", "holes", "tiles hidden", "biased" };
    static const int          heads[][2] = { { 64, 64 },   { 128, 128 }, { 192, 128 }, { 192, 192 },
                                             { 256, 256 }, { 512, 512 }, { 576, 512 }, { 128, 256 } };
    static const int          groups[]   = { 1, 4, 7, 8, 16, 71 };
    static const int          batches[]  = { 1, 3, 17, 130 };
    static const int          keys[]     = { 1, 63, 64, 65, 511, 512, 513, 2000 };
    static const int          seqs[][2]  = { { 1, 1 }, { 2, 2 }, { 3, 3 }, { 2, 1 } };
    struct shape              c          = {
                              .type_k        = type_k,
                              .type_v        = type_v,
                              .dk            = heads[pick[HEADS]][0],
                              .dv            = heads[pick[HEADS]][1],
                              .n_head_kv     = groups[pick[GROUP]] > 8 ? 1 : 1 + random_below(3),
                              .group         = groups[pick[GROUP]],
                              .n_q           = batches[pick[BATCH]],
                              .n_kv          = keys[pick[KEYS]],
                              .n_seq         = seqs[pick[SEQ]][0],
                              .n_seq_kv      = seqs[pick[SEQ]][1],
                              .mask          = (enum mask_kind) pick[MASK],
                              .mask_per_head = pick[MASK_SHAPE] & 1,
                              .mask_per_seq  = pick[MASK_SHAPE] & 2,
                              .sinks         = pick[SINKS],
                              .max_bias      = pick[MAX_BIAS] ? 8.0f : 0.0f,
                              .softcap       = pick[SOFTCAP] ? 30.0f : 0.0f,
    };
    c.scale = (random_below(2) ? 1.0f : 3.0f) / sqrtf((float) c.dk);
    snprintf(c.name, sizeof(c.name),
             "%s/%s, values %d/%d, heads %dx%d, batch %d, %d keys, sequences %d/%d, %s%s%s%s%s%s",
             ggml_type_name(type_k), ggml_type_name(type_v), c.dk, c.dv, c.n_head_kv, c.group, c.n_q, c.n_kv, c.n_seq,
             c.n_seq_kv, masks[c.mask], c.mask_per_head ? " per head" : "", c.mask_per_seq ? " per sequence" : "",
             c.max_bias > 0.0f ? ", ALiBi" : "", c.softcap > 0.0f ? ", softcap" : "", c.sinks ? ", sinks" : "");
    return c;
}

// Without a mask there is no shape of it, and no ALiBi.
static bool is_possible(const int * pick) {
    return pick[MASK] != NO_MASK || (pick[MAX_BIAS] == 0 && pick[MASK_SHAPE] == 0);
}

static bool met[N_CHOICES][8][N_CHOICES][8];  // which two values have met in a case

// Marks the pairs of values of a case, or only counts the new ones.
static int meet(const int * pick, bool mark) {
    int n_new = 0;
    for (int i = 0; i < N_CHOICES; ++i) {
        for (int j = 0; j < i; ++j) {
            bool * const at = &met[i][pick[i]][j][pick[j]];
            n_new += !*at;
            *at |= mark;
        }
    }
    return n_new;
}

// Of `n` random cases with at most `budget` multiplications the one in which most values meet for the first time.
static struct shape draw(enum ggml_type type_k, enum ggml_type type_v, double budget, int n) {
    struct shape best;
    int          best_pick[N_CHOICES], most = -1;
    while (n > 0) {
        int pick[N_CHOICES];
        for (int i = 0; i < N_CHOICES; ++i) {
            pick[i] = random_below(n_values[i]);
        }
        const struct shape c    = shape_of(type_k, type_v, pick);
        const double       work = (double) c.n_seq * n_head(&c) * c.n_q * c.n_kv * (c.dk + c.dv);
        if (c.dk % ggml_blck_size(type_k) == 0 && c.dv % ggml_blck_size(type_v) == 0 && work <= budget &&
            is_possible(pick)) {
            const int n_new = meet(pick, false);
            if (n_new > most) {
                most = n_new;
                best = c;
                memcpy(best_pick, pick, sizeof(pick));
            }
            n--;
        }
    }
    meet(best_pick, true);
    return best;
}

static float mask_value(const struct shape * c, int seq, int head, int pos, int key) {
    const int end     = c->n_kv - c->n_q + pos + 1 - 5 * seq - head;  // of a causal mask
    bool      visible = true;
    switch (c->mask) {
        case CAUSAL:
            visible = key < end;
            break;
        case WINDOW:
            visible = key < end && key >= end - 70;
            break;
        case HOLES:
            visible = random_below(3) != 0 && (pos + head) % 11 != 7;
            break;  // some rows see no key
        case TILES:
            visible = key >= 512 ? (key / TILE + pos / 3 + seq) % 2 : c->n_kv <= 512 || pos % 5 == 4;
            break;
        default:
            break;
    }
    if (!visible) {
        return -INFINITY;
    }
    return c->mask == BIAS      ? (float) (random_below(33) - 16) * 0.25f
           : c->max_bias > 0.0f ? (float) abs(end - 1 - key) * -0.25f
                                : 0.0f;
}

// Rows of a cache: of a few magnitudes, some of them zero; or, for golden cases, random bytes with random scales.
static char * random_rows(enum ggml_type type, int n, size_t n_rows, bool random_bytes) {
    const size_t bytes = ggml_row_size(type, n);
    char *       rows  = allocate(n_rows * bytes);
    float *      x     = allocate(n * sizeof(float));
    for (size_t r = 0; r < n_rows; ++r) {
        if (random_bytes) {
            const struct int8_format * f = turbokv_int8_format(type);
            for (size_t i = 0; i < bytes; ++i) {
                rows[r * bytes + i] = (char) random_u64();
            }
            for (int b = 0; b < n / f->block; ++b) {  // 2^-5 .. 1, then times about 1 / the largest level
                const uint16_t d = (uint16_t) ((f->packing == PACKING_INT8 ? 0x0c00 : 0x2800) + random_below(0x1400));
                memcpy(rows + r * bytes + b * f->block_bytes + f->scale, &d, sizeof(d));
            }
            continue;
        }
        const float magnitude = random_below(20) == 0 ? 0.0f : ldexpf(1.0f, -random_below(3));
        for (int i = 0; i < n; ++i) {
            x[i] = magnitude * random_normal();
        }
        ggml_quantize_chunk(type, x, rows + r * bytes, 0, 1, n, NULL);
    }
    free(x);
    return rows;
}

static struct inputs make_inputs(const struct shape * c, bool random_bytes) {
    const size_t  n_q = (size_t) c->n_seq * c->n_q * n_head(c) * c->dk;
    struct inputs in  = { .q = allocate(n_q * sizeof(float)), .sinks = allocate(n_head(c) * sizeof(float)) };
    for (size_t i = 0; i < n_q; ++i) {
        in.q[i] = random_normal();
    }
    for (int i = 0; i < n_head(c); ++i) {
        in.sinks[i] = 2.0f * random_normal();
    }
    in.k = random_rows(c->type_k, c->dk, n_rows_kv(c), random_bytes);
    in.v = random_rows(c->type_v, c->dv, n_rows_kv(c), random_bytes);

    const int n_mask_seq  = c->mask_per_seq ? c->n_seq : 1;
    const int n_mask_head = c->mask_per_head ? n_head(c) : 1;
    in.mask               = allocate(sizeof(ggml_fp16_t) * n_mask_seq * n_mask_head * c->n_q * c->n_kv);
    for (int i = 0; i < n_mask_seq * n_mask_head * c->n_q; ++i) {
        for (int key = 0; key < c->n_kv; ++key) {
            const float m = mask_value(c, i / c->n_q / n_mask_head, i / c->n_q % n_mask_head, i % c->n_q, key);
            in.mask[(size_t) i * c->n_kv + key] = ggml_fp32_to_fp16(m);
        }
    }
    return in;
}

static void free_inputs(struct inputs * in) {
    free(in->q);
    free(in->k);
    free(in->v);
    free(in->mask);
    free(in->sinks);
}

static const ggml_fp16_t * mask_row(const struct shape * c, const struct inputs * in, int seq, int head, int pos) {
    const int n_mask_head = c->mask_per_head ? n_head(c) : 1;
    const int row         = ((c->mask_per_seq ? seq : 0) * n_mask_head + (c->mask_per_head ? head : 0)) * c->n_q + pos;
    return in->mask + (size_t) row * c->n_kv;
}

// ---- running the op: threads of our own

struct ggml_threadpool {
    int        n_threads;
    atomic_int arrived, generation, next;
};

void ggml_barrier(struct ggml_threadpool * tp) {
    const int generation = atomic_load(&tp->generation);
    if (atomic_fetch_add(&tp->arrived, 1) == tp->n_threads - 1) {
        atomic_store(&tp->arrived, 0);
        atomic_fetch_add(&tp->generation, 1);
    }
    while (atomic_load(&tp->generation) == generation) {
        sched_yield();
    }
}

void ggml_threadpool_chunk_set(struct ggml_threadpool * tp, int value) {
    atomic_store(&tp->next, value);
}

int ggml_threadpool_chunk_add(struct ggml_threadpool * tp, int value) {
    return atomic_fetch_add(&tp->next, value);
}

struct job {
    struct ggml_compute_params params;
    struct ggml_tensor *       dst;
    bool                       done;
};

static void * work(void * arg) {
    struct job * job = arg;
    job->done        = turbokv_flash_attn_ext(&job->params, job->dst);
    return NULL;
}

static struct ggml_tensor * cache_view(struct ggml_context * ctx, const struct shape * c, enum ggml_type type, int n,
                                       char * data) {
    struct ggml_tensor * t = ggml_new_tensor_4d(ctx, type, n, c->n_head_kv, c->n_kv, c->n_seq_kv);
    t->data                = data;
    return ggml_permute(ctx, t, 0, 2, 1, 3);
}

// Positions first .. first + n - 1 of a case. Returns the output, [n_seq][n][n_head][dv], or NULL if the op declines.
static float * run(const struct shape * c, const struct inputs * in, int first, int n, int n_threads, bool use_ref) {
    struct ggml_context * ctx = ggml_init((struct ggml_init_params) { 16 * ggml_tensor_overhead(), NULL, true });
    struct ggml_tensor *  q   = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c->dk, n_head(c), n, c->n_seq);
    q->data                   = in->q + (size_t) first * n_head(c) * c->dk;
    q->nb[3]                  = q->nb[2] * c->n_q;
    struct ggml_tensor * k    = cache_view(ctx, c, c->type_k, c->dk, in->k);
    struct ggml_tensor * v    = cache_view(ctx, c, c->type_v, c->dv, in->v);
    struct ggml_tensor * mask = NULL;
    if (c->mask != NO_MASK) {
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, c->n_kv, n, c->mask_per_head ? n_head(c) : 1,
                                  c->mask_per_seq ? c->n_seq : 1);
    }
    // ggml has no way to share a cache between sequences, but its kernels and ours allow it
    k->ne[3] = v->ne[3] = c->n_seq;
    struct ggml_tensor * dst =
        ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, mask, c->scale, c->max_bias, c->softcap);
    k->ne[3] = v->ne[3] = c->n_seq_kv;
    if (mask) {
        mask->data  = in->mask + (size_t) first * c->n_kv;
        mask->nb[2] = mask->nb[1] * c->n_q;
        mask->nb[3] = mask->nb[2] * mask->ne[2];
    }
    if (c->sinks) {
        struct ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head(c));
        sinks->data                = in->sinks;
        ggml_flash_attn_ext_add_sinks(dst, sinks);
    }
    const size_t size  = turbokv_flash_attn_ext_work_size(dst, n_threads);
    void *       wdata = memset(allocate(size), 0xff, size);  // NaN
    dst->data          = memset(allocate(ggml_nbytes(dst)), 0xff, ggml_nbytes(dst));

    struct ggml_threadpool pool = { .n_threads = n_threads };
    struct job             jobs[MAX_THREADS];
    pthread_t              threads[MAX_THREADS];
    for (int i = n_threads - 1; i >= 0; --i) {
        jobs[i] = (struct job) { { i, n_threads, size, wdata, &pool, use_ref }, dst, false };
        if (i == 0) {
            work(&jobs[0]);
        } else if (pthread_create(&threads[i], NULL, work, &jobs[i]) != 0) {
            fprintf(stderr, "FAIL: cannot start a thread\n");
            exit(1);
        }
    }
    for (int i = 1; i < n_threads; ++i) {
        pthread_join(threads[i], NULL);
    }
    float * out  = dst->data;
    bool    done = size > 0;
    for (int i = 0; i < n_threads; ++i) {
        done &= jobs[i].done;
    }
    free(wdata);
    ggml_free(ctx);
    if (!done) {
        free(out);
        return NULL;
    }
    return out;
}
