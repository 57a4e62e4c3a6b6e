#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(stream3) {
    return decode_launch_for<KV_STREAM3>(k, head_size, column_tiles);
}
