// The CPU attention, turbokv-attention.c and turbokv-tile.c: one executable per instruction set, which ends with 77
// where the machine lacks it. Usage: test-turbokv-attention [--every N] [--write] HASHES
// --every N takes only every N-th case of accuracy and exactness.
//
//   tiles      every byte of every tile against the dequantized rows
//   accuracy   float64 attention over dequantized rows: every element within its bound (attention-truth.h), and the
//              error no larger than rounding should make it
//   exactness  a row alone, in a batch, with 1 to 7 threads; NaN and garbage stay where they belong: all to the bit
//   hashes     of cases that must give the same bits on every instruction set. Their inputs and cache bytes are integer
//              arithmetic. --write writes them, in plain C only.

#include "attention-op.h"
#include "attention-truth.h"
#include "turbokv-simd.h"  // TURBOKV_K_OFFSET

#if defined(__AVXVNNI__)
#    include <cpuid.h>
#endif

enum { SKIP = 77, CHECKED_ROWS = 40, N_HASHES = 40 };

// Of a type as K or as V, over its cases, and of a single case. Measured: 0.6 to 1.1, and at most 1.6. This is an NMSE
// of 2e-5 to 8e-5 with an int8 K and of 2e-6 to 7e-6 with a float K (the int8 levels of V). In float only: an NMSE of
// 6e-14 to 2e-12, ratios up to 1.1, and 2.8 of a single case.
static const double MAX_RATIO = 1.5, MAX_CASE_RATIO = 4.0;

// ---- tiles

static void test_tile(enum ggml_type type, bool is_v, int n, int n_keys) {
    const size_t       bytes = ggml_row_size(type, n), stride = bytes + 6;
    char *             rows    = allocate((n_keys - 1) * stride + bytes);
    struct tile_source src     = { type, format_of(type, is_v), rows, stride, n, n_keys };
    const int          bad_key = n_keys / 2, block = src.format ? src.format->block : n;
    float *            x     = allocate(n * sizeof(float));
    double *           level = allocate(n * sizeof(double));
    float *            tile  = allocate(n * TILE * sizeof(float));
    float *            scale = allocate(n / block * TILE * sizeof(float));
    uint64_t *         bad   = allocate(n / block * sizeof(uint64_t));
    for (int key = 0; key < n_keys; ++key) {
        char * row = random_rows(type, n, 1, false);
        memcpy(rows + key * stride, row, bytes);
        free(row);
    }
    if (!src.format) {
        is_v ? turbokv_v_tile_float(&src, tile) : turbokv_k_tile_float(&src, tile, x);
    } else if (!is_v) {
        turbokv_k_tile_int8(&src, (uint32_t *) (void *) tile, scale);
    } else {
        char         d[2];
        char * const at = rows + bad_key * stride + src.format->scale;  // of the first block
        memcpy(d, at, 2);
        memcpy(at, "\x00\x7e", 2);
        turbokv_v_tile_int8(&src, (uint32_t *) (void *) tile, scale, bad);
        memcpy(at, d, 2);
    }
    const struct codebook codebook = codebook_of(type);
    const uint8_t *       byte     = (const uint8_t *) tile;
    int                   n_wrong  = 0;
    for (int key = 0; key < TILE; ++key) {
        if (key < n_keys) {
            decode(type, rows + key * stride, x, n);
        } else {
            memset(x, 0, n * sizeof(float));
        }
        to_levels(src.format, x, level, n);
        for (int i = 0; i < n; ++i) {
            if (!src.format) {
                n_wrong += !same(&x[i], &tile[is_v ? key * n + i : i * TILE + key], 1);
                continue;
            }
            const int     b    = i / block;
            const int     word = is_v ? key / 4 * n + i : i / 4 * TILE + key;
            const uint8_t y    = byte[4 * word + (is_v ? key % 4 : i % 4)];
            const double  d    = key < n_keys ? block_scale(src.format, rows + key * stride, b) : 0.0;
            const double  ref  = level[b * block + turbokv_tile_order(src.format, i % block)];
            const double  got  = (double) scale[b * TILE + key] * (int8_t) (is_v ? y : y - TURBOKV_K_OFFSET);
            const bool    nan  = is_v && b == 0 && key == bad_key;
            n_wrong += !(nan ? got == 0.0 : fabs(got - ref) <= (codebook.off + 2e-6 * codebook.largest) * d);
        }
    }
    for (int b = 0; src.format && is_v && b < n / block; ++b) {
        n_wrong += bad[b] != (b == 0 ? (uint64_t) 1 << bad_key : 0);
    }
    if (n_wrong > 0) {
        fail("%c tile of %s, %d values, %d keys: %d are wrong", is_v ? 'V' : 'K', ggml_type_name(type), n, n_keys,
             n_wrong);
    }
    free(rows);
    free(x);
    free(level);
    free(tile);
    free(scale);
    free(bad);
}

