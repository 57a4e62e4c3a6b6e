// The codecs against tests/golden/<type>.bin (written by python/turbokv/golden.py), bit for bit, the level
// indices against their definition, and the properties that no list of vectors can show.
// Usage: test-turbokv-golden GOLDEN_FOLDER
//
// Calls the codec functions by name, never through ggml's traits: so the sanitized build of this test runs the
// sanitized codec that is linked into it. Buffers are malloc'd to the byte for AddressSanitizer's sake.

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml.h"
#include "golden-file.h"
#include "splitmix64.h"
#include "turbokv-encode.h"
#include "turbokv-quants.h"

#define MAX_BLOCK   128
#define MAX_REPORTS 8  // per type: one wrong table entry breaks thousands of values

struct codec {
    const char *   name;
    enum ggml_type type;
    int            block;
    size_t         size;
    size_t         d_offset;  // of the fp16 scale in the block
    const double * thresholds;
    int            n_levels;
    double         relative_mse;  // on N(0, 1), as in python/turbokv/spec.py
    void (*quantize)(const float * x, void * y, int64_t k);
    void (*dequantize)(const void * x, float * y, int64_t k);
};

// Typed wrappers: a call through a cast function pointer is what UBSan's function check reports.
#define DEFINE_CALLS(name)                                                                                             \
    static void quantize_##name(const float * x, void * y, int64_t k) {                                                \
        quantize_row_##name##_ref(x, y, k);                                                                            \
    }                                                                                                                  \
    static void dequantize_##name(const void * x, float * y, int64_t k) {                                              \
        dequantize_row_##name(x, y, k);                                                                                \
    }

