// from_float is the reference encoder, compiled for the instruction set of the CPU variant. vec_dot is correct first:
// each block is decoded by the reference codec, then multiplied with the q8_0 row in float.

#include "turbokv-cpu.h"

#include <assert.h>

#include "ggml-impl.h"
#include "turbokv-encode.h"

// Dot product of n decoded floats (n a multiple of QK8_0) with q8_0 blocks. One sum per lane: a single sum could
// not be vectorized without reordering float additions.
static inline float turbo_dot_q8_0(const float * x, const block_q8_0 * y, int n) {
    float lanes[QK8_0] = { 0.0f };
    for (int b = 0; b < n / QK8_0; ++b) {
        const float d = GGML_FP16_TO_FP32(y[b].d);
        for (int j = 0; j < QK8_0; ++j) {
            lanes[j] += d * (float) y[b].qs[j] * x[b * QK8_0 + j];
        }
    }
    float sum = 0.0f;
    for (int j = 0; j < QK8_0; ++j) {
        sum += lanes[j];
    }
    return sum;
}

#define TURBOKV_CODEC(name, qk, bits, packing, srht, table)                                                            \
    void quantize_row_##name(const float * GGML_RESTRICT x, void * GGML_RESTRICT vy, int64_t k) {                      \
        block_##name * y = vy;                                                                                         \
        TURBOKV_ENCODE_ROW(x, y, k, qk, bits, packing, srht, table);                                                   \
    }                                                                                                                  \
    void ggml_vec_dot_##name##_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy,          \
                                    size_t by, int nrc) {                                                              \
        assert(n % (qk) == 0);                                                                                         \
        assert(nrc == 1);                                                                                              \
        (void) bs;                                                                                                     \
        (void) bx;                                                                                                     \
        (void) by;                                                                                                     \
        (void) nrc;                                                                                                    \
        const block_##name * x   = vx;                                                                                 \
        const block_q8_0 *   y   = vy;                                                                                 \
        float                sum = 0.0f;                                                                               \
        for (int i = 0; i < n / (qk); ++i) {                                                                           \
            float values[qk];                                                                                          \
            dequantize_row_##name(x + i, values, qk);                                                                  \
            sum += turbo_dot_q8_0(values, y + i * ((qk) / QK8_0), qk);                                                 \
        }                                                                                                              \
        *s = sum;                                                                                                      \
    }
#include "turbokv-codec-list.inc"