static void test_tiles(void) {
    static const int n_keys[] = { 1, 13, 63, 64 };
    random_state              = 1;
    for (int i = 0; i < N_TYPES; ++i) {
        const int block = (int) ggml_blck_size(types[i]) < 32 ? 32 : (int) ggml_blck_size(types[i]);
        for (int j = 0; j < 8; ++j) {
            test_tile(types[i], j % 2, (1 + j % 3) * block, n_keys[j / 2]);
        }
    }
}

// ---- accuracy

static struct tally test_accuracy(const struct shape * c, int n_threads) {
    struct tally   t   = { 0 };
    struct inputs  in  = make_inputs(c, false);
    struct decoded k   = decode_rows(c->type_k, false, in.k, c->dk, n_rows_kv(c));
    struct decoded v   = decode_rows(c->type_v, true, in.v, c->dv, n_rows_kv(c));
    float *        out = run(c, &in, 0, c->n_q, n_threads, false);
    const int      n   = c->n_seq * c->n_q * n_head(c);
    for (int r = 0; r < n && out; r += n / CHECKED_ROWS + 1) {
        check_row(c, &in, &k, &v, r / n_head(c) / c->n_q, r / n_head(c) % c->n_q, r % n_head(c),
                  out + (size_t) r * c->dv, &t);
    }
    if (!out) {
        fail("%s: declined", c->name);
    }
    free(out);
    free_decoded(&k);
    free_decoded(&v);
    free_inputs(&in);
    return t;
}

// The op leaves to upstream's kernel the other pairs, and all of them when the reference implementation is asked for.
static void test_declined(void) {
    for (int i = 0; i < N_TYPES * N_TYPES; ++i) {
        const enum ggml_type type_k = types[i / N_TYPES], type_v = types[i % N_TYPES];
        const bool           accepted = is_accepted(type_k, type_v);
        random_state                  = 1000 + i;
        const struct shape c          = draw(type_k, type_v, 1e5, 1);
        struct inputs      in         = make_inputs(&c, false);
        float *            out        = run(&c, &in, 0, c.n_q, 2, accepted);
        if (out) {
            fail("%s: not declined%s", c.name, accepted ? " with use_ref" : "");
        }
        free(out);
        free_inputs(&in);
    }
}

// Every pair of types that the attention accepts, each in one case.
static void test_pairs(int every) {
    double error[2][N_TYPES] = { { 0.0 } }, power[2][N_TYPES] = { { 0.0 } }, ratio[2][N_TYPES] = { { 0.0 } };
    int    n_rows[2][N_TYPES] = { { 0 } }, n_cases = 0;
    double worst = 0.0;
    for (int i = 0; i < N_TYPES * N_TYPES; ++i) {
        const int of[2] = { i / N_TYPES, i % N_TYPES };  // types of K and V
        if (!is_accepted(types[of[0]], types[of[1]])) {
            continue;
        }
        random_state         = 2000 + i;
        const struct shape c = draw(types[of[0]], types[of[1]], i % 9 == 0 ? 3e8 : 2e7, 20);
        if (i % every != 0) {
            continue;
        }
        n_cases++;
        const struct tally t = test_accuracy(&c, 1 + i % MAX_THREADS);
        if (!(t.ratio <= MAX_CASE_RATIO * t.n_rows)) {
            fail("%s: squared error %.2f of the expected, limit %.1f", c.name, t.ratio / t.n_rows, MAX_CASE_RATIO);
        }
        worst = fmax(worst, t.worst);
        for (int side = 0; side < 2; ++side) {
            error[side][of[side]] += t.error;
            power[side][of[side]] += t.power;
            ratio[side][of[side]] += t.ratio;
            n_rows[side][of[side]] += t.n_rows;
        }
    }
    printf("%d pairs, the worst element at %.3f of its bound\n", n_cases, worst);
    printf("%12s %22s %22s\n", "", "as K", "as V");
    for (int i = 0; i < N_TYPES; ++i) {
        printf("%-12s", ggml_type_name(types[i]));
        for (int side = 0; side < 2; ++side) {
            const double mean = ratio[side][i] / n_rows[side][i];
            if (n_rows[side][i] == 0) {
                printf("%26s", "not among these");
                continue;
            }
            printf("  NMSE %.1e ratio %.2f", error[side][i] / power[side][i], mean);
            if (!(mean <= MAX_RATIO)) {
                fail("%s as %c: squared errors are %.2f of the expected, limit %.2f", ggml_type_name(types[i]),
                     "KV"[side], mean, MAX_RATIO);
            }
        }
        printf("\n");
    }
    for (int i = 0; i < N_CHOICES * N_CHOICES; ++i) {
        const int a = i / N_CHOICES, b = i % N_CHOICES;
        for (int j = 0; b < a && j < n_values[a] * n_values[b]; ++j) {
            int pick[N_CHOICES] = { [MASK] = CAUSAL };
            pick[a]             = j / n_values[b];
            pick[b]             = j % n_values[b];
            if (is_possible(pick) && !met[a][pick[a]][b][pick[b]]) {
                fail("no case has value %d of choice %d with value %d of choice %d", pick[b], b, pick[a], a);
            }
        }
    }
}

