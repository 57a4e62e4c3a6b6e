// Written by scripts/generate.py from python/turbokv/spec.py. Do not edit.

#pragma once

#include <stdint.h>

#ifndef TURBOKV_TABLE
#    define TURBOKV_TABLE static const  // cuda/codec.cuh puts the arrays into the device's memory
#endif

// Levels for N(0, 1) and the thresholds between them
TURBOKV_TABLE float  turbokv_lm4[4] = { -1.5104176f, -0.45278004f, 0.45278004f, 1.5104176f };
TURBOKV_TABLE double turbokv_lm4_thresholds[3] = { -0.98159882, 0.0, 0.98159882 };
TURBOKV_TABLE int8_t turbokv_lm4_int8[16] = { -30, -9, 9, 30, -30, -9, 9, 30, -30, -9, 9, 30, -30, -9, 9, 30 };

// Levels for N(0, 1) and the thresholds between them
TURBOKV_TABLE float  turbokv_lm8[8] = { -2.1519456f, -1.3439093f, -0.7560053f, -0.24509418f, 0.24509418f, 0.7560053f, 1.3439093f, 2.1519456f };
TURBOKV_TABLE double turbokv_lm8_thresholds[7] = { -1.74792745, -1.0499573, -0.50054974, 0.0, 0.50054974, 1.0499573, 1.74792745 };
TURBOKV_TABLE int8_t turbokv_lm8_int8[16] = { -88, -55, -31, -10, 10, 31, 55, 88, -88, -55, -31, -10, 10, 31, 55, 88 };

// Levels for N(0, 1) and the thresholds between them
TURBOKV_TABLE float  turbokv_lm16[16] = { -2.7325895f, -2.0690172f, -1.6180464f, -1.2562312f, -0.94234043f, -0.65675914f, -0.3880483f, -0.12839504f, 0.12839504f, 0.3880483f, 0.65675914f, 0.94234043f, 1.2562312f, 1.6180464f, 2.0690172f, 2.7325895f };
TURBOKV_TABLE double turbokv_lm16_thresholds[15] = { -2.40080335, -1.8435318, -1.4371388, -1.099285815, -0.799549785, -0.52240372, -0.25822167, 0.0, 0.25822167, 0.52240372, 0.799549785, 1.099285815, 1.4371388, 1.8435318, 2.40080335 };
TURBOKV_TABLE int8_t turbokv_lm16_int8[16] = { -104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104 };

// Levels for N(0, 1) and the thresholds between them
TURBOKV_TABLE float  turbokv_tbq3[8] = { -2.15195f, -1.34391f, -0.75601f, -0.24509f, 0.24509f, 0.75601f, 1.34391f, 2.15195f };
TURBOKV_TABLE double turbokv_tbq3_thresholds[7] = { -1.7479, -1.05, -0.5006, 0.0, 0.5006, 1.05, 1.7479 };
TURBOKV_TABLE int8_t turbokv_tbq3_int8[16] = { -88, -55, -31, -10, 10, 31, 55, 88, -88, -55, -31, -10, 10, 31, 55, 88 };

// Of the rotation inside tbqN: what the values are multiplied with before the transform
#define TURBOKV_SRHT_SIZE  128
#define TURBOKV_SRHT_SCALE 0.088388346f // 1 / sqrt(128)
TURBOKV_TABLE float turbokv_srht_signs[TURBOKV_SRHT_SIZE] = { -1, 1, 1, -1, -1, 1, -1, -1, 1, -1, -1, 1, 1, 1, -1, -1, -1, 1, 1, 1, -1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1, -1, -1, 1, -1, 1, 1, 1, 1, -1, 1, -1, 1, -1, 1, -1, 1, 1, -1, -1, -1, -1, 1, 1, -1, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, -1, -1, 1, -1, -1, 1, -1, -1, 1, 1, -1, 1, 1, -1, -1, 1, 1, 1, -1, 1, -1, -1, 1, -1, 1, 1, 1, -1, 1, -1, -1, -1, -1, 1, 1, 1, -1, 1, 1, -1, -1, -1, 1, 1, 1, -1, -1, -1, 1, -1, -1, 1, -1, 1 };