#define CODEC(name, NAME, table, mse)                                                                                  \
    { #name,                                                                                                           \
      GGML_TYPE_##NAME,                                                                                                \
      QK_##NAME,                                                                                                       \
      sizeof(block_##name),                                                                                            \
      offsetof(block_##name, d),                                                                                       \
      turbokv_##table##_thresholds,                                                                                    \
      sizeof(turbokv_##table) / sizeof(turbokv_##table[0]),                                                            \
      mse,                                                                                                             \
      quantize_##name,                                                                                                 \
      dequantize_##name }

DEFINE_CALLS(turbo2)
DEFINE_CALLS(turbo2_64)
DEFINE_CALLS(turbo3)
DEFINE_CALLS(turbo3_64)
DEFINE_CALLS(turbo4)
DEFINE_CALLS(turbo4_64)
DEFINE_CALLS(tbq2)
DEFINE_CALLS(tbq3)
DEFINE_CALLS(tbq4)

static const struct codec codecs[] = {
    CODEC(turbo2, TURBO2, lm4, 0.1190),  CODEC(turbo2_64, TURBO2_64, lm4, 0.1170),
    CODEC(turbo3, TURBO3, lm8, 0.0339),  CODEC(turbo3_64, TURBO3_64, lm8, 0.0328),
    CODEC(turbo4, TURBO4, lm16, 0.0092), CODEC(turbo4_64, TURBO4_64, lm16, 0.0089),
    CODEC(tbq2, TBQ2, lm4, 0.1190),      CODEC(tbq3, TBQ3, tbq3, 0.0339),
    CODEC(tbq4, TBQ4, lm16, 0.0092),
};

// Every type there is: one without a row above must not go untested.
static const enum ggml_type all_types[] = {
#include "turbokv-cache-types.inc"
};

#define N_CODECS ((int) (sizeof(codecs) / sizeof(codecs[0])))
#define N_TYPES  ((int) (sizeof(all_types) / sizeof(all_types[0])))

static int n_failures = 0;  // of the current codec

static void fail(const struct codec * c, const char * format, ...) {
    if (++n_failures > MAX_REPORTS) {
        return;
    }
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAIL %s: ", c->name);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
}

static void * allocate(size_t size) {
    void * p = malloc(size);
    if (p == NULL) {
        fprintf(stderr, "FAIL: out of memory\n");
        exit(1);
    }
    return p;
}

static bool same_float(float a, float b) {
    return (isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof(a)) == 0;
}

static float scale_of(const struct codec * c, const uint8_t * block) {
    ggml_fp16_t d;
    memcpy(&d, block + c->d_offset, sizeof(d));
    return ggml_fp16_to_fp32(d);
}

static void random_gaussian(float * x, int n) {  // Box-Muller, n even
    for (int j = 0; j < n; j += 2) {
        const double u = ((double) (random_u64() >> 11) + 1.0) * 0x1p-53;  // in (0, 1]
        const double v = (double) (random_u64() >> 11) * 0x1p-53;
        const double r = sqrt(-2.0 * log(u));
        x[j]           = (float) (r * cos(6.283185307179586 * v));
        x[j + 1]       = (float) (r * sin(6.283185307179586 * v));
    }
}

static void check_golden(const struct codec * c, const char * folder) {
    struct golden_file g;
    char               error[8192];
    if (!golden_read(folder, c->name, (int) c->type, c->block, c->size, &g, error, sizeof(error))) {
        fail(c, "%s", error);
        return;
    }
    float *   x       = allocate(c->block * sizeof(float));
    float *   y       = allocate(c->block * sizeof(float));
    uint8_t * q_saved = allocate(c->size);
    uint8_t * q       = allocate(c->size);
    for (int i = 0; i < g.n_blocks; ++i) {
        memcpy(x, g.x + i * c->block, c->block * sizeof(float));
        memcpy(q_saved, g.q + i * c->size, c->size);
        memset(q, 0xa5, c->size);
        c->quantize(x, q, c->block);
        for (size_t b = 0; b < c->size; ++b) {
            if (q[b] != q_saved[b]) {
                fail(c,
                     "block %d, byte %zu%s: encoded 0x%02x, golden 0x%02x; if the layout was meant to change: "
                     "scripts/generate.py",
                     i, b, b >= c->d_offset ? " (scale)" : "", q[b], q_saved[b]);
            }
        }
        c->dequantize((const void *) q_saved, y, c->block);
        for (int j = 0; j < c->block; ++j) {
            const float expected = g.y[i * c->block + j];
            if (!same_float(y[j], expected)) {
                fail(c,
                     "block %d, value %d: decoded %.9g, golden %.9g; if the codebook was meant to change: "
                     "scripts/generate.py",
                     i, j, y[j], expected);
            }
        }
    }
    free(x);
    free(y);
    free(q_saved);
    free(q);
    golden_free(&g);
}

// ---- level indices

// The definition of an index.
static int index_by_definition(const struct codec * c, double value, double gain) {
    const double u = value * gain;
    int          i = 0;
    for (int t = 0; t < c->n_levels - 1; ++t) {
        i += c->thresholds[t] < u;
    }
    return i;
}

// The comparison of keys against the definition: floats at and around every threshold of blocks of all norms, some of
// them so that the product is the threshold itself, and the ends of the number range.
static void check_indices_f32(const struct codec * c) {
    int n_ties = 0;
    for (int i = 0; i < 20000; ++i) {
        const double root = sqrt((double) c->block);
        const double t    = c->thresholds[random_u64() % (c->n_levels - 1)];
        const float  at   = ldexpf(1.0f + (float) (random_u64() >> 41) * 0x1p-23f, (int) (random_u64() % 276) - 149);
        const double norm = at * root / (t == 0.0 ? 1.0 : fabs(t));  // puts `at` on |t|, nearly or exactly
        const double gain = root / norm;

        float   x[MAX_BLOCK] = { 0.0f, -0.0f, FLT_TRUE_MIN, -FLT_TRUE_MIN, FLT_MIN, -FLT_MIN, FLT_MAX, -FLT_MAX };
        uint8_t index[MAX_BLOCK];
        int     n = 8;
        for (int k = 0; k < c->n_levels - 1; ++k) {
            const float near = (float) (c->thresholds[k] / gain);
            x[n++]           = near;
            x[n++]           = nextafterf(near, INFINITY);
            x[n++]           = nextafterf(near, -INFINITY);
        }
        for (int j = 0; j < n; ++j) {
            x[j] = isfinite(x[j]) ? x[j] : copysignf(FLT_MAX, x[j]);
        }
        find_indices_f32(x, n, gain, norm / root, c->thresholds, c->n_levels, index);
        for (int j = 0; j < n; ++j) {
            const int expected = index_by_definition(c, x[j], gain);
            if (index[j] != expected) {
                fail(c, "norm %a: %a has index %d, by definition %d", norm, x[j], index[j], expected);
            }
            n_ties += t != 0.0 && x[j] != 0.0f && fabs((double) x[j] * gain) == fabs(t);
        }
    }
    if (n_ties < 1000) {
        fail(c, "only %d values on a threshold", n_ties);
    }
}

static void check_indices_f64(const struct codec * c) {
    double  x[MAX_BLOCK] = { 0.0, -0.0, DBL_TRUE_MIN, -DBL_TRUE_MIN, 1e6, -1e6 };
    uint8_t index[MAX_BLOCK];
    int     n = 6;
    for (int k = 0; k < c->n_levels - 1; ++k) {
        x[n++] = c->thresholds[k];
        x[n++] = nextafter(c->thresholds[k], INFINITY);
        x[n++] = nextafter(c->thresholds[k], -INFINITY);
    }
    find_indices_f64(x, n, 1.0, c->thresholds, c->n_levels, index);
    for (int j = 0; j < n; ++j) {
        const int expected = index_by_definition(c, x[j], 1.0);
        if (index[j] != expected) {
            fail(c, "%a has index %d, by definition %d", x[j], index[j], expected);
        }
    }
}

// ---- properties

// A row is its blocks: n at once equal n one by one, at any address that the types allow (2 for blocks, 4 for floats).
static void check_rows(const struct codec * c, int n) {
    const int    k    = n * c->block;
    const size_t size = n * c->size;
    float *      x    = allocate(k * sizeof(float));
    float *      y    = allocate(k * sizeof(float));
    uint8_t *    q    = allocate(size);
    random_gaussian(x, k);
    for (int i = 0; i < n; ++i) {
        c->quantize(x + i * c->block, q + i * c->size, c->block);
        c->dequantize(q + i * c->size, y + i * c->block, c->block);
    }
    for (int shift = 0; shift < 2; ++shift) {
        char * x_raw = allocate((k + shift) * sizeof(float));
        char * y_raw = allocate((k + shift) * sizeof(float));
        char * q_raw = allocate(size + 2 * shift);
        char * x_at  = x_raw + 4 * shift;
        char * y_at  = y_raw + 4 * shift;
        char * q_at  = q_raw + 2 * shift;
        memcpy(x_at, x, k * sizeof(float));
        memset(q_at, 0xa5, size);
        c->quantize((const float *) (void *) x_at, q_at, k);
        if (memcmp(q_at, q, size) != 0) {
            fail(c, "a row of %d blocks (offset %d) is not encoded as its blocks are", n, 2 * shift);
        }
        c->dequantize(q_at, (float *) (void *) y_at, k);
        if (memcmp(y_at, y, k * sizeof(float)) != 0) {
            fail(c, "a row of %d blocks (offset %d) is not decoded as its blocks are", n, 2 * shift);
        }
        free(x_raw);
        free(y_raw);
        free(q_raw);
    }
    free(x);
    free(y);
    free(q);
}

// Non-finite input stays visible in its block and changes nothing beside it.
static void check_non_finite(const struct codec * c) {
    const float bad[3] = { NAN, INFINITY, -INFINITY };
    const int   k      = 3 * c->block;
    float *     x      = allocate(k * sizeof(float));
    float *     y      = allocate(k * sizeof(float));
    float *     y_good = allocate(k * sizeof(float));
    uint8_t *   q      = allocate(3 * c->size);
    random_gaussian(x, k);
    c->quantize(x, q, k);
    c->dequantize(q, y_good, k);
    for (int i = 0; i < 3; ++i) {
        x[c->block + 7] = bad[i];
        c->quantize(x, q, k);
        c->dequantize(q, y, k);
        for (int j = 0; j < k; ++j) {
            const bool inside = j / c->block == 1;
            if (inside ? !isnan(y[j]) : !same_float(y[j], y_good[j])) {
                fail(c, "%f in block 1: value %d of block %d decodes to %.9g (without it: %.9g)", bad[i], j % c->block,
                     j / c->block, y[j], y_good[j]);
            }
        }
    }
    free(x);
    free(y);
    free(y_good);
    free(q);
}

static void check_zero_bytes(const struct codec * c) {
    uint8_t * q = allocate(c->size);
    float *   y = allocate(c->block * sizeof(float));
    memset(q, 0, c->size);
    c->dequantize(q, y, c->block);
    for (int j = 0; j < c->block; ++j) {
        if (y[j] != 0.0f) {
            fail(c, "zero bytes, value %d: decoded %.9g", j, y[j]);
        }
    }
    free(q);
    free(y);
}

// Scaling by a power of two only moves the exponent of the scale; the norm survives up to the rounding of the scale.
static void check_scale_and_norm(const struct codec * c) {
    const double half_ulp = 0x1p-11 + 1e-6;  // of a normal fp16, and float32 products
    float        x[MAX_BLOCK], x_scaled[MAX_BLOCK], y[MAX_BLOCK], y_scaled[MAX_BLOCK];
    uint8_t *    q        = allocate(c->size);
    uint8_t *    q_scaled = allocate(c->size);
    for (int i = 0; i < 200; ++i) {
        const int exponent = i % 25 - 12;  // the scale stays a normal fp16
        random_gaussian(x, c->block);
        double norm_x = 0.0;
        double norm_y = 0.0;
        for (int j = 0; j < c->block; ++j) {
            x_scaled[j] = ldexpf(x[j], exponent);
        }
        c->quantize(x, q, c->block);
        c->quantize(x_scaled, q_scaled, c->block);
        c->dequantize(q, y, c->block);
        c->dequantize(q_scaled, y_scaled, c->block);
        if (memcmp(q, q_scaled, c->d_offset) != 0 || scale_of(c, q_scaled) != ldexpf(scale_of(c, q), exponent)) {
            fail(c, "times 2^%d: other indices, or scale %.9g instead of %.9g", exponent, scale_of(c, q_scaled),
                 ldexpf(scale_of(c, q), exponent));
        }
        for (int j = 0; j < c->block; ++j) {
            norm_x += (double) x_scaled[j] * x_scaled[j];
            norm_y += (double) y_scaled[j] * y_scaled[j];
            if (y_scaled[j] != ldexpf(y[j], exponent)) {
                fail(c, "times 2^%d, value %d: decoded %.9g, expected %.9g", exponent, j, y_scaled[j],
                     ldexpf(y[j], exponent));
            }
        }
        if (!(fabs(sqrt(norm_y / norm_x) - 1.0) <= half_ulp)) {
            fail(c, "norm %.9g became %.9g", sqrt(norm_x), sqrt(norm_y));
        }
    }
    free(q);
    free(q_scaled);
}

// The codebooks are symmetric, and so is everything before them: -x decodes to -y.
static void check_sign_symmetry(const struct codec * c) {
    float     x[MAX_BLOCK], x_neg[MAX_BLOCK], y[MAX_BLOCK], y_neg[MAX_BLOCK];
    uint8_t * q = allocate(c->size);
    for (int i = 0; i < 200; ++i) {
        random_gaussian(x, c->block);
        for (int j = 0; j < c->block; ++j) {
            x_neg[j] = -x[j];
        }
        c->quantize(x, q, c->block);
        c->dequantize(q, y, c->block);
        c->quantize(x_neg, q, c->block);
        c->dequantize(q, y_neg, c->block);
        for (int j = 0; j < c->block; ++j) {
            if (y_neg[j] != -y[j]) {
                fail(c, "value %d of -x decodes to %.9g, of x to %.9g", j, y_neg[j], y[j]);
            }
        }
    }
    free(q);
}

// Decoded blocks encode to their own bytes. Not all of them: the chosen levels have an RMS of not quite 1, and dividing
// by it can move one over a threshold. Of Gaussian blocks less than one in a hundred is like that.
static void check_idempotence(const struct codec * c) {
    const int n_blocks = 2000;
    int       n_same   = 0;
    float     x[MAX_BLOCK];
    uint8_t * q     = allocate(c->size);
    uint8_t * again = allocate(c->size);
    for (int i = 0; i < n_blocks; ++i) {
        random_gaussian(x, c->block);
        c->quantize(x, q, c->block);
        c->dequantize(q, x, c->block);
        c->quantize(x, again, c->block);
        n_same += memcmp(q, again, c->size) == 0;
    }
    if (n_same < n_blocks * 99 / 100) {
        fail(c, "only %d of %d decoded blocks encode to their own bytes", n_same, n_blocks);
    }
    free(q);
    free(again);
}

// The largest bf16 is near the largest float: the scale is clamped, and all stays finite.
static void check_largest(const struct codec * c) {
    float     x[MAX_BLOCK], y[MAX_BLOCK];
    uint8_t * q = allocate(c->size);
    random_gaussian(x, c->block);
    for (int j = 0; j < c->block; ++j) {
        x[j] = x[j] < 0.0f ? -0x1.fep127f : 0x1.fep127f;
    }
    c->quantize(x, q, c->block);
    c->dequantize(q, y, c->block);
    for (int j = 0; j < c->block; ++j) {
        if (scale_of(c, q) != 65504.0f || !isfinite(y[j])) {
            fail(c, "the largest bf16 gives scale %.9g and value %d is %.9g", scale_of(c, q), j, y[j]);
        }
    }
    free(q);
}

static double check_gaussian_error(const struct codec * c) {
    const int n_blocks = 20000 * MAX_BLOCK / c->block;
    float     x[MAX_BLOCK], y[MAX_BLOCK];
    uint8_t * q     = allocate(c->size);
    double    error = 0.0;
    double    power = 0.0;
    for (int i = 0; i < n_blocks; ++i) {
        random_gaussian(x, c->block);
        c->quantize(x, q, c->block);
        c->dequantize(q, y, c->block);
        for (int j = 0; j < c->block; ++j) {
            error += ((double) y[j] - x[j]) * ((double) y[j] - x[j]);
            power += (double) x[j] * x[j];
        }
    }
    free(q);
    if (!(fabs(error / power / c->relative_mse - 1.0) <= 0.01)) {
        fail(c, "relative MSE on N(0, 1) is %.6f, not %.4f within 1 %%", error / power, c->relative_mse);
    }
    return error / power;
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s GOLDEN_FOLDER\n", argv[0]);
        return 2;
    }
    int failed = 0;
    for (int t = 0; t < N_TYPES; ++t) {
        const struct codec * c = NULL;
        for (int i = 0; i < N_CODECS; ++i) {
            c = codecs[i].type == all_types[t] ? &codecs[i] : c;
        }
        if (c == NULL) {
            fprintf(stderr, "FAIL %s: no row in codecs[] of %s\n", ggml_type_name(all_types[t]), __FILE__);
            failed++;
            continue;
        }
        n_failures   = 0;
        random_state = (uint64_t) c->type;
        check_golden(c, argv[1]);
        check_indices_f32(c);
        check_indices_f64(c);
        for (int n = 1; n <= 4096; n += n < 40 ? 1 : n / 3) {
            check_rows(c, n);
        }
        check_rows(c, 4096);
        check_non_finite(c);
        check_zero_bytes(c);
        check_scale_and_norm(c);
        check_sign_symmetry(c);
        check_idempotence(c);
        check_largest(c);
        const double mse = check_gaussian_error(c);
        if (n_failures > MAX_REPORTS) {
            fprintf(stderr, "FAIL %s: ... and %d more\n", c->name, n_failures - MAX_REPORTS);
        }
        printf("%-10s %s, relative MSE on N(0, 1) %.5f\n", c->name, n_failures == 0 ? "ok" : "FAILED", mse);
        failed += n_failures != 0;
    }
    return failed != 0;
}
