// One block of any of our types on the device: 128 or 64 values <-> bytes, one warp per block.
//
// Contract: encoding gives the bytes of turbokv-encode.h and decoding the floats of turbokv-quants.c, both to the bit.
// So sums have the order of the C code, encoding is in double, and no multiply-add is contracted. All 32 lanes of the
// warp call, with the same block. Blocks are aligned to two bytes. turbokv_codec_<type> says what a type is; rows of
// turbokv-codec-list.inc become such structs, so that a new type needs no edit here.

#pragma once

#include "common.cuh"
#include "ggml-cuda/convert.cuh"
#include "turbokv-types.h"

#define TURBOKV_TABLE [[maybe_unused]] static __device__ const
#include "turbokv-tables.h"

enum turbokv_packing { turbokv_packing_planes, turbokv_packing_stream };

#define TURBOKV_CODEC(name, qk_, bits_, packing_, srht_, table)                                                        \
    struct turbokv_codec_##name {                                                                                      \
        static constexpr int                    qk          = qk_;                                                     \
        static constexpr int                    bits        = bits_;                                                   \
        static constexpr int                    n_levels    = 1 << bits_;                                              \
        static constexpr int                    index_bytes = qk_ * bits_ / 8;                                         \
        static constexpr int                    block_bytes = sizeof(block_##name);                                    \
        static constexpr turbokv_packing        packing     = turbokv_packing_##packing_;                              \
        static constexpr bool                   srht        = srht_;                                                   \
        static __device__ __forceinline__ float level(int i) {                                                         \
            return table[i];                                                                                           \
        }                                                                                                              \
        static __device__ __forceinline__ double threshold(int i) {                                                    \
            return table##_thresholds[i];                                                                              \
        }                                                                                                              \
    };
#include "turbokv-codec-list.inc"
#undef TURBOKV_CODEC

// f(turbokv_codec_<type>()) of a type of ours.
template <typename F>
static auto turbokv_with_codec(ggml_type type, F && f) {
    switch (type) {
#define TURBOKV_TYPE(id, name)                                                                                         \
    case id:                                                                                                           \
        return f(turbokv_codec_##name());
#include "turbokv-type-list.inc"
#undef TURBOKV_TYPE
        default:
            GGML_ABORT("%s is no type of turbokv", ggml_type_name(type));
    }
}

static constexpr unsigned TURBOKV_ALL_LANES = 0xffffffff;

static __device__ __forceinline__ int turbokv_lane() {
    return threadIdx.x % WARP_SIZE;
}

// Butterfly with the lane at this distance: the lower lane keeps the sum, the upper one the difference.
template <typename real>
static __device__ __forceinline__ real turbokv_lane_butterfly(real v, int distance) {
    const real other = __shfl_xor_sync(TURBOKV_ALL_LANES, v, distance);
    return turbokv_lane() & distance ? other - v : v + other;
}

template <typename real>
static __device__ __forceinline__ void turbokv_butterfly(real & a, real & b) {
    const real difference = a - b;
    a                     = a + b;
    b                     = difference;
}

// ---- encoding. Lane l holds values l, l + 32, ..: x[k] is value l + 32*k, index[k] its level.

// Lane l < 16 sums the squares of values l, l + 16, ..; then the upper half of the lanes is added to the lower one.
template <int n>
static __device__ __forceinline__ double turbokv_norm_of_values(const float (&x)[n]) {
    double sum = 0.0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        const double own   = x[k];
        const double upper = __shfl_down_sync(TURBOKV_ALL_LANES, x[k], 16);
        sum                = __dadd_rn(sum, __dmul_rn(own, own));
        sum                = __dadd_rn(sum, __dmul_rn(upper, upper));
    }
#pragma unroll
    for (int half = 8; half > 0; half /= 2) {
        sum = __dadd_rn(sum, __shfl_down_sync(TURBOKV_ALL_LANES, sum, half));
    }
    return __dsqrt_rn(__shfl_sync(TURBOKV_ALL_LANES, sum, 0));
}

// Of a value whose magnitude is above m positive thresholds.
template <typename codec>
static __device__ __forceinline__ int turbokv_level_index(int m, bool positive) {
    return codec::n_levels / 2 + (positive ? m : ~m);
}

