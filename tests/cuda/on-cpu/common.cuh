// Stands in for upstream's common.cuh: what the kernels of cuda/ need of CUDA, on a CPU. The threads of a block are
// coroutines: a warp's lanes run one after the other up to where they exchange values or wait, and so do the warps.
// Arithmetic is the host's, compiled without contraction, which has the same IEEE results.
//
// What only a GPU would let pass is an error here: lanes that do not all come to an exchange, a block in which everyone
// waits, bytes of a copy that are read before it was waited for or overwritten while they are needed (both are NaN
// until the last moment), copies that nobody waits for, shared memory beyond what the launch has asked for.

#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes a change of stacks for an error

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define WARP_SIZE 32

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __shared__   static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __forceinline__ inline

using std::isfinite;
using std::max;
using std::min;

// clang-format off
struct half   { uint16_t bits; };
struct half2  { half x, y; };
struct int2   { int x, y; };
struct int4   { int x, y, z, w; };
struct uint2  { uint32_t x, y; };
struct uint4  { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3   { unsigned x = 1, y = 1, z = 1; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };

inline int2   make_int2(int x, int y)                                          { return { x, y }; }
inline uint2  make_uint2(uint32_t x, uint32_t y)                               { return { x, y }; }
inline uint4  make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)       { return { x, y, z, w }; }
inline float2 make_float2(float x, float y)                                    { return { x, y }; }
inline float4 make_float4(float x, float y, float z, float w)                  { return { x, y, z, w }; }
// clang-format on

inline dim3 threadIdx, blockIdx, blockDim;

// ---- threads

enum what_for { RUNS, EXCHANGES, AT_BARRIER, POLLS, HAS_ENDED };

#define EXCHANGE_BYTES 32

struct copy {
    void *       to;
    const void * from;
    size_t       bytes;
    uint64_t *   barrier;  // which the copy engine tells, or NULL
};

struct cuda_thread {
    jmp_buf                        place;
    ucontext_t                     entry;
    std::vector<char>              stack;
    bool                           started;
    what_for                       waits;
    int                            barrier, barrier_threads;
    dim3                           index;
    unsigned                       n_exchanges;
    std::vector<std::vector<copy>> copies;  // groups of its own, the last one open
};

struct cuda_warp {
    char slots[2][WARP_SIZE][EXCHANGE_BYTES];  // of this exchange and the one before, which slower lanes still read
};

struct cuda_block {
    std::vector<cuda_thread> threads;  // never fewer than before: their stacks are used again
    std::vector<cuda_warp>   warps;
    std::vector<copy>        engine;  // what it has been told to copy
    std::vector<uint8_t>     shared;
    std::function<void()>    body;
    int                      n_threads, current;
    uint64_t                 n_steps;  // grows while anyone gets anywhere
    jmp_buf                  scheduler;
};

inline cuda_block the_block;

[[noreturn]] inline void emulator_fails(const char * what) {
    fprintf(stderr, "the emulated GPU: %s; block %u %u %u, thread %u %u %u\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
            threadIdx.x, threadIdx.y, threadIdx.z);
    abort();
}

inline void thread_entry() {
    the_block.body();
    the_block.threads[the_block.current].waits = HAS_ENDED;
    the_block.n_steps++;
    _longjmp(the_block.scheduler, 1);
}

// Back to the scheduler, and here again when it is this thread's turn.
__attribute__((noinline)) inline void pause_thread(what_for waits) {
    cuda_thread & t = the_block.threads[the_block.current];
    t.waits         = waits;
    the_block.n_steps += waits != POLLS;
    if (_setjmp(t.place) == 0) {
        _longjmp(the_block.scheduler, 1);
    }
}

__attribute__((noinline)) inline void continue_thread(int i) {
    cuda_thread & t   = the_block.threads[i];
    the_block.current = i;
    threadIdx         = t.index;
    t.waits           = RUNS;
    if (_setjmp(the_block.scheduler) == 0) {
        if (t.started) {
            _longjmp(t.place, 1);
        }
        t.started = true;
        setcontext(&t.entry);
    }
}

