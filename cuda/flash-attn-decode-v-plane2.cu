#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(plane2) {
    return decode_launch_for<KV_PLANE2>(k, head_size, column_tiles);
}
