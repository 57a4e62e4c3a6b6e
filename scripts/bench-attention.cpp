// Times FLASH_ATTN_EXT of ggml's CPU backend alone, for KV caches of any type, and holds it against what the machine
// can do: memory bandwidth, int8 and f32 multiply-adds. Only ggml's public API, so that any build can be compared.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#    include <immintrin.h>
#elif defined(__GNUC__) && defined(__aarch64__)
#    include <arm_neon.h>
#endif

static const char * const PROGRAM = "turbokv-bench-attention";

static const char * const HELP =
    R"(Times attention over a KV cache on the CPU: the FLASH_ATTN_EXT operation alone, without a model.

    OMP_WAIT_POLICY=passive turbokv-bench-attention --cache f16,q8_0,turbo3,q8_0/turbo3 --depth 16384

  --cache LIST     caches to compare, K/V or one name for both  (f16,q8_0,q4_0,turbo4,turbo3,tbq3,q8_0/turbo3)
                   a cache named twice shows the noise
  --heads N        query heads                                  (8)
  --kv-heads N     heads in the cache                           (2)
  --head-size N    values per head                              (128)
  --depth N        keys in the cache, the batch included        (8192)
  --batch N        query tokens: 1 is decoding, more is prefill (1)
  --threads N      threads                                      (one per logical CPU)
  --layers N       operations per run, each with its own cache  (as many as 64 MiB of f16 K and V take, / batch)
  --hot            leave the caches where the run before left them; otherwise other data is read before each run
  --rounds N       runs of each cache, in shuffled order        (what fits in 10 s, 5 to 50)
  --json           JSON with every time

Columns, from the median time of an operation, with the fastest and slowest beside it:
  ns/row/KV head, ns/row/head   time * threads / (visible keys * heads), as if one thread did it all
  GB/s, % mem      packed bytes of K and V per operation's time, and that over the measured bandwidth; the same key
                   serves every query of a batch, so that it says little where --batch is more than 1
  GMA/s, % int8    2 * head size * heads * visible keys multiply-adds, in 1e9/s and over the measured int8 peak
  speed            f16's time over this one's, the median over rounds (only where f16 is among the caches)

OMP_WAIT_POLICY=passive makes idle threads sleep: better on shared machines. The rotation that llama.cpp's graph does
for quantized caches is no part of this operation. Exit codes: 1 for a failure, 2 for wrong arguments.
)";

#include "bench.h"

static std::string number(double x, int decimals, const char * if_nan) {
    return std::isnan(x) ? if_nan : format("%.*f", decimals, x);
}

// Seconds from the common start of work(0) .. work(n - 1) to the end of the last.
static double parallel(int n, const std::function<void(int)> & work) {
    std::atomic<int>         n_ready{ 0 };
    std::atomic<bool>        go{ false };
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) {
        threads.emplace_back([&, i] {
            n_ready++;
            while (!go) {
                std::this_thread::yield();
            }
            work(i);
        });
    }
    while (n_ready < n) {
        std::this_thread::yield();
    }
    const double start = now();
    go                 = true;
    for (std::thread & t : threads) {
        t.join();
    }
    return now() - start;
}

// More than the last-level cache, of which some CPUs have up to 12 MiB per core; also what evicts the KV caches.
struct big_buffer {
    int                         n_threads;
    int64_t                     n_slice;  // 8-byte words per thread
    std::unique_ptr<uint64_t[]> words;
    std::atomic<uint64_t>       sink{ 0 };

    explicit big_buffer(int n_threads)
        : n_threads(n_threads),
          n_slice(std::max<int64_t>(256 / n_threads + 1, 16) << 17),
          words(new uint64_t[n_threads * n_slice]) {
        parallel(n_threads, [&](int i) { std::fill_n(&words[i * n_slice], n_slice, i); });  // near to who reads it
    }

    // Bytes per second.
    double read() {
        const double seconds = parallel(n_threads, [&](int i) {
            sink += std::accumulate(&words[i * n_slice], &words[i * n_slice] + n_slice, uint64_t{ 0 });
        });
        return n_threads * n_slice * sizeof(uint64_t) / seconds;
    }
};