// ---- what holds to the bit

// The rows [n_head][dv] of a sequence and position.
static float * rows_of(const struct shape * c, float * out, int seq, int pos) {
    return out + ((size_t) seq * c->n_q + pos) * n_head(c) * c->dv;
}

static void test_invariance(const struct shape * c, const struct inputs * in, float * whole) {
    for (int n_threads = 2; n_threads <= MAX_THREADS; n_threads += n_threads == 3 ? 4 : 1) {
        float * out = run(c, in, 0, c->n_q, n_threads, false);
        if (!same(out, whole, c->n_seq * c->n_q * n_head(c) * c->dv)) {
            fail("%s: %d threads differ from one", c->name, n_threads);
        }
        free(out);
    }
    for (int pos = 0; pos < c->n_q; pos += 43) {
        for (int n_threads = 1; n_threads <= MAX_THREADS; n_threads += 3) {
            float * out = run(c, in, pos, 1, n_threads, false);
            for (int seq = 0; seq < c->n_seq; ++seq) {
                if (!same(out + seq * n_head(c) * c->dv, rows_of(c, whole, seq, pos), n_head(c) * c->dv)) {
                    fail("%s: position %d alone, %d threads, differs from the batch", c->name, pos, n_threads);
                }
            }
            free(out);
        }
    }
}

// Compares with `whole`: all rows that see `key` through KV head `head_kv` of sequence 0 are NaN, from value `first` on
// for `n`; everything else has the same bits.
static void expect_nan(const struct shape * c, const struct inputs * in, float * whole, int key, int head_kv, int first,
                       int n, const char * what) {
    float * out   = run(c, in, 0, c->n_q, 3, false);
    int     n_nan = 0;
    for (int r = 0; r < c->n_seq * c->n_q * n_head(c); ++r) {
        const int     seq = r / n_head(c) / c->n_q, pos = r / n_head(c) % c->n_q, head = r % n_head(c);
        const float * a = out + (size_t) r * c->dv;
        const float * b = whole + (size_t) r * c->dv;
        const bool    hit =
            seq % c->n_seq_kv == 0 && head / c->group == head_kv && mask_row(c, in, seq, head, pos)[key] != 0xfc00;
        const bool good =
            hit ? all_nan(a + first, n) && same(a, b, first) && same(a + first + n, b + first + n, c->dv - first - n)
                : same(a, b, c->dv);
        n_nan += hit;
        if (!good) {
            fail("%s: %s in key %d: sequence %d, position %d, head %d %s", c->name, what, key, seq, pos, head,
                 hit ? "is not NaN where it should be, or elsewhere" : "changes");
            break;
        }
    }
    if (n_nan == 0 || n_nan == c->n_seq * c->n_q * n_head(c)) {
        fail("%s: %s in key %d: a test without rows that see it or rows that do not", c->name, what, key);
    }
    free(out);
}

