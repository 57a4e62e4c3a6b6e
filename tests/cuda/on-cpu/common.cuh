// Stands in for upstream's common.cuh: what cuda/codec.cuh needs of CUDA, on the CPU. A warp is 32 coroutines, lane
// after lane; every exchange between lanes lets all others reach it first. Arithmetic is the host's, compiled without
// contraction, which has the same IEEE results.

#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline
#define WARP_SIZE       32

using std::isfinite;
using std::min;

struct half {
    uint16_t bits;
};

struct uint2 {
    uint32_t x, y;
};

struct warp {
    ucontext_t            scheduler;
    ucontext_t            lanes[WARP_SIZE];
    std::vector<char>     stacks[WARP_SIZE];
    uint64_t              slots[2][WARP_SIZE];  // of this exchange and the one before, which slower lanes still read
    unsigned              n_exchanges[WARP_SIZE];
    std::function<void()> body;
};

inline warp the_warp;

inline struct {
    unsigned x;
} threadIdx;

inline void run_lane() {
    the_warp.body();
}

// Runs body() in all lanes.
inline void run_warp(std::function<void()> body) {
    warp & w = the_warp;
    w.body   = std::move(body);
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
        w.stacks[lane].resize(1 << 16);
        w.n_exchanges[lane] = 0;
        getcontext(&w.lanes[lane]);
        w.lanes[lane].uc_stack.ss_sp   = w.stacks[lane].data();
        w.lanes[lane].uc_stack.ss_size = w.stacks[lane].size();
        w.lanes[lane].uc_link          = &w.scheduler;
        makecontext(&w.lanes[lane], run_lane, 0);
    }
    unsigned n_exchanges = 0;
    do {
        for (unsigned lane = 0; lane < WARP_SIZE; ++lane) {
            threadIdx.x = lane;
            swapcontext(&w.scheduler, &w.lanes[lane]);
            GGML_ASSERT(w.n_exchanges[lane] == w.n_exchanges[0]);  // all lanes exchange, or none
        }
        if (w.n_exchanges[0] == n_exchanges) {
            return;  // all have ended
        }
        n_exchanges = w.n_exchanges[0];
    } while (true);
}

// What all lanes give.
template <typename T>
const uint64_t * exchange(T v) {
    const unsigned lane = threadIdx.x;
    uint64_t *     slot = the_warp.slots[the_warp.n_exchanges[lane]++ % 2];
    memcpy(&slot[lane], &v, sizeof(v));
    swapcontext(&the_warp.lanes[lane], &the_warp.scheduler);
    return slot;
}

template <typename T>
T from_slot(uint64_t slot) {
    T v;
    memcpy(&v, &slot, sizeof(v));
    return v;
}

template <typename T>
T __shfl_sync(unsigned, T v, int lane) {
    return from_slot<T>(exchange(v)[lane % WARP_SIZE]);
}

template <typename T>
T __shfl_xor_sync(unsigned, T v, int distance) {
    return from_slot<T>(exchange(v)[threadIdx.x ^ distance]);
}

template <typename T>
T __shfl_down_sync(unsigned, T v, int distance) {
    const uint64_t * slots = exchange(v);
    const unsigned   lane  = threadIdx.x + distance;
    return lane < WARP_SIZE ? from_slot<T>(slots[lane]) : v;
}

inline unsigned __ballot_sync(unsigned, int v) {
    const uint64_t * slots = exchange(v);
    unsigned         set   = 0;
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
        set |= (unsigned) (from_slot<int>(slots[lane]) != 0) << lane;
    }
    return set;
}

template <typename to, typename from>
to as(from v) {
    static_assert(sizeof(to) == sizeof(from));
    to bits;
    memcpy(&bits, &v, sizeof(v));
    return bits;
}

// clang-format off
inline int       __popc(unsigned v)               { return __builtin_popcount(v); }
inline unsigned  __float_as_uint(float v)         { return as<unsigned>(v); }
inline long long __double_as_longlong(double v)   { return as<long long>(v); }
inline double    __longlong_as_double(long long v) { return as<double>(v); }
inline double    __dadd_rn(double a, double b)    { return a + b; }
inline double    __dmul_rn(double a, double b)    { return a * b; }
inline double    __ddiv_rn(double a, double b)    { return a / b; }
inline double    __dsqrt_rn(double v)             { return sqrt(v); }
inline float     __fmul_rn(float a, float b)      { return a * b; }
inline float     __double2float_rn(double v)      { return (float) v; }
inline half      __float2half_rn(float v)         { return { ggml_fp32_to_fp16(v) }; }
inline float     __half2float(half v)             { return ggml_fp16_to_fp32(v.bits); }
inline uint16_t  __half_as_ushort(half v)         { return v.bits; }
inline half      __ushort_as_half(uint16_t v)     { return { v }; }
inline uint2     make_uint2(uint32_t x, uint32_t y) { return { x, y }; }
// clang-format on
