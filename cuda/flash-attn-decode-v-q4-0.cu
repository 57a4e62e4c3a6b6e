#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(q4_0) {
    return decode_launch_for<KV_Q4_0>(k, head_size, column_tiles);
}
