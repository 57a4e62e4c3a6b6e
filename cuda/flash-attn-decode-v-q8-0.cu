#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(q8_0) {
    return decode_launch_for<KV_Q8_0>(k, head_size, column_tiles);
}