// Of floats, by the 32-bit keys of turbokv-encode.h: lane t finds the key of threshold t, all lanes compare with it.
template <typename codec, int n>
static __device__ __forceinline__ void turbokv_find_indices(const float (&x)[n], double norm, int (&index)[n]) {
    constexpr int n_positive = codec::n_levels / 2 - 1;
    const double  root       = __dsqrt_rn((double) codec::qk);
    const double  gain       = __ddiv_rn(root, norm);
    const double  inverse    = __ddiv_rn(norm, root);

    const double threshold = codec::threshold(codec::n_levels / 2 + min(turbokv_lane(), n_positive - 1));
    const float  nearest   = __double2float_rn(__dmul_rn(threshold, inverse));
    const double product   = __dmul_rn((double) nearest, gain);
    const int    own_key =
        (2 * __float_as_uint(nearest) + 1 - (product >= threshold) - (product > threshold)) ^ 0x80000000;

    int m[n] = {};
#pragma unroll
    for (int t = 0; t < n_positive; ++t) {
        const int key = __shfl_sync(TURBOKV_ALL_LANES, own_key, t);
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const unsigned bits = __float_as_uint(x[k]);
            m[k] += key < (int) ((bits << 1 | bits >> 31) ^ 0x80000000);
        }
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
        index[k] = turbokv_level_index<codec>(m[k], x[k] > 0.0f);
    }
}

// Of the rotated values, in double.
template <typename codec, int n>
static __device__ __forceinline__ void turbokv_find_indices_srht(const float (&x)[n], double norm, int (&index)[n]) {
    static_assert(codec::qk == TURBOKV_SRHT_SIZE && n == 4, "one rotation per block");
    double v[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
        v[k] = x[k] * turbokv_srht_signs[turbokv_lane() + WARP_SIZE * k];
    }
#pragma unroll
    for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            v[k] = turbokv_lane_butterfly(v[k], distance);
        }
    }
    turbokv_butterfly(v[0], v[1]);
    turbokv_butterfly(v[2], v[3]);
    turbokv_butterfly(v[0], v[2]);
    turbokv_butterfly(v[1], v[3]);

    const double gain = __ddiv_rn(1.0, norm);
#pragma unroll
    for (int k = 0; k < n; ++k) {
        const double    u    = __dmul_rn(v[k], gain);
        const long long bits = __double_as_longlong(u);
        // |u|, of a negative u the next number above it
        const double    key  = __longlong_as_double((bits & 0x7fffffffffffffffLL) + (bits < 0));
        int             m    = 0;
#pragma unroll
        for (int t = 0; t < codec::n_levels / 2 - 1; ++t) {
            m += codec::threshold(codec::n_levels / 2 + t) < key;
        }
        index[k] = turbokv_level_index<codec>(m, u > 0.0);
    }
}

// Count times square, summed from the smallest magnitude to the greatest: lane m counts magnitude m.
template <typename codec, int n>
static __device__ __forceinline__ double turbokv_norm_of_levels(const int (&index)[n]) {
    constexpr int half  = codec::n_levels / 2;
    const int     lane  = turbokv_lane();
    int           count = 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        const int magnitude = index[k] & half ? index[k] : ~index[k];
        unsigned  same      = TURBOKV_ALL_LANES;
#pragma unroll
        for (int bit = 0; bit < codec::bits - 1; ++bit) {
            const unsigned set = __ballot_sync(TURBOKV_ALL_LANES, magnitude >> bit & 1);
            same &= lane >> bit & 1 ? set : ~set;
        }
        count += __popc(same);
    }
    const double level = codec::level(half + lane % half);
    const double term  = __dmul_rn((double) count, __dmul_rn(level, level));
    double       sum   = 0.0;
#pragma unroll
    for (int m = 0; m < half; ++m) {
        sum = __dadd_rn(sum, __shfl_sync(TURBOKV_ALL_LANES, term, m));
    }
    return __dsqrt_rn(sum);
}

