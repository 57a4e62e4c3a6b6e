#include "flash-attn-decode-v.cuh"

DECODE_INSTANCES_OF(f16) {
    return decode_launch_for<KV_F16>(k, head_size, column_tiles);
}