// Peaks of arithmetic: independent accumulators, as many as hide the latency and fit into the registers. `b` is
// opaque, and `a` is in each step, or the compiler would find a shorter way to the same sums.
struct peak_kernel {
    const char * name;
    int          n_madd;  // per iteration
    void (*run)(int64_t n);
};

// clang-format off
#define LANES_12(X, op) \
    X(0, op) X(1, op) X(2, op) X(3, op) X(4, op) X(5, op) X(6, op) X(7, op) X(8, op) X(9, op) X(10, op) X(11, op)
#define LANES_16(X, op) LANES_12(X, op) X(12, op) X(13, op) X(14, op) X(15, op)
#define DECLARE(i, op)  vec c##i = one;
#define STEP(i, op)     __asm__ volatile("" : "+" REGISTER(a)); c##i = op(a, b, c##i);
#define USE(i, op)      __asm__ volatile("" : : REGISTER(c##i));
#define PEAK_KERNEL(name, features, type, first, lanes, op)       \
    __attribute__((target(features))) static void name(int64_t n) { \
        using vec     = type;                                     \
        const vec one = first;                                    \
        vec       a = one, b = one;                               \
        __asm__ volatile("" : "+" REGISTER(b));                   \
        lanes(DECLARE, op)                                        \
        for (; n > 0; --n) { lanes(STEP, op) }                    \
        lanes(USE, op)                                            \
    }

#if defined(__GNUC__) && defined(__x86_64__)
#define REGISTER           "v"
#define VPDPBUSD(a, b, c)  _mm512_dpbusd_epi32(c, a, b)
#define VPMADDUBSW(a, b, c) \
    _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
PEAK_KERNEL(int8_avx512, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(1), LANES_16, VPDPBUSD)
PEAK_KERNEL(int8_avx2,   "avx2",               __m256i, _mm256_set1_epi8(1), LANES_12, VPMADDUBSW)
PEAK_KERNEL(f32_avx512,  "avx512f",            __m512,  _mm512_set1_ps(1),   LANES_16, _mm512_fmadd_ps)
PEAK_KERNEL(f32_avx2,    "avx2,fma",           __m256,  _mm256_set1_ps(1),   LANES_12, _mm256_fmadd_ps)
#elif defined(__GNUC__) && defined(__aarch64__)
#define REGISTER       "w"
#define SDOT(a, b, c)  vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(c), a, b))
#define FMLA(a, b, c)  vfmaq_f32(c, a, b)
PEAK_KERNEL(int8_sdot, "+dotprod", int8x16_t,   vdupq_n_s8(1),  LANES_16, SDOT)
PEAK_KERNEL(f32_neon,  "+simd",    float32x4_t, vdupq_n_f32(1), LANES_16, FMLA)
#endif
// clang-format on

// For other machines: what the compiler makes of it.
template <typename T>
static void portable(int64_t n) {
    static std::atomic<int> one{ 1 };  // read each time, or the sums could be computed at once
    T                       c[128] = { 0 };
    for (; n > 0; --n) {
        const T a = one.load(std::memory_order_relaxed);
        for (int j = 0; j < 128; ++j) {
            c[j] += a * (T) j;
        }
    }
    one = 1 + (std::accumulate(c, c + 128, T{ 0 }) == T{ 1 });
}

static peak_kernel best_kernel(bool int8) {
#if defined(__GNUC__) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && (!int8 || __builtin_cpu_supports("avx512vnni"))) {
        return int8 ? peak_kernel{ "vpdpbusd zmm", 16 * 64, int8_avx512 }
                    : peak_kernel{ "vfmadd zmm", 16 * 16, f32_avx512 };
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return int8 ? peak_kernel{ "vpmaddubsw ymm", 12 * 32, int8_avx2 }
                    : peak_kernel{ "vfmadd ymm", 12 * 8, f32_avx2 };
    }
#elif defined(__GNUC__) && defined(__aarch64__)
    if (!int8 || ggml_cpu_has_dotprod()) {
        return int8 ? peak_kernel{ "sdot", 16 * 16, int8_sdot } : peak_kernel{ "fmla", 16 * 4, f32_neon };
    }
#endif
    return { "portable", 128, int8 ? portable<uint32_t> : portable<float> };
}

