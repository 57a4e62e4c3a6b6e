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

static inline void srht_hadamard(float * v) {
    for (int half = 1; half < TURBOKV_SRHT_SIZE; half *= 2) {
        srht_butterflies(v, half);
    }
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
