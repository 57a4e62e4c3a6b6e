// The rotation inside tbqN, in float: y = H (s * x) / sqrt(n) over SRHT_SIZE values, and back. Signs and size: spec.py.

#pragma once

#include <stdbool.h>

#include "turbokv-tables.h"

static inline bool srht_negates(int j) {
    return (turbokv_srht_signs[j / 32] >> (j % 32)) & 1;
}

// Butterflies of all pairs of values that are `half` apart.
static inline void srht_butterflies(float * v, int half) {
    for (int i = 0; i < TURBOKV_SRHT_SIZE; i += 2 * half) {
        for (int j = i; j < i + half; ++j) {
            const float low  = v[j];
            const float high = v[j + half];
            v[j]             = low + high;
            v[j + half]      = low - high;
        }
    }
}

// Unnormalized Walsh-Hadamard transform in natural order, in place: butterflies at distance 1, 2, 4, .. 64. Compilers
// vectorize distances of 8 and more; so the first three are taken on the transposed block, where they are 16 times as
// long. Additions only: the same bits wherever the distances come in this order.
static inline void srht_hadamard(float * v) {
    enum { ROWS = TURBOKV_SRHT_SIZE / 8 };
    float t[TURBOKV_SRHT_SIZE];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < 8; ++j) {
            t[j * ROWS + i] = v[i * 8 + j];
        }
    }
    srht_butterflies(t, 1 * ROWS);
    srht_butterflies(t, 2 * ROWS);
    srht_butterflies(t, 4 * ROWS);
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < 8; ++j) {
            v[i * 8 + j] = t[j * ROWS + i];
        }
    }
    srht_butterflies(v, 8);
    srht_butterflies(v, 16);
    srht_butterflies(v, 32);
    srht_butterflies(v, 64);
}

static inline void turbokv_srht(float * v) {
    for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
        v[j] *= srht_negates(j) ? -TURBOKV_SRHT_SCALE : TURBOKV_SRHT_SCALE;
    }
    srht_hadamard(v);
}

static inline void turbokv_srht_inverse(float * v) {
    srht_hadamard(v);
    for (int j = 0; j < TURBOKV_SRHT_SIZE; ++j) {
        v[j] *= srht_negates(j) ? -TURBOKV_SRHT_SCALE : TURBOKV_SRHT_SCALE;
    }
}
