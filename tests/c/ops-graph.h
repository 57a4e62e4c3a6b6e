// Shared by the tests of graph operations: a small graph on one device, a KV cache in it, and a report.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

static const ggml_type our_types[] = {
#include "turbokv-cache-types.inc"
};

static const int MAX_REPORTS = 30;

static std::mt19937   rng(42);
static int            n_failures = 0;
static std::string    current;  // what ggml was asked for when it aborts
static ggml_backend_t backend = nullptr;
static bool           on_cpu  = true;
static int            n_runs  = 1;  // on a GPU 3: called, captured, replayed

// What the device does, and how: a test may have a device that ggml does not know.
static bool (*supports_op)(ggml_backend_t, const ggml_tensor *)         = ggml_backend_supports_op;
static enum ggml_status (*compute_graph)(ggml_backend_t, ggml_cgraph *) = ggml_backend_graph_compute;

static std::string format(const char * fmt, ...) {
    char    text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return text;
}

static void fail(const std::string & what) {
    if (++n_failures <= MAX_REPORTS) {
        fprintf(stderr, "FAIL %s\n", what.c_str());
    } else if (n_failures == MAX_REPORTS + 1) {
        fprintf(stderr, "FAIL: more failures are only counted\n");
    }
}

// Exit code 77: skipped, for ctest. Unknown names: the list of devices, and 2.
static int open_device(const char * name) {
    ggml_backend_load_all();
    ggml_backend_dev_t device = ggml_backend_dev_by_name(name);
    if (device != nullptr) {
        backend = ggml_backend_dev_init(device, nullptr);
        on_cpu  = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
        if (backend == nullptr) {
            fprintf(stderr, "%s could not be initialized\n", name);
            return 1;
        }
        if (on_cpu) {
            ggml_backend_cpu_set_n_threads(backend, 3);  // three: their shares of the work are uneven
        } else {
            n_runs = 3;
            printf("%s: %s\n", name, ggml_backend_dev_description(device));
        }
        return 0;
    }
    if (strncmp(name, "CUDA", 4) == 0 && strspn(name + 4, "0123456789") == strlen(name + 4)) {
        printf("skipped: this build or machine has no device %s\n", name);
        return 77;
    }
    fprintf(stderr, "there is no device '%s', only:", name);
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        fprintf(stderr, " %s", ggml_backend_dev_name(ggml_backend_dev_get(i)));
    }
    fprintf(stderr, "\n");
    return 2;
}

// f(i) for all i below n, on all cores where `work`, in steps, is worth it.
template <typename F>
static void parallel_for(int64_t n, double work, F f) {
    const int64_t n_threads = std::min<int64_t>(n, work < 1e6 ? 1 : std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < n_threads; ++t) {
        threads.emplace_back([=] {
            for (int64_t i = t; i < n; i += n_threads) {
                f(i);
            }
        });
    }
    for (int64_t i = 0; i < n; i += n_threads) {
        f(i);
    }
    for (std::thread & t : threads) {
        t.join();
    }
}

// One line of the report: all cases of one operation.
struct tally {
    const char * op;
    double       limit;
    int          n_cases  = 0;
    int          n_absent = 0;  // this device does not do them, and need not
    double       worst    = -1.0;
    std::string  worst_case;

    tally(const char * op, double limit) : op(op), limit(limit) {}

    void add(double nmse, const std::string & what) {
        n_cases++;
        if (!(nmse <= limit)) {  // also when it is NaN
            const std::string how =
                limit == 0.0 ? "bytes differ from the reference codec's" : format("NMSE %g, limit %g", nmse, limit);
            fail(format("%s %s: %s", op, what.c_str(), how.c_str()));
        }
        if (!(nmse <= worst)) {
            worst      = nmse;
            worst_case = what;
        }
    }

    void print() const {
        if (n_cases == 0) {
            printf("%-22s %s\n", op, n_absent == 0 ? "no case" : "not on this device");
            return;
        }
        const std::string absent = n_absent == 0 ? "" : format(" (%d more are not on this device)", n_absent);
        if (worst == 0.0) {
            printf("%-22s %5d cases, bit-exact%s\n", op, n_cases, absent.c_str());
        } else {
            printf("%-22s %5d cases, worst NMSE %.1e (limit %.0e): %s%s\n", op, n_cases, worst, limit,
                   worst_case.c_str(), absent.c_str());
        }
    }
};

// From a pool: to make them anew would take most of the time.
static std::vector<float> gaussian(int64_t n) {
    static const std::vector<float> pool = [] {
        std::normal_distribution<float> normal;
        std::vector<float>              x(1048573);  // a prime: no row falls on its own repetition
        std::generate(x.begin(), x.end(), [&] { return normal(rng); });
        return x;
    }();
    std::vector<float> x(n);
    size_t             from = rng() % pool.size();
    for (float & v : x) {
        v    = pool[from];
        from = from + 1 == pool.size() ? 0 : from + 1;
    }
    return x;
}

static double nmse(const std::vector<float> & out, const std::vector<double> & ref) {
    double error = 0.0;
    double power = 0.0;
    for (size_t i = 0; i < ref.size(); ++i) {
        error += (out[i] - ref[i]) * (out[i] - ref[i]);
        power += ref[i] * ref[i];
    }
    return error / power;
}

