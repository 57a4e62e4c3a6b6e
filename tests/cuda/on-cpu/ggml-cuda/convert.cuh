// Stands in for upstream's convert.cuh.

#pragma once

#include "common.cuh"

template <typename T>
T ggml_cuda_cast(float v) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return v;
    } else {
        return __float2half_rn(v);
    }
}
