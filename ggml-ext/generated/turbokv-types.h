// Written by scripts/generate.py from python/turbokv/spec.py. Do not edit.
// Needs ggml_half: include after ggml-common.h.

#pragma once

#include <assert.h>
#include <stdint.h>

// turbo2/1 b128 u2:qs f16:d cb=lm4: 2.125 bits per value
#define QK_TURBO2 128

typedef struct {
    uint8_t qs[QK_TURBO2 * 2 / 8];
    ggml_half d;
} block_turbo2;

static_assert(sizeof(block_turbo2) == 34, "wrong turbo2 block size/padding");

// turbo2_64/1 b64 u2:qs f16:d cb=lm4: 2.25 bits per value
#define QK_TURBO2_64 64

typedef struct {
    uint8_t qs[QK_TURBO2_64 * 2 / 8];
    ggml_half d;
} block_turbo2_64;

static_assert(sizeof(block_turbo2_64) == 18, "wrong turbo2_64 block size/padding");

// turbo3/1 b128 u2:ql u1:qh f16:d cb=lm8: 3.125 bits per value
#define QK_TURBO3 128

typedef struct {
    uint8_t ql[QK_TURBO3 * 2 / 8];
    uint8_t qh[QK_TURBO3 * 1 / 8];
    ggml_half d;
} block_turbo3;

static_assert(sizeof(block_turbo3) == 50, "wrong turbo3 block size/padding");

// turbo3_64/1 b64 u2:ql u1:qh f16:d cb=lm8: 3.25 bits per value
#define QK_TURBO3_64 64

typedef struct {
    uint8_t ql[QK_TURBO3_64 * 2 / 8];
    uint8_t qh[QK_TURBO3_64 * 1 / 8];
    ggml_half d;
} block_turbo3_64;

static_assert(sizeof(block_turbo3_64) == 26, "wrong turbo3_64 block size/padding");

// turbo4/1 b128 u4:qs f16:d cb=lm16: 4.125 bits per value
#define QK_TURBO4 128

typedef struct {
    uint8_t qs[QK_TURBO4 * 4 / 8];
    ggml_half d;
} block_turbo4;

static_assert(sizeof(block_turbo4) == 66, "wrong turbo4 block size/padding");

// turbo4_64/1 b64 u4:qs f16:d cb=lm16: 4.25 bits per value
#define QK_TURBO4_64 64

typedef struct {
    uint8_t qs[QK_TURBO4_64 * 4 / 8];
    ggml_half d;
} block_turbo4_64;

static_assert(sizeof(block_turbo4_64) == 34, "wrong turbo4_64 block size/padding");

// tbq2/1 b128 s2:qs f16:d cb=lm4 rot=srht: 2.125 bits per value
#define QK_TBQ2 128

typedef struct {
    uint8_t qs[QK_TBQ2 * 2 / 8];
    ggml_half d;
} block_tbq2;

static_assert(sizeof(block_tbq2) == 34, "wrong tbq2 block size/padding");

// tbq3/1 b128 s3:qs f16:d cb=tbq3 rot=srht: 3.125 bits per value
#define QK_TBQ3 128

typedef struct {
    uint8_t qs[QK_TBQ3 * 3 / 8];
    ggml_half d;
} block_tbq3;

static_assert(sizeof(block_tbq3) == 50, "wrong tbq3 block size/padding");

// tbq4/1 b128 s4:qs f16:d cb=lm16 rot=srht: 4.125 bits per value
#define QK_TBQ4 128

typedef struct {
    uint8_t qs[QK_TBQ4 * 4 / 8];
    ggml_half d;
} block_tbq4;

static_assert(sizeof(block_tbq4) == 66, "wrong tbq4 block size/padding");
