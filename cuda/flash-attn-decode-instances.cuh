// The attention kernels for few queries are compiled in one file per format of V (flash-attn-decode-v-*.cu), so that
// they compile in parallel. A file defines the one function that finds its kernels.

#pragma once

#include "flash-attn-formats.cuh"

struct decode_params;

struct decode_launch {
    void (*kernel)(const decode_params);
    int (*shared_bytes)(int n_heads, int n_groups, int n_slots, int keys, int k_row, int v_row);
    int (*v_place)(int n, int g, bool interleaved);  // which value of V number n of lanes 4g .. 4g + 3 is
};

// The kernel for heads of `head_size` values, 4 * column_tiles columns at a time, or one without a kernel.
#define DECODE_INSTANCES_OF(format) decode_launch decode_kernel_v_##format(kv_format k, int head_size, int column_tiles)

DECODE_INSTANCES_OF(plane2);
DECODE_INSTANCES_OF(plane21);
DECODE_INSTANCES_OF(stream3);
DECODE_INSTANCES_OF(plane4);
DECODE_INSTANCES_OF(q8_0);
DECODE_INSTANCES_OF(q4_0);
DECODE_INSTANCES_OF(f16);

static constexpr bool kv_format_is_ours(kv_format format) {
    return format <= KV_PLANE4;
}
