// The vector operations of the CPU attention, once per instruction set: AVX-512 with VNNI (16 lanes of 32 bits), AVX2
// (8), NEON (4), plain C (1). The instruction set is that of the compilation: ggml builds one library per CPU variant
// and picks one when it loads.
//
// Every operation gives the same bits on all of them: integers are exact, floats are rounded after each operation
// (no fused multiply-add; the sources that include this are compiled with -ffp-contract=off). vf_fma is the one
// exception and says so. TURBOKV_SIMD_SCALAR forces plain C, for tests.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ggml-impl.h"
#include "turbokv-inline.h"

#if defined(TURBOKV_SIMD_SCALAR)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#    define TURBOKV_SIMD_AVX512
#elif defined(__AVX2__) && defined(__F16C__)
#    define TURBOKV_SIMD_AVX2
#elif defined(__ARM_NEON) && defined(__aarch64__)
#    define TURBOKV_SIMD_NEON
#endif

#if defined(TURBOKV_SIMD_NEON)
#    include <arm_neon.h>
#elif !defined(TURBOKV_SIMD_SCALAR) && (defined(__SSE2__) || defined(_M_X64))
#    define TURBOKV_SIMD_SSE2
#    include <immintrin.h>
#endif

// K bytes carry this offset: vpdpbusd wants its first factor unsigned.
#if defined(TURBOKV_SIMD_AVX512)
#    define TURBOKV_K_OFFSET 128
#else
#    define TURBOKV_K_OFFSET 0
#endif

// Accumulators stay in registers only when the loops over them are unrolled.
#if defined(__GNUC__)
#    define TURBOKV_UNROLL _Pragma("GCC unroll 8")
#else
#    define TURBOKV_UNROLL
#endif

// vi: lanes of uint32_t or of four bytes. vf: lanes of float. vt: a table of 16 bytes.
//
// vi_lookup(t, i)      each byte of i, 0..15, is replaced by that byte of the table
// vi_dot_k(a, k, q)    a + dot product of the lane's four bytes: k int8 + TURBOKV_K_OFFSET, q int8 in [-127, 127]
// vi_dot_v(a, p, v)    a + dot product of the lane's four bytes: p in [0, 127], v int8
// vi_round(x)          to the nearest integer, ties to even; |x| < 2^22, otherwise any value
// vf_max(a, b)         b where one of them is NaN
// vf_select_lt         a < b ? x : y; y where one of them is NaN
// vf_half(p)           VEC_LANES fp16 values from memory
// vi_store_bytes(p, x) the low byte of every lane to memory
// vf_reduce_max        the largest lane; any of them where one is NaN
// vf_reduce_add        lanes i and i + VEC_LANES / 2 are added, and so on with the halves

// clang-format off: one operation, one line