// Runs all lanes of a warp up to the next thing that they wait for, which is the same for all.
inline void continue_warp(int warp) {
    cuda_thread * lanes = &the_block.threads[warp * WARP_SIZE];
    do {
        for (int lane = 0; lane < WARP_SIZE; ++lane) {
            continue_thread(warp * WARP_SIZE + lane);
        }
        for (int lane = 1; lane < WARP_SIZE; ++lane) {
            const bool same = lanes[lane].waits == lanes[0].waits && lanes[lane].barrier == lanes[0].barrier &&
                              lanes[lane].n_exchanges == lanes[0].n_exchanges;
            if (!same) {
                emulator_fails("lanes of a warp wait for different things");
            }
        }
    } while (lanes[0].waits == EXCHANGES);
}

// Warps that have all come to the barrier may go on.
inline bool open_barriers(int n_warps) {
    bool opened = false;
    for (int w = 0; w < n_warps; ++w) {
        const cuda_thread & first = the_block.threads[w * WARP_SIZE];
        if (first.waits != AT_BARRIER) {
            continue;
        }
        std::vector<int> here;
        for (int v = 0; v < n_warps; ++v) {
            const cuda_thread & t = the_block.threads[v * WARP_SIZE];
            if (t.waits == AT_BARRIER && t.barrier == first.barrier) {
                here.push_back(v);
            }
        }
        if ((int) here.size() * WARP_SIZE == first.barrier_threads) {
            for (int v : here) {
                the_block.threads[v * WARP_SIZE].waits = RUNS;
            }
            opened = true;
        }
    }
    return opened;
}

// Runs body() in every thread of one block.
inline void run_block(dim3 size, size_t shared_bytes, std::function<void()> body) {
    cuda_block & b = the_block;
    b.n_threads    = size.x * size.y * size.z;
    GGML_ASSERT(b.n_threads % WARP_SIZE == 0);
    const int n_warps = b.n_threads / WARP_SIZE;
    if ((int) b.threads.size() < b.n_threads) {
        b.threads.resize(b.n_threads);
    }
    b.warps.resize(n_warps);
    b.engine.clear();
    b.body              = std::move(body);
    blockDim            = size;
    const size_t beyond = 4096;
    b.shared.assign(shared_bytes + beyond + 16, 0xff);
    for (int i = 0; i < b.n_threads; ++i) {
        cuda_thread & t = b.threads[i];
        t.started       = false;
        t.waits         = RUNS;
        t.barrier       = 0;
        t.n_exchanges   = 0;
        t.index         = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
        t.copies.assign(1, {});
        t.stack.resize(1 << 16);
        getcontext(&t.entry);
        t.entry.uc_stack.ss_sp   = t.stack.data();
        t.entry.uc_stack.ss_size = t.stack.size();
        t.entry.uc_link          = nullptr;
        makecontext(&t.entry, thread_entry, 0);
    }
    static bool backwards = false;  // in turn: no warp may count on another to come first
    backwards             = !backwards;
    for (bool alive = true; alive;) {
        const uint64_t n_steps = b.n_steps;
        alive                  = false;
        for (int i = 0; i < n_warps; ++i) {
            const int      w     = backwards ? n_warps - 1 - i : i;
            const what_for waits = b.threads[w * WARP_SIZE].waits;
            if (waits == RUNS || waits == POLLS) {
                continue_warp(w);
            }
            alive = alive || b.threads[w * WARP_SIZE].waits != HAS_ENDED;
        }
        if (alive && !open_barriers(n_warps) && b.n_steps == n_steps) {
            emulator_fails("everyone waits");
        }
    }
    if (!b.engine.empty()) {
        emulator_fails("a copy that nobody has waited for");
    }
    for (size_t i = 0; i < beyond; ++i) {
        if (b.shared[b.shared.size() - 1 - i] != 0xff) {
            emulator_fails("shared memory beyond what the launch has asked for");
        }
    }
}

// Of one warp.
inline void run_warp(std::function<void()> body) {
    run_block(dim3(WARP_SIZE), 0, std::move(body));
}

