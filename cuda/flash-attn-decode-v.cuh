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
        using tile = decode_tile<D, NT, KF, VF>;
        return { flash_attn_decode<D, NT, KF, VF>, decode_shared<tile>::all, tile::v_place };
    } else {
        return {};
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
    return {};
}

// As many accumulators as registers hold: up to 16 columns.
template <int D, kv_format VF>
static decode_launch decode_launch_by_columns(kv_format k, int column_tiles) {
    switch (column_tiles) {
        case 1:
            return decode_launch_by_k<D, 1, VF>(k);
        case 2:
            return decode_launch_by_k<D, 2, VF>(k);
        case 4:
            return decode_launch_by_k<D, 4, VF>(k);
    }
    return {};
}

template <kv_format VF>
static decode_launch decode_launch_for(kv_format k, int head_size, int column_tiles) {
    switch (head_size) {
        case 64:
            return decode_launch_by_columns<64, VF>(k, column_tiles);
        case 128:
            return decode_launch_by_columns<128, VF>(k, column_tiles);
        case 256:
            return decode_launch_by_columns<256, VF>(k, column_tiles);
    }
    return {};
}
