// Scalar reference codecs. Readable first: speed lives in the attention kernels, which are tested against this.

#include "turbokv-quants.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "ggml-impl.h"
#include "turbokv-tables.h"

#define TURBO_MAX_BLOCK 128

static const float TURBO_FP16_MAX = 65504.0f;

// Finds the level index of each of the n values of a block and returns its scale d.
// Sums run in double from first to last: the numpy reference adds in the same order, bit for bit.
static ggml_half turbo_encode(const float * x, int n, const float * levels, const double * thresholds, int n_levels,
                              uint8_t * index) {
    double sum = 0.0;
    for (int j = 0; j < n; ++j) {
        const double v = (double) x[j];
        sum += v * v;
    }
    const double norm = sqrt(sum);  // finite floats cannot overflow a double here

    if (!isfinite(norm) || norm == 0.0) {
        memset(index, 0, n);
        return GGML_FP32_TO_FP16(norm == 0.0 ? 0.0f : NAN);
    }

    const double gain       = sqrt((double) n) / norm;
    double       sum_levels = 0.0;
    for (int j = 0; j < n; ++j) {
        const double u = (double) x[j] * gain;
        int          i = 0;
        for (int t = 0; t < n_levels - 1; ++t) {
            i += thresholds[t] < u;
        }
        index[j]           = i;
        const double level = (double) levels[i];
        sum_levels += level * level;
    }

    const float d = (float) (norm / sqrt(sum_levels));
    return GGML_FP32_TO_FP16(d < TURBO_FP16_MAX ? d : TURBO_FP16_MAX);
}

// Packs bits [shift, shift + bits) of n indices into a plane: field k of byte j is value j + k*bytes.
static inline void turbo_pack(uint8_t * plane, int bits, int shift, const uint8_t * index, int n) {
    const int bytes = n * bits / 8;
    const int mask  = (1 << bits) - 1;
    for (int j = 0; j < bytes; ++j) {
        int packed = 0;
        for (int k = 0; k < 8 / bits; ++k) {
            packed |= ((index[j + k * bytes] >> shift) & mask) << (k * bits);
        }
        plane[j] = packed;
    }
}

// The inverse of turbo_pack for one plane (turbo4) and for the planes of 2 and 1 bits (turbo3).
static inline void turbo4_indices(const uint8_t * qs, uint8_t * index, int n) {
    for (int j = 0; j < n / 2; ++j) {
        index[j]         = qs[j] & 15;
        index[j + n / 2] = qs[j] >> 4;
    }
}

static inline void turbo3_indices(const uint8_t * ql, const uint8_t * qh, uint8_t * index, int n) {
    const uint64_t ones = 0x0101010101010101;  // eight bytes at a time: every shift stays inside its byte
    for (int j = 0; j < n / 4; j += 8) {
        uint64_t low;
        uint64_t high;
        memcpy(&low, ql + j, 8);
        memcpy(&high, qh + j % (n / 8), 8);
        high >>= j / (n / 8);  // the upper half of ql goes with the odd fields of qh
        for (int k = 0; k < 4; ++k) {
            const uint64_t i = ((low >> (2 * k)) & (3 * ones)) | (((high >> (2 * k)) & ones) << 2);
            memcpy(index + k * (n / 4) + j, &i, 8);
        }
    }
}

static inline void turbo_decode(const uint8_t * index, const float * levels, int n_levels, ggml_half scale, float * y,
                                int n) {
    const float d = GGML_FP16_TO_FP32(scale);
    float       scaled[16];
    for (int i = 0; i < n_levels; ++i) {
        scaled[i] = levels[i] * d;
    }
    for (int j = 0; j < n; ++j) {
        y[j] = scaled[index[j]];
    }
}

#define TURBOKV_DEFINE_TURBO3(name, qk)                                                                                \
    void quantize_row_##name##_ref(const float * GGML_RESTRICT x, block_##name * GGML_RESTRICT y, int64_t k) {         \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[TURBO_MAX_BLOCK];                                                                                \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            y[i].d = turbo_encode(x + i * (qk), qk, turbokv_lm8, turbokv_lm8_thresholds, 8, index);                    \
            turbo_pack(y[i].ql, 2, 0, index, qk);                                                                      \
            turbo_pack(y[i].qh, 1, 2, index, qk);                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    void dequantize_row_##name(const block_##name * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {             \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[TURBO_MAX_BLOCK];                                                                                \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            turbo3_indices(x[i].ql, x[i].qh, index, qk);                                                               \
            turbo_decode(index, turbokv_lm8, 8, x[i].d, y + i * (qk), qk);                                             \
        }                                                                                                              \
    }

#define TURBOKV_DEFINE_TURBO4(name, qk)                                                                                \
    void quantize_row_##name##_ref(const float * GGML_RESTRICT x, block_##name * GGML_RESTRICT y, int64_t k) {         \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[TURBO_MAX_BLOCK];                                                                                \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            y[i].d = turbo_encode(x + i * (qk), qk, turbokv_lm16, turbokv_lm16_thresholds, 16, index);                 \
            turbo_pack(y[i].qs, 4, 0, index, qk);                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    void dequantize_row_##name(const block_##name * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {             \
        assert(k % (qk) == 0);                                                                                         \
        uint8_t index[TURBO_MAX_BLOCK];                                                                                \
        for (int64_t i = 0; i < k / (qk); ++i) {                                                                       \
            turbo4_indices(x[i].qs, index, qk);                                                                        \
            turbo_decode(index, turbokv_lm16, 16, x[i].d, y + i * (qk), qk);                                           \
        }                                                                                                              \
    }

TURBOKV_DEFINE_TURBO3(turbo3, QK_TURBO3)
TURBOKV_DEFINE_TURBO3(turbo3_64, QK_TURBO3_64)
TURBOKV_DEFINE_TURBO4(turbo4, QK_TURBO4)
TURBOKV_DEFINE_TURBO4(turbo4_64, QK_TURBO4_64)

size_t turbokv_quantize(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t n_per_row) {
    ggml_get_type_traits(type)->from_float_ref(src, dst, nrows * n_per_row);
    return nrows * ggml_row_size(type, n_per_row);
}