#if defined(TURBOKV_SIMD_AVX512) || defined(TURBOKV_SIMD_AVX2)
static inline float reduce_max_128(__m128 x) {
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline float reduce_add_128(__m128 x) {
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
#endif

#if defined(TURBOKV_SIMD_AVX512)

#    define VEC_LANES 16
typedef __m512i vi;
typedef __m512  vf;
typedef __m512i vt;

static inline vi vi_load(const void * p) { return _mm512_loadu_si512(p); }
static inline void vi_store(void * p, vi x) { _mm512_storeu_si512(p, x); }
static inline vi vi_set1(uint32_t x) { return _mm512_set1_epi32((int) x); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
#    define vi_shl(x, n) _mm512_slli_epi32(x, n)
#    define vi_shr(x, n) _mm512_srli_epi32(x, n)
static inline vt vt_load(const int8_t * p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)); }
static inline vi vi_lookup(vt t, vi i) { return _mm512_shuffle_epi8(t, i); }
static inline vi dot_u8_s8(vi a, vi u, vi s) {
#    if defined(__GNUC__) && !defined(__clang__)
    // GCC 12 copies the accumulator around the intrinsic, twice per use, and runs out of registers: half the speed.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(u), "v"(s));
    return a;
#    else
    return _mm512_dpbusd_epi32(a, u, s);
#    endif
}
static inline vi vi_dot_k(vi a, vi k, vi q) { return dot_u8_s8(a, k, q); }
static inline vi vi_dot_v(vi a, vi p, vi v) { return dot_u8_s8(a, p, v); }
static inline void vi_store_bytes(uint8_t * p, vi x) { _mm_storeu_si128((__m128i *) p, _mm512_cvtepi32_epi8(x)); }

static inline vf vf_load(const float * p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float * p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_select_lt(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline float vf_reduce_max(vf x) {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return reduce_max_128(_mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float vf_reduce_add(vf x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return reduce_add_128(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline vf vf_from_int(vi x) { return _mm512_cvtepi32_ps(x); }
static inline vi vi_round(vf x) { return _mm512_cvtps_epi32(x); }
static inline vf vf_bits(vi x) { return _mm512_castsi512_ps(x); }
static inline vi vi_from_bits(vf x) { return _mm512_castps_si512(x); }
static inline vf vf_half(const void * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }

#elif defined(TURBOKV_SIMD_AVX2)

#    define VEC_LANES 8
typedef __m256i vi;
typedef __m256  vf;
typedef __m256i vt;

static inline vi vi_load(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }
static inline void vi_store(void * p, vi x) { _mm256_storeu_si256((__m256i *) p, x); }
static inline vi vi_set1(uint32_t x) { return _mm256_set1_epi32((int) x); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
#    define vi_shl(x, n) _mm256_slli_epi32(x, n)
#    define vi_shr(x, n) _mm256_srli_epi32(x, n)
static inline vt vt_load(const int8_t * p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)); }
static inline vi vi_lookup(vt t, vi i) { return _mm256_shuffle_epi8(t, i); }

// u: [0, 128], s: int8; the sums of two products fit into 16 bits because |s| <= 127 where u reaches 128.
static inline vi dot_u8_s8(vi a, vi u, vi s) {
#    if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(a, u, s);
#    else
    const vi pairs = _mm256_maddubs_epi16(u, s);
    return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#    endif
}

static inline vi vi_dot_k(vi a, vi k, vi q) { return dot_u8_s8(a, _mm256_abs_epi8(k), _mm256_sign_epi8(q, k)); }
static inline vi vi_dot_v(vi a, vi p, vi v) { return dot_u8_s8(a, p, v); }
static inline void vi_store_bytes(uint8_t * p, vi x) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *) p, _mm_packus_epi16(words, words));
}

static inline vf vf_load(const float * p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float * p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) {
#    if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#    else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#    endif
}
static inline vf vf_select_lt(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline float vf_reduce_max(vf x) {
    return reduce_max_128(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline float vf_reduce_add(vf x) {
    return reduce_add_128(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline vf vf_from_int(vi x) { return _mm256_cvtepi32_ps(x); }
static inline vi vi_round(vf x) { return _mm256_cvtps_epi32(x); }
static inline vf vf_bits(vi x) { return _mm256_castsi256_ps(x); }
static inline vi vi_from_bits(vf x) { return _mm256_castps_si256(x); }
static inline vf vf_half(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }

#elif defined(TURBOKV_SIMD_NEON)

#    define VEC_LANES 4
typedef uint32x4_t  vi;
typedef float32x4_t vf;
typedef int8x16_t   vt;

static inline vi vi_load(const void * p) { return vreinterpretq_u32_u8(vld1q_u8((const uint8_t *) p)); }
static inline void vi_store(void * p, vi x) { vst1q_u8((uint8_t *) p, vreinterpretq_u8_u32(x)); }
static inline vi vi_set1(uint32_t x) { return vdupq_n_u32(x); }
static inline vi vi_and(vi a, vi b) { return vandq_u32(a, b); }
static inline vi vi_or(vi a, vi b) { return vorrq_u32(a, b); }
static inline vi vi_xor(vi a, vi b) { return veorq_u32(a, b); }
static inline vi vi_add(vi a, vi b) { return vaddq_u32(a, b); }
#    define vi_shl(x, n) vshlq_u32(x, vdupq_n_s32(n))
#    define vi_shr(x, n) vshlq_u32(x, vdupq_n_s32(-(n)))
static inline vt vt_load(const int8_t * p) { return vld1q_s8(p); }
static inline vi vi_lookup(vt t, vi i) { return vreinterpretq_u32_s8(vqtbl1q_s8(t, vreinterpretq_u8_u32(i))); }

static inline vi dot_s8_s8(vi a, vi x, vi y) {
    const int8x16_t xb = vreinterpretq_s8_u32(x);
    const int8x16_t yb = vreinterpretq_s8_u32(y);
#    if defined(__ARM_FEATURE_DOTPROD)
    return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(a), xb, yb));
#    else
    const int32x4_t low  = vpaddlq_s16(vmull_s8(vget_low_s8(xb), vget_low_s8(yb)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(xb, yb));
    return vaddq_u32(a, vreinterpretq_u32_s32(vpaddq_s32(low, high)));
#    endif
}

static inline vi vi_dot_k(vi a, vi k, vi q) { return dot_s8_s8(a, k, q); }
static inline vi vi_dot_v(vi a, vi p, vi v) { return dot_s8_s8(a, p, v); }
static inline void vi_store_bytes(uint8_t * p, vi x) {
    const uint16x4_t words = vmovn_u32(x);
    vst1_lane_u32((uint32_t *) (void *) p, vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
}

static inline vf vf_load(const float * p) { return vld1q_f32(p); }
static inline void vf_store(float * p, vf x) { vst1q_f32(p, x); }
static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_select_lt(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
static inline float vf_reduce_max(vf x) { return vmaxvq_f32(x); }
static inline float vf_reduce_add(vf x) {
    const float32x2_t s = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}
static inline vf vf_from_int(vi x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }
static inline vi vi_round(vf x) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(x)); }
static inline vf vf_bits(vi x) { return vreinterpretq_f32_u32(x); }
static inline vi vi_from_bits(vf x) { return vreinterpretq_u32_f32(x); }
static inline vf vf_half(const void * p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *) p))); }

#else

#    define VEC_LANES 1
typedef uint32_t vi;
typedef float    vf;
typedef const int8_t * vt;

static inline vi vi_load(const void * p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}
static inline void vi_store(void * p, vi x) { memcpy(p, &x, 4); }
static inline vi vi_set1(uint32_t x) { return x; }
static inline vi vi_and(vi a, vi b) { return a & b; }
static inline vi vi_or(vi a, vi b) { return a | b; }
static inline vi vi_xor(vi a, vi b) { return a ^ b; }
static inline vi vi_add(vi a, vi b) { return a + b; }
#    define vi_shl(x, n) ((x) << (n))
#    define vi_shr(x, n) ((x) >> (n))
static inline vt vt_load(const int8_t * p) { return p; }
static inline vi vi_lookup(vt t, vi i) {
    uint32_t r = 0;
    for (int b = 0; b < 32; b += 8) {
        r |= (uint32_t) (uint8_t) t[(i >> b) & 15] << b;
    }
    return r;
}
static inline vi vi_dot_k(vi a, vi x, vi y) {
    int32_t sum = (int32_t) a;
    for (int b = 0; b < 32; b += 8) {
        sum += (int8_t) (x >> b) * (int8_t) (y >> b);
    }
    return (uint32_t) sum;
}
static inline vi vi_dot_v(vi a, vi p, vi v) { return vi_dot_k(a, p, v); }
static inline void vi_store_bytes(uint8_t * p, vi x) { *p = (uint8_t) x; }

static inline vf vf_load(const float * p) { return *p; }
static inline void vf_store(float * p, vf x) { *p = x; }
static inline vf vf_set1(float x) { return x; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_select_lt(vf a, vf b, vf x, vf y) { return a < b ? x : y; }
static inline float vf_reduce_max(vf x) { return x; }
static inline float vf_reduce_add(vf x) { return x; }
static inline vf vf_from_int(vi x) { return (float) (int32_t) x; }
static inline vi vi_round(vf x) {
    // Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded as the mode says, to the nearest.
    return fabsf(x) < 4194304.0f ? (uint32_t) (int32_t) ((x + 12582912.0f) - 12582912.0f) : 0;
}
static inline vf vf_bits(vi x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static inline vi vi_from_bits(vf x) {
    uint32_t i;
    memcpy(&i, &x, 4);
    return i;
}
static inline vf vf_half(const void * p) {
    ggml_fp16_t h;
    memcpy(&h, p, 2);
    return GGML_FP16_TO_FP32(h);
}

#endif

// clang-format on

// ---- 128-bit shuffles that bring packed rows into lanes

// 16 bytes from `column` on of each of four rows as a 4x4 matrix of words, transposed: word c of row r goes to out[c *
// stride + r].
static inline void transpose_words(const uint8_t * const * row, int column, uint32_t * out, int stride) {
#if defined(TURBOKV_SIMD_SSE2)
    const __m128i r0 = _mm_loadu_si128((const __m128i *) (row[0] + column));
    const __m128i r1 = _mm_loadu_si128((const __m128i *) (row[1] + column));
    const __m128i r2 = _mm_loadu_si128((const __m128i *) (row[2] + column));
    const __m128i r3 = _mm_loadu_si128((const __m128i *) (row[3] + column));
    const __m128i a  = _mm_unpacklo_epi32(r0, r1);
    const __m128i b  = _mm_unpackhi_epi32(r0, r1);
    const __m128i c  = _mm_unpacklo_epi32(r2, r3);
    const __m128i d  = _mm_unpackhi_epi32(r2, r3);
    _mm_storeu_si128((__m128i *) (out + 0 * stride), _mm_unpacklo_epi64(a, c));
    _mm_storeu_si128((__m128i *) (out + 1 * stride), _mm_unpackhi_epi64(a, c));
    _mm_storeu_si128((__m128i *) (out + 2 * stride), _mm_unpacklo_epi64(b, d));
    _mm_storeu_si128((__m128i *) (out + 3 * stride), _mm_unpackhi_epi64(b, d));
#elif defined(TURBOKV_SIMD_NEON)
    const uint32x4_t r0 = vi_load(row[0] + column);
    const uint32x4_t r1 = vi_load(row[1] + column);
    const uint32x4_t r2 = vi_load(row[2] + column);
    const uint32x4_t r3 = vi_load(row[3] + column);
    const uint64x2_t a  = vreinterpretq_u64_u32(vzip1q_u32(r0, r1));
    const uint64x2_t b  = vreinterpretq_u64_u32(vzip2q_u32(r0, r1));
    const uint64x2_t c  = vreinterpretq_u64_u32(vzip1q_u32(r2, r3));
    const uint64x2_t d  = vreinterpretq_u64_u32(vzip2q_u32(r2, r3));
    vi_store(out + 0 * stride, vreinterpretq_u32_u64(vzip1q_u64(a, c)));
    vi_store(out + 1 * stride, vreinterpretq_u32_u64(vzip2q_u64(a, c)));
    vi_store(out + 2 * stride, vreinterpretq_u32_u64(vzip1q_u64(b, d)));
    vi_store(out + 3 * stride, vreinterpretq_u32_u64(vzip2q_u64(b, d)));
#else
    for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 4; ++c) {
            memcpy(out + c * stride + r, row[r] + column + 4 * c, 4);
        }
    }
#endif
}

// 16 bytes from `column` on of each of four rows, interleaved: byte j of row r becomes byte r of out[j].
static inline void interleave_bytes(const uint8_t * const * row, int column, uint32_t * out) {
#if defined(TURBOKV_SIMD_SSE2)
    const __m128i r0 = _mm_loadu_si128((const __m128i *) (row[0] + column));
    const __m128i r1 = _mm_loadu_si128((const __m128i *) (row[1] + column));
    const __m128i r2 = _mm_loadu_si128((const __m128i *) (row[2] + column));
    const __m128i r3 = _mm_loadu_si128((const __m128i *) (row[3] + column));
    const __m128i a  = _mm_unpacklo_epi8(r0, r1);
    const __m128i b  = _mm_unpackhi_epi8(r0, r1);
    const __m128i c  = _mm_unpacklo_epi8(r2, r3);
    const __m128i d  = _mm_unpackhi_epi8(r2, r3);
    _mm_storeu_si128((__m128i *) (out + 0), _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128((__m128i *) (out + 4), _mm_unpackhi_epi16(a, c));
    _mm_storeu_si128((__m128i *) (out + 8), _mm_unpacklo_epi16(b, d));
    _mm_storeu_si128((__m128i *) (out + 12), _mm_unpackhi_epi16(b, d));
#elif defined(TURBOKV_SIMD_NEON)
    const uint8x16x4_t rows = { { vld1q_u8(row[0] + column), vld1q_u8(row[1] + column), vld1q_u8(row[2] + column),
                                  vld1q_u8(row[3] + column) } };
    vst4q_u8((uint8_t *) out, rows);
#else
    for (int j = 0; j < 16; ++j) {
        out[j] = row[0][column + j] | (uint32_t) row[1][column + j] << 8 | (uint32_t) row[2][column + j] << 16 |
                 (uint32_t) row[3][column + j] << 24;
    }
#endif
}

// 48 bytes into three planes of 16: byte 3*g + i goes to out[16*i + g].
static inline void split_triples(const uint8_t * in, uint8_t * out) {
#if defined(__AVX512VBMI__) && defined(TURBOKV_SIMD_AVX512)
    static const uint8_t from[64] = { 0, 3, 6, 9,  12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45,
                                      1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40, 43, 46,
                                      2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 44, 47 };
    const __mmask64      bytes    = 0x0000ffffffffffff;
    const __m512i        x        = _mm512_maskz_loadu_epi8(bytes, in);
    _mm512_mask_storeu_epi8(out, bytes, _mm512_permutexvar_epi8(_mm512_loadu_si512(from), x));
#elif defined(TURBOKV_SIMD_AVX512) || defined(TURBOKV_SIMD_AVX2)
    const __m128i a = _mm_loadu_si128((const __m128i *) in);
    const __m128i b = _mm_loadu_si128((const __m128i *) (in + 16));
    const __m128i c = _mm_loadu_si128((const __m128i *) (in + 32));
    for (int i = 0; i < 3; ++i) {
        // Where byte 3*g + i lies in a, b and c; -1 gives zero.
        static const int8_t from[3][3][16] = {
            { { 0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1 },
              { -1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14, -1, -1, -1, -1, -1 },
              { -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, 4, 7, 10, 13 } },
            { { 1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1 },
              { -1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1 },
              { -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14 } },
            { { 2, 5, 8, 11, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1 },
              { -1, -1, -1, -1, -1, 1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1 },
              { -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15 } },
        };
        const __m128i fa = _mm_loadu_si128((const __m128i *) from[i][0]);
        const __m128i fb = _mm_loadu_si128((const __m128i *) from[i][1]);
        const __m128i fc = _mm_loadu_si128((const __m128i *) from[i][2]);
        const __m128i ab = _mm_or_si128(_mm_shuffle_epi8(a, fa), _mm_shuffle_epi8(b, fb));
        _mm_storeu_si128((__m128i *) (out + 16 * i), _mm_or_si128(ab, _mm_shuffle_epi8(c, fc)));
    }
#elif defined(TURBOKV_SIMD_NEON)
    const uint8x16x3_t x = vld3q_u8(in);
    vst1q_u8(out, x.val[0]);
    vst1q_u8(out + 16, x.val[1]);
    vst1q_u8(out + 32, x.val[2]);
#else
    for (int g = 0; g < 16; ++g) {
        for (int i = 0; i < 3; ++i) {
            out[16 * i + g] = in[3 * g + i];
        }
    }
#endif
}