inline uint8_t * dynamic_shared() {
    return (uint8_t *) (((uintptr_t) the_block.shared.data() + 15) & ~(uintptr_t) 15);
}

inline void named_barrier(int id, int n_threads) {
    cuda_thread & t   = the_block.threads[the_block.current];
    t.barrier         = id;
    t.barrier_threads = n_threads;
    pause_thread(AT_BARRIER);
}

inline void __syncthreads() {
    named_barrier(0, the_block.n_threads);
}

// ---- exchanges between the lanes of a warp

// What all lanes give, EXCHANGE_BYTES apart.
template <typename T>
const char * exchange_values(const T & v) {
    static_assert(sizeof(T) <= EXCHANGE_BYTES);
    const int     me   = the_block.current;
    cuda_thread & t    = the_block.threads[me];
    char *        slot = the_block.warps[me / WARP_SIZE].slots[t.n_exchanges++ % 2][0];
    memcpy(slot + me % WARP_SIZE * EXCHANGE_BYTES, &v, sizeof(v));
    pause_thread(EXCHANGES);
    return slot;
}

template <typename T>
T of_lane(const char * slots, int lane) {
    T v;
    memcpy(&v, slots + lane % WARP_SIZE * EXCHANGE_BYTES, sizeof(v));
    return v;
}

inline int this_lane() {
    return the_block.current % WARP_SIZE;
}

inline void __syncwarp() {
    exchange_values(0);
}

template <typename T>
T __shfl_sync(unsigned, T v, int lane) {
    return of_lane<T>(exchange_values(v), lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T v, int distance) {
    return of_lane<T>(exchange_values(v), this_lane() ^ distance);
}

template <typename T>
T __shfl_down_sync(unsigned, T v, int distance) {
    const char * slots = exchange_values(v);
    const int    lane  = this_lane() + distance;
    return lane < WARP_SIZE ? of_lane<T>(slots, lane) : v;
}

inline unsigned __ballot_sync(unsigned, int v) {
    const char * slots = exchange_values(v);
    unsigned     set   = 0;
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
        set |= (unsigned) (of_lane<int>(slots, lane) != 0) << lane;
    }
    return set;
}

inline bool __any_sync(unsigned mask, int v) {
    return __ballot_sync(mask, v) != 0;
}

inline float warp_reduce_sum(float x) {
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(~0u, x, distance);
    }
    return x;
}

inline float warp_reduce_max(float x) {
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    }
    return x;
}

// ---- arithmetic

template <typename to, typename from>
to as(from v) {
    static_assert(sizeof(to) == sizeof(from));
    to bits;
    memcpy(&bits, &v, sizeof(v));
    return bits;
}

// clang-format off
inline int       __popc(unsigned v)               { return __builtin_popcount(v); }
inline unsigned  __umulhi(unsigned a, unsigned b) { return (uint64_t) a * b >> 32; }
inline unsigned  __float_as_uint(float v)         { return as<unsigned>(v); }
inline float     __uint_as_float(unsigned v)      { return as<float>(v); }
inline long long __double_as_longlong(double v)   { return as<long long>(v); }
inline double    __longlong_as_double(long long v) { return as<double>(v); }
inline double    __dadd_rn(double a, double b)    { return a + b; }
inline double    __dmul_rn(double a, double b)    { return a * b; }
inline double    __ddiv_rn(double a, double b)    { return a / b; }
inline double    __dsqrt_rn(double v)             { return sqrt(v); }
inline float     __fmul_rn(float a, float b)      { return a * b; }
inline float     __fdividef(float a, float b)     { return a / b; }
inline float     exp2_approx(float x)             { return exp2f(x); }
inline float     __double2float_rn(double v)      { return (float) v; }
inline half      __float2half_rn(float v)         { return { ggml_fp32_to_fp16(v) }; }
inline float     __half2float(half v)             { return ggml_fp16_to_fp32(v.bits); }
inline uint16_t  __half_as_ushort(half v)         { return v.bits; }
inline half      __ushort_as_half(uint16_t v)     { return { v }; }
inline half2     __floats2half2_rn(float x, float y) { return { __float2half_rn(x), __float2half_rn(y) }; }
inline float     __low2float(half2 v)             { return __half2float(v.x); }
inline float     __high2float(half2 v)            { return __half2float(v.y); }
inline float2    __half22float2(half2 v)          { return { __half2float(v.x), __half2float(v.y) }; }
// clang-format on

inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return a * b + c;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t) b << 32 | a;
    uint32_t       y    = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t which = selector >> 4 * i & 15;
        const uint32_t byte  = both >> 8 * (which & 7) & 0xff;
        y |= (which & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
    }
    return y;
}

inline uint32_t transpose_halves(uint32_t x) {
    const char * slots = exchange_values(x);
    const int    g = this_lane() / 4, t = this_lane() % 4;
    const auto   element = [&](int row, int column) {
        return of_lane<uint32_t>(slots, 4 * row + column / 2) >> 16 * (column % 2) & 0xffff;
    };
    return element(2 * t + 1, g) << 16 | element(2 * t, g);
}

struct mma_operands {
    uint4    a;
    uint32_t b0, b1;
};

// Row r and column c of a product, from what the lanes hold (cuda/flash-attn-mma.cuh): the sum of product(a, b) over
// the words of both.
template <typename T, typename F>
T mma_element(const char * slots, int r, int c, F product) {
    T sum = 0;
    for (int t = 0; t < 4; ++t) {
        const mma_operands row = of_lane<mma_operands>(slots, 4 * (r % 8) + t),
                           col = of_lane<mma_operands>(slots, 4 * c + t);
        sum += product(r < 8 ? row.a.x : row.a.y, col.b0) + product(r < 8 ? row.a.z : row.a.w, col.b1);
    }
    return sum;
}

inline int4 mma_s8(const uint4 a, uint32_t b0, uint32_t b1, const int4 c) {
    const char * slots = exchange_values(mma_operands{ a, b0, b1 });
    const int    g = this_lane() / 4, t = this_lane() % 4;
    const auto   product = [](uint32_t x, uint32_t y) {
        int sum = 0;
        for (int i = 0; i < 32; i += 8) {
            sum += (int8_t) (x >> i) * (int8_t) (y >> i);
        }
        return sum;
    };
    return { c.x + mma_element<int>(slots, g, 2 * t, product), c.y + mma_element<int>(slots, g, 2 * t + 1, product),
             c.z + mma_element<int>(slots, g + 8, 2 * t, product),
             c.w + mma_element<int>(slots, g + 8, 2 * t + 1, product) };
}

inline float4 mma_f16(const uint4 a, uint32_t b0, uint32_t b1, const float4 c) {
    const char * slots = exchange_values(mma_operands{ a, b0, b1 });
    const int    g = this_lane() / 4, t = this_lane() % 4;
    const auto   product = [](uint32_t x, uint32_t y) {
        const float2 u = __half22float2(as<half2>(x)), v = __half22float2(as<half2>(y));
        return u.x * v.x + u.y * v.y;
    };
    return { c.x + mma_element<float>(slots, g, 2 * t, product), c.y + mma_element<float>(slots, g, 2 * t + 1, product),
             c.z + mma_element<float>(slots, g + 8, 2 * t, product),
             c.w + mma_element<float>(slots, g + 8, 2 * t + 1, product) };
}

template <typename T>
T __ldcg(const T * p) {
    return *p;
}

// ---- copies in the background

inline void start_copy(std::vector<copy> & to, const copy & c) {
    memset(c.to, 0xff, c.bytes);
    to.push_back(c);
}

inline void copy_async_16(void * shared, const void * global) {
    GGML_ASSERT(((uintptr_t) shared | (uintptr_t) global) % 16 == 0);
    start_copy(the_block.threads[the_block.current].copies.back(), { shared, global, 16, nullptr });
}

inline void copy_async_commit() {
    the_block.threads[the_block.current].copies.emplace_back();
}

template <int pending>
void copy_async_wait() {
    auto & groups = the_block.threads[the_block.current].copies;
    while ((int) groups.size() - 1 > pending) {
        for (const copy & c : groups.front()) {
            memcpy(c.to, c.from, c.bytes);
        }
        groups.erase(groups.begin());
    }
    __syncwarp();
}