// Writes bits [shift, shift + bits) of the indices as a plane: field f of byte j is value j + f*bytes.
template <int bits, int n>
static __device__ __forceinline__ void turbokv_pack_plane(const int (&index)[n], int shift, uint8_t * plane) {
    constexpr int bytes            = n * WARP_SIZE * bits / 8;
    constexpr int per_lane         = bytes < WARP_SIZE ? 1 : bytes / WARP_SIZE;
    const int     lane             = turbokv_lane();
    unsigned      packed[per_lane] = {};
#pragma unroll
    for (int k = 0; k < n; ++k) {
        const int field = WARP_SIZE * k / bytes + (bytes < WARP_SIZE ? lane / bytes : 0);
        packed[k % per_lane] |= (index[k] >> shift & ((1 << bits) - 1)) << (field * bits);
    }
#pragma unroll
    for (int distance = bytes; distance < WARP_SIZE; distance *= 2) {  // lanes that share a byte
        packed[0] |= __shfl_xor_sync(TURBOKV_ALL_LANES, packed[0], distance);
    }
#pragma unroll
    for (int b = 0; b < per_lane; ++b) {
        if (lane < bytes) {
            plane[lane + WARP_SIZE * b] = packed[b];
        }
    }
}

// Eight indices, of neighbouring lanes, are `bits` bytes of the stream.
template <int bits, int n>
static __device__ __forceinline__ void turbokv_pack_stream(const int (&index)[n], uint8_t * qs) {
    const int lane  = turbokv_lane();
    const int place = lane % 8;
#pragma unroll
    for (int k = 0; k < n; ++k) {
        unsigned group = (unsigned) index[k] << (bits * place);
#pragma unroll
        for (int distance = 1; distance < 8; distance *= 2) {
            group |= __shfl_xor_sync(TURBOKV_ALL_LANES, group, distance);
        }
        if (place < bits) {
            qs[(WARP_SIZE * k + lane) / 8 * bits + place] = group >> (8 * place);
        }
    }
}

// The block of codec::qk neighbouring values, f32 or f16, to the bytes y.
template <typename codec, typename src_t>
static __device__ __forceinline__ void turbokv_encode_block(const src_t * values, uint8_t * y) {
    constexpr int n = codec::qk / WARP_SIZE;
    float         x[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
        x[k] = ggml_cuda_cast<float>(values[turbokv_lane() + WARP_SIZE * k]);
    }
    const double norm     = turbokv_norm_of_values(x);
    int          index[n] = {};
    uint16_t     d        = 0;
    if (!isfinite(norm)) {
        d = 0x7e00;  // NaN
    } else if (norm != 0.0) {
        if constexpr (codec::srht) {
            turbokv_find_indices_srht<codec>(x, norm, index);
        } else {
            turbokv_find_indices<codec>(x, norm, index);
        }
        const float scale = __double2float_rn(__ddiv_rn(norm, turbokv_norm_of_levels<codec>(index)));
        d                 = __half_as_ushort(__float2half_rn(fminf(scale, 65504.0f)));
    }
    if constexpr (codec::packing == turbokv_packing_stream) {
        turbokv_pack_stream<codec::bits>(index, y);
    } else if constexpr (codec::bits == 3) {
        turbokv_pack_plane<2>(index, 0, y);
        turbokv_pack_plane<1>(index, 2, y + codec::qk / 4);
    } else {
        turbokv_pack_plane<codec::bits>(index, 0, y);
    }
    if (turbokv_lane() == 0) {
        *(uint16_t *) (y + codec::index_bytes) = d;
    }
}

// ---- decoding. Lane l holds values 2*l + 64*h and the next one: pairs, which are written as one word.

template <typename codec>
struct turbokv_indices {
    int   index[codec::qk / 64][2];
    float d;
};

template <int qk, int bits>
static __device__ __forceinline__ void turbokv_unpack_plane(const uint8_t * plane, int shift,
                                                            int (&index)[qk / 64][2]) {
    constexpr int  bytes = qk * bits / 8;  // divides 64: both pairs of a lane stand in the same bytes
    const int      place = 2 * turbokv_lane();
    const unsigned word  = *(const uint16_t *) (plane + place % bytes);
#pragma unroll
    for (int h = 0; h < qk / 64; ++h) {
        const int field = (place / bytes + 64 * h / bytes) * bits;
        index[h][0] |= (word >> field & ((1 << bits) - 1)) << shift;
        index[h][1] |= (word >> (field + 8) & ((1 << bits) - 1)) << shift;
    }
}

