// Included by flash-attn-decode-v-*.cu: the kernels for one format of V. At least one of K and V is ours; tbq3 has no
// blocks of 64 values.

#pragma once

#include <cmath>

#include "flash-attn-decode-instances.cuh"
#include "flash-attn-decode.cuh"

template <int D, int NT, kv_format KF, kv_format VF>
static decode_launch decode_launch_of() {
    constexpr bool exists =
        (kv_format_is_ours(KF) || kv_format_is_ours(VF)) && (D != 64 || (KF != KV_STREAM3 && VF != KV_STREAM3));
    if constexpr (exists) {
        return { flash_attn_decode<D, NT, KF, VF>, decode_shared<decode_tile<D, NT, KF, VF>>::all };
    } else {
        return { nullptr, nullptr };
    }
}

template <int D, int NT, kv_format VF>
static decode_launch decode_launch_by_k(kv_format k) {
    switch (k) {
        case KV_PLANE2:
            return decode_launch_of<D, NT, KV_PLANE2, VF>();
        case KV_PLANE21:
            return decode_launch_of<D, NT, KV_PLANE21, VF>();
        case KV_STREAM3:
            return decode_launch_of<D, NT, KV_STREAM3, VF>();
        case KV_PLANE4:
            return decode_launch_of<D, NT, KV_PLANE4, VF>();
        case KV_Q8_0:
            return decode_launch_of<D, NT, KV_Q8_0, VF>();
        case KV_Q4_0:
            return decode_launch_of<D, NT, KV_Q4_0, VF>();
        case KV_F16:
            return decode_launch_of<D, NT, KV_F16, VF>();
    }
    return { nullptr, nullptr };
}

// As many accumulators as registers hold: up to 16 columns.
template <kv_format VF>
static decode_launch decode_launch_for(kv_format k, int head_size, int column_tiles) {
    switch (head_size * 8 + column_tiles) {
        case 64 * 8 + 1:
            return decode_launch_by_k<64, 1, VF>(k);
        case 64 * 8 + 2:
            return decode_launch_by_k<64, 2, VF>(k);
        case 64 * 8 + 4:
            return decode_launch_by_k<64, 4, VF>(k);
        case 128 * 8 + 1:
            return decode_launch_by_k<128, 1, VF>(k);
        case 128 * 8 + 2:
            return decode_launch_by_k<128, 2, VF>(k);
        case 128 * 8 + 4:
            return decode_launch_by_k<128, 4, VF>(k);
        case 256 * 8 + 1:
            return decode_launch_by_k<256, 1, VF>(k);
        case 256 * 8 + 2:
            return decode_launch_by_k<256, 2, VF>(k);
        case 256 * 8 + 4:
            return decode_launch_by_k<256, 4, VF>(k);
    }
    return { nullptr, nullptr };
}