static void test_poison(const struct shape * c, struct inputs * in, float * whole) {
    const size_t               k_bytes = ggml_row_size(c->type_k, c->dk), v_bytes = ggml_row_size(c->type_v, c->dv);
    const struct int8_format * kf     = format_of(c->type_k, false);
    const struct int8_format * vf     = format_of(c->type_v, true);
    const bool                 holes  = c->mask == HOLES;  // other masks show the first keys to all rows, or to none
    const int                  keys[] = { holes ? 3 : c->n_kv - 100, holes ? 530 : c->n_kv - 64, c->n_kv - 20 };
    for (int i = 0; i < 3; ++i) {
        const int    head_kv = i % c->n_head_kv;
        const size_t row     = (size_t) keys[i] * c->n_head_kv + head_kv;
        char         saved[4 * 576];
        char *       k = memcpy(saved, in->k + row * k_bytes, k_bytes);
        memset(in->k + row * k_bytes, 0xff, k_bytes);  // NaN in every type
        expect_nan(c, in, whole, keys[i], head_kv, 0, c->dv, "a NaN row of K");
        memcpy(in->k + row * k_bytes, k, k_bytes);
        if (kf) {
            memcpy(in->k + row * k_bytes + k_bytes - kf->block_bytes + kf->scale, "\x00\x7e", 2);
            expect_nan(c, in, whole, keys[i], head_kv, 0, c->dv, "a NaN scale of K");
            memcpy(in->k + row * k_bytes, k, k_bytes);
        }
        char * v = memcpy(saved, in->v + row * v_bytes, v_bytes);
        memset(in->v + row * v_bytes, 0xff, v_bytes);
        expect_nan(c, in, whole, keys[i], head_kv, 0, c->dv, "a NaN row of V");
        memcpy(in->v + row * v_bytes, v, v_bytes);
        if (vf) {
            memcpy(in->v + row * v_bytes + v_bytes - vf->block_bytes + vf->scale, "\x00\x7e", 2);
            expect_nan(c, in, whole, keys[i], head_kv, c->dv - vf->block, vf->block, "a NaN scale of V");
            memcpy(in->v + row * v_bytes, v, v_bytes);
        }
    }

    // Keys that one position does not see hold garbage: random bytes, every other row with infinite scales.
    const int     pos     = c->n_q / 2;
    struct inputs garbage = *in;
    garbage.k             = memcpy(allocate(n_rows_kv(c) * k_bytes), in->k, n_rows_kv(c) * k_bytes);
    garbage.v             = memcpy(allocate(n_rows_kv(c) * v_bytes), in->v, n_rows_kv(c) * v_bytes);
    for (size_t row = 0; row < n_rows_kv(c); ++row) {
        const int key     = (int) (row / c->n_head_kv % c->n_kv);
        bool      visible = false;
        for (int head = 0; head < n_head(c); ++head) {
            visible |= mask_row(c, in, 0, head, pos)[key] != 0xfc00;
        }
        if (visible) {
            continue;
        }
        for (size_t i = 0; i < k_bytes; ++i) {
            garbage.k[row * k_bytes + i] = (char) random_u64();
        }
        for (size_t i = 0; i < v_bytes; ++i) {
            garbage.v[row * v_bytes + i] = (char) random_u64();
        }
        for (int b = 0; kf && row % 2 && b < c->dk / kf->block; ++b) {
            memcpy(garbage.k + row * k_bytes + b * kf->block_bytes + kf->scale, "\x00\xfc", 2);
        }
        for (int b = 0; vf && row % 2 && b < c->dv / vf->block; ++b) {
            memcpy(garbage.v + row * v_bytes + b * vf->block_bytes + vf->scale, "\x00\xfc", 2);
        }
    }
    float * out = run(c, &garbage, pos, 1, 2, false);
    if (!same(out, rows_of(c, whole, 0, pos), n_head(c) * c->dv)) {
        fail("%s: what hidden keys hold changes the result", c->name);
    }
    free(out);
    free(garbage.k);
    free(garbage.v);

    // A query that is not finite spoils its own row only.
    for (int i = 0; i < 2; ++i) {
        const int   head  = i % n_head(c);
        float *     q     = in->q + ((size_t) pos * n_head(c) + head) * c->dk + (i ? c->dk - 1 : 0);
        const float saved = *q;
        *q                = i ? INFINITY : NAN;
        out               = run(c, in, 0, c->n_q, 1, false);
        for (int r = 0; r < c->n_seq * c->n_q * n_head(c); ++r) {
            const float * a = out + (size_t) r * c->dv;
            if (r == pos * n_head(c) + head ? !all_nan(a, c->dv) : !same(a, whole + (size_t) r * c->dv, c->dv)) {
                fail("%s: a query with %g, row %d: %s", c->name, *q, r, all_nan(a, c->dv) ? "NaN" : "not NaN");
                break;
            }
        }
        free(out);
        *q = saved;
    }
}