typedef uint64_t bulk_barrier;

struct bulk_state {
    uint64_t phase : 1, count : 12, left : 12, bytes : 39;  // bytes: how many are still to come
};

inline void bulk_change(bulk_barrier * barrier, int arrived, int64_t bytes) {
    the_block.n_steps++;
    bulk_state s = as<bulk_state>(*barrier);
    GGML_ASSERT(s.count > 0 && (int) s.left >= arrived);
    s.left -= arrived;
    s.bytes += bytes;
    if (s.left == 0 && s.bytes == 0) {
        s.phase ^= 1;
        s.left = s.count;
    }
    *barrier = as<uint64_t>(s);
}

inline void bulk_barrier_init(bulk_barrier * barrier, int count) {
    *barrier = as<uint64_t>(bulk_state{ 0, (uint64_t) count, (uint64_t) count, 0 });
}

inline bool bulk_barrier_arrive(bulk_barrier * barrier) {
    const bool last = as<bulk_state>(*barrier).left == 1;
    bulk_change(barrier, 1, 0);
    return last;
}

inline void bulk_barrier_expect(bulk_barrier * barrier, int bytes) {
    bulk_state s = as<bulk_state>(*barrier);
    s.bytes += bytes;
    *barrier = as<uint64_t>(s);
    bulk_change(barrier, 1, 0);
}

// Lanes wait together: it is the last that has waited long enough for the copies to come.
inline void bulk_barrier_wait(bulk_barrier * barrier, int parity) {
    while (as<bulk_state>(*barrier).phase == (uint64_t) parity) {
        auto & engine = the_block.engine;
        for (size_t i = 0; this_lane() == WARP_SIZE - 1 && i < engine.size();) {
            if (engine[i].barrier != barrier) {
                ++i;
                continue;
            }
            memcpy(engine[i].to, engine[i].from, engine[i].bytes);
            bulk_change(barrier, 0, -(int64_t) engine[i].bytes);
            engine.erase(engine.begin() + i);
        }
        pause_thread(POLLS);
    }
}

inline void bulk_copy(void * shared, const void * global, int bytes, bulk_barrier * barrier) {
    GGML_ASSERT(((uintptr_t) shared | (uintptr_t) global | bytes) % 16 == 0);
    start_copy(the_block.engine, { shared, global, (size_t) bytes, barrier });
}

// ---- the host's side, on a device that a test describes

#define GGML_CUDA_CC_TURING        750
#define GGML_CUDA_CC_IS_NVIDIA(cc) ((cc) > 0)
#define CUDA_CHECK(x)              (void) (x)

struct cuda_device {
    int    cc, nsm;
    size_t smpbo;  // shared memory of a block
};

struct cuda_devices {
    cuda_device devices[1];
};

inline cuda_devices the_gpu;

typedef int cudaStream_t;

struct ggml_backend_cuda_context {
    int          device = 0;
    cudaStream_t stream() const { return 0; }
};

struct ggml_cuda_kernel_launch_params {
    dim3         blocks, threads;
    size_t       shared_bytes;
    cudaStream_t stream;
};

enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline int cudaFuncSetAttribute(const void *, int, int) {
    return 0;
}

inline const auto & ggml_cuda_info() {
    return the_gpu;
}

inline int ggml_cuda_highest_compiled_arch(int) {
    return __CUDA_ARCH__;
}
inline bool turing_mma_available(int cc) {
    return cc >= GGML_CUDA_CC_TURING;
}
inline void ggml_cuda_pdl_sync() {}
inline void ggml_cuda_pdl_lc() {}

template <typename... P, typename... A>
void ggml_cuda_kernel_launch(void (*kernel)(P...), const ggml_cuda_kernel_launch_params & p, A... args) {
    for (unsigned z = 0; z < p.blocks.z; ++z) {
        for (unsigned y = 0; y < p.blocks.y; ++y) {
            for (unsigned x = 0; x < p.blocks.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block(p.threads, p.shared_bytes, [&] { kernel(args...); });
            }
        }
    }
}