template <typename codec>
static __device__ __forceinline__ turbokv_indices<codec> turbokv_load_indices(const uint8_t * x) {
    turbokv_indices<codec> in = {};
    if constexpr (codec::packing == turbokv_packing_stream) {
#pragma unroll
        for (int h = 0; h < codec::qk / 64; ++h) {
            const int       bit  = (2 * turbokv_lane() + 64 * h) * codec::bits;
            const uint8_t * qs   = x + bit / 8;  // of the last lane, the second byte is one of d
            const unsigned  word = (qs[0] | qs[1] << 8) >> (bit % 8);
            in.index[h][0]       = word & (codec::n_levels - 1);
            in.index[h][1]       = word >> codec::bits & (codec::n_levels - 1);
        }
    } else if constexpr (codec::bits == 3) {
        turbokv_unpack_plane<codec::qk, 2>(x, 0, in.index);
        turbokv_unpack_plane<codec::qk, 1>(x + codec::qk / 4, 2, in.index);
    } else {
        turbokv_unpack_plane<codec::qk, codec::bits>(x, 0, in.index);
    }
    in.d = __half2float(__ushort_as_half(*(const uint16_t *) (x + codec::index_bytes)));
    return in;
}

// A float, half or bfloat16 as bits: these shuffle on every architecture.
template <typename T>
static __device__ __forceinline__ unsigned turbokv_bits(T v) {
    if constexpr (sizeof(T) == 4) {
        return __float_as_uint(v);
    } else {
        uint16_t bits;
        memcpy(&bits, &v, sizeof(bits));
        return bits;
    }
}

template <bool known_aligned, typename T>
static __device__ __forceinline__ void turbokv_store_pair(T * y, unsigned a, unsigned b) {
    const bool aligned = known_aligned || (uintptr_t) y % (2 * sizeof(T)) == 0;
    if constexpr (sizeof(T) == 4) {
        if (aligned) {
            *(uint2 *) y = make_uint2(a, b);
        } else {
            ((uint32_t *) y)[0] = a;
            ((uint32_t *) y)[1] = b;
        }
    } else {
        if (aligned) {
            *(uint32_t *) y = a | b << 16;
        } else {
            ((uint16_t *) y)[0] = a;
            ((uint16_t *) y)[1] = b;
        }
    }
}

// Values in float, half or nv_bfloat16; the latter are the float rounded to nearest. `aligned`: y is, to a pair of
// them.
template <bool aligned = false, typename codec, typename T>
static __device__ __forceinline__ void turbokv_store_values(const turbokv_indices<codec> & in, T * y) {
    const int   lane  = turbokv_lane();
    const float level = codec::level(lane % codec::n_levels);
    if constexpr (codec::srht) {
        static_assert(codec::qk == TURBOKV_SRHT_SIZE, "one rotation per block");
        float v[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i / 2][i % 2] = __shfl_sync(TURBOKV_ALL_LANES, level, in.index[i / 2][i % 2]);
        }
        turbokv_butterfly(v[0][0], v[0][1]);
        turbokv_butterfly(v[1][0], v[1][1]);
#pragma unroll
        for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i / 2][i % 2] = turbokv_lane_butterfly(v[i / 2][i % 2], distance);
            }
        }
        turbokv_butterfly(v[0][0], v[1][0]);
        turbokv_butterfly(v[0][1], v[1][1]);
        const float factor = __fmul_rn(in.d, TURBOKV_SRHT_SCALE);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int      j = 2 * lane + 64 * h;
            const unsigned a =
                turbokv_bits(ggml_cuda_cast<T>(__fmul_rn(v[h][0], __fmul_rn(factor, turbokv_srht_signs[j]))));
            const unsigned b =
                turbokv_bits(ggml_cuda_cast<T>(__fmul_rn(v[h][1], __fmul_rn(factor, turbokv_srht_signs[j + 1]))));
            turbokv_store_pair<aligned>(y + j, a, b);
        }
    } else {
        const unsigned scaled = turbokv_bits(ggml_cuda_cast<T>(__fmul_rn(level, in.d)));
#pragma unroll
        for (int h = 0; h < codec::qk / 64; ++h) {
            const unsigned a = __shfl_sync(TURBOKV_ALL_LANES, scaled, in.index[h][0]);
            const unsigned b = __shfl_sync(TURBOKV_ALL_LANES, scaled, in.index[h][1]);
            turbokv_store_pair<aligned>(y + 2 * lane + 64 * h, a, b);
        }
    }
}