static void test_exactness(int i) {
    struct shape c = {
        .type_k        = types[i % N_TYPES],
        .type_v        = types[(5 * i + 4) % (i < 9 ? N_TYPES : 9)],
        .dk            = i % 2 ? 128 : 256,
        .dv            = i % 3 ? 128 : 256,
        .n_head_kv     = 1 + i % 3,
        .group         = i % 5 == 2 ? 5 : 2,
        .n_q           = 130,
        .n_kv          = i % 4 ? 1100 : 577,
        .n_seq         = 1,
        .n_seq_kv      = 1,
        .mask          = i % 4 == 3 ? WINDOW
                         : i % 2    ? HOLES
                                    : CAUSAL,
        .mask_per_head = i % 5 == 1,
        .sinks         = i % 3 == 1,
        .scale         = 0.07f,
        .max_bias      = i % 4 == 2 ? 8.0f : 0.0f,
    };
    snprintf(c.name, sizeof(c.name), "exactness %d, %s/%s", i, ggml_type_name(c.type_k), ggml_type_name(c.type_v));
    struct inputs in    = make_inputs(&c, false);
    float *       whole = run(&c, &in, 0, c.n_q, 1, false);
    test_invariance(&c, &in, whole);
    test_poison(&c, &in, whole);
    free(whole);
    free_inputs(&in);
}

// ---- hashes

static uint64_t hash_of(const float * x, int n) {  // FNV-1a; one NaN is as good as another
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < n; ++i) {
        uint32_t bits = 0x7fc00000;
        if (!isnan(x[i])) {
            memcpy(&bits, &x[i], sizeof(bits));
        }
        for (int b = 0; b < 32; b += 8) {
            hash = (hash ^ (bits >> b & 0xff)) * 0x100000001b3u;
        }
    }
    return hash;
}

static void test_hashes(const char * path, bool write) {
    FILE * file = fopen(path, write ? "w" : "r");
    if (file == NULL) {
        fail("cannot open %s", path);
        return;
    }
    const enum ggml_type int8_types[] = {
#include "turbokv-cache-types.inc"
        GGML_TYPE_Q8_0,
        GGML_TYPE_Q4_0,
    };
    for (int i = 0; i < N_HASHES; ++i) {
        random_state         = 1000 + i;
        const struct shape c = draw(int8_types[i % 11], int8_types[i % 11 < 9 ? 3 * i % 10 : i % 9], 4e6, 1);
        char               expected[512], line[512];
        if (!write && fgets(expected, sizeof(expected), file) == NULL) {
            fail("%s ends before case %d: %s", path, i, c.name);
            break;
        }
        struct inputs in  = make_inputs(&c, true);
        float *       out = run(&c, &in, 0, c.n_q, 1 + i % 4, false);
        snprintf(line, sizeof(line), "%016llx %s\n",
                 (unsigned long long) hash_of(out, c.n_seq * c.n_q * n_head(&c) * c.dv), c.name);
        if (write) {
            fputs(line, file);
        } else if (strcmp(line, expected) != 0) {
            fail("other bits than in plain C, first here, then %s:\n%s%s", path, line, expected);
        }
        free(out);
        free_inputs(&in);
    }
    fclose(file);
}

// ---- main

// What this executable was compiled for and the machine lacks, or NULL.
static const char * missing(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#    if defined(__AVX2__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return "AVX2";
    }
#    endif
#    if defined(__AVXVNNI__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1 << 4)) {
        return "AVX-VNNI";
    }
#    endif
#    if defined(__AVX512VNNI__)
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) {
        return "AVX-512 with VNNI";
    }
#    endif
#    if defined(__AVX512VBMI__)
    if (!__builtin_cpu_supports("avx512vbmi")) {
        return "AVX-512 VBMI";
    }
#    endif
#endif
    return NULL;
}

int main(int argc, char ** argv) {
    if (missing() != NULL) {
        printf("SKIP: this machine has no %s\n", missing());
        return SKIP;
    }
    int  every = 1, arg = 1;
    bool write = false;
    for (; arg + 1 < argc; ++arg) {
        if (strcmp(argv[arg], "--write") == 0) {
            write = true;
        } else if (strcmp(argv[arg], "--every") == 0) {
            every = atoi(argv[++arg]);
        } else {
            break;
        }
    }
    if (arg + 1 != argc || every < 1) {
        fprintf(stderr, "usage: %s [--every N] [--write] HASHES\n", argv[0]);
        return 2;
    }
#if !defined(TURBOKV_SIMD_SCALAR)
    if (write) {
        fprintf(stderr, "hashes are written in plain C only\n");
        return 2;
    }
#endif
    if (!write) {
        test_tiles();
        test_pairs(every);
        test_declined();
        for (int i = 0; i < N_TYPES; i += every) {
            random_state = 3000 + i;
            test_exactness(i);
        }
    }
#if !defined(TURBOKV_ATTENTION_FLOAT)
    test_hashes(argv[arg], write);
#endif
    return n_failures > 0;
}
