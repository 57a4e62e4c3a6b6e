// Written by scripts/generate.py from python/turbokv/spec.py. Do not edit.

#pragma once

// Lloyd-Max levels of N(0, 1) and the midpoints between them
static const float  turbokv_lm8[8] = { -2.1519456f, -1.3439093f, -0.7560053f, -0.24509418f, 0.24509418f, 0.7560053f, 1.3439093f, 2.1519456f };
static const double turbokv_lm8_thresholds[7] = { -1.74792745, -1.0499573, -0.50054974, 0.0, 0.50054974, 1.0499573, 1.74792745 };

// Lloyd-Max levels of N(0, 1) and the midpoints between them
static const float  turbokv_lm16[16] = { -2.7325895f, -2.0690172f, -1.6180464f, -1.2562312f, -0.94234043f, -0.65675914f, -0.3880483f, -0.12839504f, 0.12839504f, 0.3880483f, 0.65675914f, 0.94234043f, 1.2562312f, 1.6180464f, 2.0690172f, 2.7325895f };
static const double turbokv_lm16_thresholds[15] = { -2.40080335, -1.8435318, -1.4371388, -1.099285815, -0.799549785, -0.52240372, -0.25822167, 0.0, 0.25822167, 0.52240372, 0.799549785, 1.099285815, 1.4371388, 1.8435318, 2.40080335 };