// Exact operations: 0 when every byte is the expected one, else infinite.
static double differs(const void * a, const void * b, size_t size) {
    return memcmp(a, b, size) == 0 ? 0.0 : INFINITY;
}

static std::vector<uint8_t> encode(ggml_type type, const std::vector<float> & x, int64_t row) {
    const size_t         bytes = ggml_row_size(type, row);
    std::vector<uint8_t> q(x.size() / row * bytes);
    parallel_for(x.size() / row, 8.0 * x.size(),
                 [&, from_float = ggml_get_type_traits(type)->from_float_ref](int64_t r) {
                     from_float(x.data() + r * row, q.data() + r * bytes, row);
                 });
    return q;
}

static std::vector<float> decode(ggml_type type, const void * row, int64_t n) {
    std::vector<float> x(n);
    ggml_get_type_traits(type)->to_float(row, x.data(), n);
    return x;
}

// A graph of a few tensors, all of it on the device.
struct graph {
    ggml_context_ptr        ctx{ ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph *           nodes = nullptr;

    ggml_tensor * tensor(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx.get(), type, ne0, ne1, ne2, ne3);
    }

    // Memory for all tensors, and for `out` what the device wants beside its data. False where the device does not do
    // an operation: a failure that names it, unless `required` is false.
    bool allocate(ggml_tensor * out, tally & t, bool required = true) {
        nodes = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(nodes, out);
        current = format("%s with %s", ggml_op_name(out->op), ggml_type_name(out->src[0]->type));
        for (int i = 0; i < ggml_graph_n_nodes(nodes); ++i) {
            if (supports_op(backend, ggml_graph_node(nodes, i))) {
                continue;
            }
            if (required) {
                fail(format("not on this device: %s", describe(ggml_graph_node(nodes, i)).c_str()));
            }
            t.n_absent++;
            return false;
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            fail(format("no memory for %s", describe(out).c_str()));
        }
        return buffer != nullptr;
    }

    void compute() {
        const enum ggml_status status = compute_graph(backend, nodes);
        if (status != GGML_STATUS_SUCCESS) {
            fail(format("%s: status %d", current.c_str(), status));
        }
    }

    static std::string describe(const ggml_tensor * node) {
        std::string text = ggml_op_name(node->op);
        for (int i = 0; i < GGML_MAX_SRC && node->src[i] != nullptr; ++i) {
            const ggml_tensor * s = node->src[i];
            text += format("%s %s[%d,%d,%d,%d]", i == 0 ? "" : ",", ggml_type_name(s->type), (int) s->ne[0],
                           (int) s->ne[1], (int) s->ne[2], (int) s->ne[3]);
        }
        return text + format(" -> %s", ggml_type_name(node->type));
    }
};

template <typename T>
static void set(ggml_tensor * t, const std::vector<T> & values) {
    GGML_ASSERT(values.size() * sizeof(T) == ggml_nbytes(t));
    ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
}

template <typename T>
static std::vector<T> get(const ggml_tensor * t) {
    std::vector<T> values(ggml_nbytes(t) / sizeof(T));
    ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
    return values;
}

// A K or V cache as llama.cpp lays it out: a row per token with all its heads, a plane per stream, and cells beyond
// the used ones. Those hold bytes that decode to NaN, so that reading them shows.
struct cache {
    int64_t       head, n_head, n_kv, n_stream;
    int64_t       size;  // cells per stream
    ggml_tensor * store;

    cache(graph & g, ggml_type type, int64_t head, int64_t n_head, int64_t n_kv, int64_t n_stream)
        : head(head), n_head(n_head), n_kv(n_kv), n_stream(n_stream), size(n_kv + 16) {
        store = g.tensor(type, head * n_head, size, n_stream);
    }

    // What attention sees: [head, n_kv, n_head, n_stream].
    ggml_tensor * view(graph & g) const {
        ggml_tensor * v = ggml_view_4d(g.ctx.get(), store, head, n_head, n_kv, n_stream,
                                       ggml_row_size(store->type, head), store->nb[1], store->nb[2], 0);
        return ggml_permute(g.ctx.get(), v, 0, 2, 1, 3);
    }

    // Of one head of one token in the first stream.
    size_t offset(int64_t token, int64_t h) const {
        return token * store->nb[1] + h * ggml_row_size(store->type, head);
    }

    void fill() const {
        std::vector<uint8_t> bytes(ggml_nbytes(store), 0xff);
        for (int64_t s = 0; s < n_stream; ++s) {
            const std::vector<uint8_t> q = encode(store->type, gaussian(n_kv * head * n_head), head * n_head);
            memcpy(bytes.data() + s * store->nb[2], q.data(), q.size());
        }
        set(store, bytes);
    }

    // All cells, decoded once: [n_stream][n_kv][n_head * head].
    std::vector<float> decoded() const {
        const std::vector<uint8_t> bytes = get<uint8_t>(store);
        std::vector<float>         all;
        for (int64_t s = 0; s < n_stream; ++s) {
            const std::vector<float> plane = decode(store->type, bytes.data() + s * store->nb[2], n_kv * head * n_head);
            all.insert(all.end(), plane.begin(), plane.end());
        }
        return all;
    }
};
