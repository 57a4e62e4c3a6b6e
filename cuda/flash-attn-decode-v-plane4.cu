#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(plane4) {
    return decode_launch_for<KV_PLANE4>(k, head_size, column_tiles);
}