// Multiply-adds per second.
static double speed(const peak_kernel & kernel, int n_threads) {
    const int64_t n       = 1 << 19;
    const double  seconds = parallel(n_threads, [&](int) { kernel.run(n); });
    return (double) n * kernel.n_madd * n_threads / seconds;
}

struct options : shape_options {
    std::string caches    = "f16,q8_0,q4_0,turbo4,turbo3,tbq3,q8_0/turbo3";
    int64_t     n_threads = std::max(1u, std::thread::hardware_concurrency());
    int64_t     n_layers  = 0;
    int64_t     n_rounds  = 0;
    bool        hot       = false;
    bool        json      = false;

    options() {
        n_head    = 8;
        n_head_kv = 2;
        depth     = 8192;
    }

    // Pairs of query and key that the causal mask lets through, per head.
    int64_t n_visible() const { return batch * depth - batch * (batch - 1) / 2; }
};

static options parse(int argc, char ** argv) {
    options o;
    parse_options(argc, argv,
                  o.numbers({
                      { "--threads", &o.n_threads, 512 },
                      { "--layers", &o.n_layers, 1024 },
                      { "--rounds", &o.n_rounds, 100000 },
                  }),
                  { { "--cache", &o.caches } }, { { "--hot", &o.hot }, { "--json", &o.json } });
    o.check();
    if (o.n_layers == 0) {
        const int64_t f16_bytes = 4 * o.depth * o.n_head_kv * o.head_size;
        o.n_layers              = std::clamp<int64_t>((64 << 20) / f16_bytes / o.batch + 1, 1, 1024);
    }
    return o;
}

// What attention on the CPU can read and ggml_quantize_chunk can write.
static std::vector<ggml_type> cache_types() {
    std::vector<ggml_type> types;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const ggml_type              t      = (ggml_type) i;
        const ggml_type_traits *     traits = ggml_get_type_traits(t);
        const ggml_type_traits_cpu * cpu    = ggml_get_type_traits_cpu(t);
        if (cpu->vec_dot && ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float &&
            (t == GGML_TYPE_F32 || (traits->to_float && traits->from_float_ref)) &&
            !ggml_quantize_requires_imatrix(t)) {
            types.push_back(t);
        }
    }
    return types;
}

// One K/V pair: a graph of independent attention operations, each with its own cache.
struct candidate : cache_pair {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph *           graph = nullptr;
    ggml_tensor *           out   = nullptr;  // the last
    std::vector<double>     times;            // of one operation, in seconds

    candidate(const std::string & pair, const options & o) : cache_pair(pair, o.head_size, cache_types()) {}

    size_t bytes(const options & o) const {
        return o.depth * o.n_head_kv * (ggml_row_size(type_k, o.head_size) + ggml_row_size(type_v, o.head_size));
    }

    // A cache as llama.cpp lays it out, a row per token with all its heads, and as attention sees it.
    ggml_tensor * cache(ggml_type type, const options & o) {
        ggml_tensor * s = ggml_new_tensor_2d(ctx.get(), type, o.head_size * o.n_head_kv, o.depth);
        ggml_tensor * v = ggml_view_3d(ctx.get(), s, o.head_size, o.n_head_kv, o.depth,
                                       ggml_row_size(type, o.head_size), s->nb[1], 0);
        return ggml_permute(ctx.get(), v, 0, 2, 1, 3);
    }

