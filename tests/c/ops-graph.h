// Shared by the tests of graph operations: a small graph on the CPU backend, a KV cache in it, and a report.

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
#include <vector>

static const ggml_type our_types[] = {
#include "turbokv-cache-types.inc"
};

static std::mt19937 rng(42);
static int          n_failures = 0;
static std::string  current;  // what ggml was asked for when it aborts

static std::string format(const char * fmt, ...) {
    char    text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return text;
}

// One line of the report: all cases of one operation.
struct tally {
    const char * op;
    double       limit;
    int          n_cases = 0;
    double       worst   = -1.0;
    std::string  worst_case;

    tally(const char * op, double limit) : op(op), limit(limit) {}

    void add(double nmse, const std::string & what) {
        n_cases++;
        if (!(nmse <= limit)) {  // also when it is NaN
            n_failures++;
            const std::string how =
                limit == 0.0 ? "bytes differ from the reference codec's" : format("NMSE %g, limit %g", nmse, limit);
            fprintf(stderr, "FAIL %s %s: %s\n", op, what.c_str(), how.c_str());
        }
        if (!(nmse <= worst)) {
            worst      = nmse;
            worst_case = what;
        }
    }

    void print() const {
        if (worst == 0.0) {
            printf("%-15s %5d cases, bit-exact\n", op, n_cases);
        } else {
            printf("%-15s %5d cases, worst NMSE %.1e (limit %.0e): %s\n", op, n_cases, worst, limit,
                   worst_case.c_str());
        }
    }
};

static std::vector<float> gaussian(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float>              x(n);
    for (float & v : x) {
        v = normal(rng);
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
    std::vector<uint8_t> q(x.size() / row * ggml_row_size(type, row));
    ggml_get_type_traits(type)->from_float_ref(x.data(), q.data(), x.size());
    return q;
}

static std::vector<float> decode(ggml_type type, const void * row, int64_t n) {
    std::vector<float> x(n);
    ggml_get_type_traits(type)->to_float(row, x.data(), n);
    return x;
}

// A graph of a few tensors on the CPU backend. Three threads: their shares of the work are uneven.
struct graph {
    ggml_backend_ptr backend{ ggml_backend_cpu_init() };
    ggml_context_ptr ctx{ ggml_init({ 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_buffer_ptr buffer;

    graph() { ggml_backend_cpu_set_n_threads(backend.get(), 3); }

    ggml_tensor * tensor(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        return ggml_new_tensor_4d(ctx.get(), type, ne0, ne1, ne2, ne3);
    }

    void allocate() { buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get())); }

    void compute(ggml_tensor * out) {
        ggml_cgraph * gf = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(gf, out);
        current = format("%s with %s", ggml_op_name(out->op), ggml_type_name(out->src[0]->type));
        if (!ggml_backend_supports_op(backend.get(), out) ||
            ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            n_failures++;
            fprintf(stderr, "FAIL %s is not supported\n", current.c_str());
        }
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
        : head(head), n_head(n_head), n_kv(n_kv), n_stream(n_stream), size(n_kv + 3) {
        store = g.tensor(type, head * n_head, size, n_stream);
    }

    // What attention sees: [head, n_kv, n_head, n_stream].
    ggml_tensor * view(graph & g) const {
        ggml_tensor * v = ggml_view_4d(g.ctx.get(), store, head, n_head, n_kv, n_stream,
                                       ggml_row_size(store->type, head), store->nb[1], store->nb[2], 0);
        return ggml_permute(g.ctx.get(), v, 0, 2, 1, 3);
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
