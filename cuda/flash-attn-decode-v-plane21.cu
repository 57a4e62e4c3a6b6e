#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(plane21) {
    return decode_launch_for<KV_PLANE21>(k, head_size, column_tiles);
}