    // x: values of Q, K and V.
    void build(ggml_backend_t backend, const options & o, const std::vector<float> (&x)[3]) {
        const size_t n_nodes = 16 * o.n_layers;
        ctx.reset(ggml_init(
            { n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true }));
        graph                           = ggml_new_graph_custom(ctx.get(), n_nodes, false);
        ggml_tensor *              mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, o.depth, o.batch);
        std::vector<ggml_tensor *> inputs[3];
        for (int64_t i = 0; i < o.n_layers; ++i) {
            ggml_tensor * q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, o.head_size, o.n_head, o.batch);
            ggml_tensor * k = cache(type_k, o);
            ggml_tensor * v = cache(type_v, o);
            out             = ggml_flash_attn_ext(ctx.get(), ggml_permute(ctx.get(), q, 0, 2, 1, 3), k, v, mask,
                                                  1.0f / sqrtf(o.head_size), 0.0f, 0.0f);
            if (!ggml_backend_supports_op(backend, out)) {
                fail(1, "the CPU backend has no attention for %s", name.c_str());
            }
            ggml_build_forward_expand(graph, out);
            inputs[0].push_back(q);
            inputs[1].push_back(k->view_src);
            inputs[2].push_back(v->view_src);
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            fail(1, "no memory for the cache %s: take a smaller --depth or --layers", name.c_str());
        }
        for (int i = 0; i < 3; ++i) {
            // The same bytes for all operations, in different memory: as good for a timing, and quickly made.
            const ggml_tensor *  t = inputs[i][0];
            std::vector<uint8_t> bytes(ggml_nbytes(t));
            ggml_quantize_chunk(t->type, x[i].data(), bytes.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
            for (ggml_tensor * input : inputs[i]) {
                ggml_backend_tensor_set(input, bytes.data(), 0, bytes.size());
            }
        }
        std::vector<ggml_fp16_t> m(o.depth * o.batch);
        for (int64_t i = 0; i < o.depth * o.batch; ++i) {
            m[i] = ggml_fp32_to_fp16(i % o.depth <= o.depth - o.batch + i / o.depth ? 0.0f : -INFINITY);
        }
        ggml_backend_tensor_set(mask, m.data(), 0, ggml_nbytes(mask));
    }

    // Seconds of one operation.
    double run(ggml_backend_t backend, const options & o) const {
        const double start = now();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            fail(1, "attention over %s failed", name.c_str());
        }
        return (now() - start) / o.n_layers;
    }
};

int main(int argc, char ** argv) try {
    options                o = parse(argc, argv);
    std::vector<candidate> candidates;
    for (size_t start = 0, end = 0; end != std::string::npos; start = end + 1) {
        end = o.caches.find(',', start);
        candidates.emplace_back(o.caches.substr(start, end - start), o);
    }

    // The machine first: threads that ggml starts may spin for a while.
    ggml_backend_ptr backend{ ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), o.n_threads);
    const char *      cpu = ggml_backend_dev_description(ggml_backend_get_device(backend.get()));
    big_buffer        other_data(o.n_threads);
    const peak_kernel int8 = best_kernel(true), f32 = best_kernel(false);
    double            int8_peak = 0.0, f32_peak = 0.0, bandwidth = 0.0;
    const auto        measure_machine = [&] {
        int8_peak = std::max(int8_peak, speed(int8, o.n_threads));
        f32_peak  = std::max(f32_peak, speed(f32, o.n_threads));
        bandwidth = std::max(bandwidth, other_data.read());
    };
    for (int i = 0; i < 10; ++i) {
        measure_machine();
    }

    const int64_t            n_kv = o.head_size * o.n_head_kv * o.depth;
    const std::vector<float> x[3] = { gaussian(o.head_size * o.n_head * o.batch), gaussian(n_kv), gaussian(n_kv) };
    double                   round_seconds = 0.0;
    for (candidate & c : candidates) {
        c.build(backend.get(), o, x);
        c.run(backend.get(), o);  // touches all memory, starts the threads
        const double start = now();
        if (!o.hot) {
            other_data.read();
        }
        c.run(backend.get(), o);
        round_seconds += now() - start;
        float first;
        ggml_backend_tensor_get(c.out, &first, 0, sizeof(first));
        if (!std::isfinite(first)) {
            fail(1, "attention over %s gave %g", c.name.c_str(), first);
        }
    }
    if (o.n_rounds == 0) {
        o.n_rounds = std::clamp<int64_t>(10.0 / round_seconds, 5, 50);
    }

    // Other work on the machine then meets all caches alike.
    std::vector<candidate *> order;
    for (candidate & c : candidates) {
        order.push_back(&c);
    }
    std::mt19937 rng(42);
    for (int64_t round = 0; round < o.n_rounds; ++round) {
        measure_machine();  // again and again: the best of all counts, and the first may fall on a busy moment
        std::shuffle(order.begin(), order.end(), rng);
        for (candidate * c : order) {
            if (!o.hot) {
                other_data.read();
            }
            c->times.push_back(c->run(backend.get(), o));
        }
    }

    printf(o.json ? "{\"cpu\": \"%s\", \"threads\": %d, \"memory_GB_per_s\": %.1f, \"int8_GMA_per_s\": %.1f, "
                    "\"int8\": \"%s\", \"f32_GMA_per_s\": %.1f, \"f32\": \"%s\",\n"
                  : "%s, %d threads: memory %.1f GB/s, int8 %.0f GMA/s (%s), f32 %.0f GMA/s (%s)\n",
           cpu, (int) o.n_threads, bandwidth / 1e9, int8_peak / 1e9, int8.name, f32_peak / 1e9, f32.name);
    printf(o.json ? " \"heads\": %d, \"head_size\": %d, \"kv_heads\": %d, \"depth\": %d, \"batch\": %d, "
                    "\"rounds\": %d, \"layers\": %d, \"memory\": \"%s\",\n \"caches\": ["
                  : "%d heads of %d, %d in the cache, depth %d, batch %d; %d runs of %d operations, %s\n\n",
           (int) o.n_head, (int) o.head_size, (int) o.n_head_kv, (int) o.depth, (int) o.batch, (int) o.n_rounds,
           (int) o.n_layers, o.hot ? "hot" : "cold");

    const auto f16 = std::find_if(candidates.begin(), candidates.end(), [](auto & c) { return c.name == "f16"; });
    for (const candidate & c : candidates) {
        const double        time    = median(c.times);
        const double        ns_row  = time * 1e9 * o.n_threads / o.n_visible();
        const double        bytes_s = c.bytes(o) / time;
        const double        madds_s = 2.0 * o.head_size * o.n_head * o.n_visible() / time;
        const auto          range   = std::minmax_element(c.times.begin(), c.times.end());
        std::vector<double> ratios;
        for (size_t i = 0; f16 != candidates.end() && i < c.times.size(); ++i) {
            ratios.push_back(f16->times[i] / c.times[i]);
        }

        const struct {
            const char *key, *title;
            double      value;
        } columns[] = {
            { "us", "us/op", time * 1e6 },
            { "us_min", "fastest", *range.first * 1e6 },
            { "us_max", "slowest", *range.second * 1e6 },
            { "ns_row_kvhead", "ns/row/KV head", ns_row / o.n_head_kv },
            { "ns_row_head", "ns/row/head", ns_row / o.n_head },
            { "GB_per_s", "GB/s", bytes_s / 1e9 },
            { "pct_memory", "% mem", 100 * bytes_s / bandwidth },
            { "GMA_per_s", "GMA/s", madds_s / 1e9 },
            { "pct_int8", "% int8", 100 * madds_s / int8_peak },
            { "speed", "speed", ratios.empty() ? NAN : median(ratios) },
        };
        if (o.json) {
            printf("%s\n  {\"cache\": \"%s\", \"bytes\": %zu", &c == &candidates[0] ? "" : ",", c.name.c_str(),
                   c.bytes(o));
            for (const auto & column : columns) {
                printf(", \"%s\": %s", column.key, number(column.value, 3, "null").c_str());
            }
            printf(", \"us_all\": [");
            for (const double & t : c.times) {
                printf("%s%.3f", &t == &c.times[0] ? "" : ", ", t * 1e6);
            }
            printf("]}");
            continue;
        }
        std::string title = "| cache                 |", rule = "|-----------------------|";
        std::string line = format("| %-21s |", c.name.c_str());
        for (const auto & column : columns) {
            const int width = std::max<int>(strlen(column.title), 8);
            title += format(" %*s |", width, column.title);
            rule += std::string(width + 1, '-') + ":|";
            line += format(" %*s |", width,
                           number(column.value,
                                  column.value < 1      ? 3
                                  : column.value < 1000 ? 2
                                                        : 0,
                                  "-")
                               .c_str());
        }
        printf("%s%s\n", &c == &candidates[0] ? (title + "\n" + rule + "\n").c_str() : "", line.c_str());
    }
    fputs(o.json ? "\n ]}\n" : "", stdout);
    return 0;
} catch (const std::exception & e) {  // no memory, no thread
    fail(1, "%s; take fewer --threads, or a smaller --depth, --batch or --layers", e.what());
}
