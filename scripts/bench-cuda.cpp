// Times FLASH_ATTN_EXT or SET_ROWS of one device, for KV caches of any type, and holds it against the bandwidth of a
// copy on that device. Only ggml's public API, so that any build can be compared.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static const char * const PROGRAM = "turbokv-bench-cuda";

static const char * const HELP =
    R"(Times attention over a KV cache on a GPU: the FLASH_ATTN_EXT operation alone, without a model.

    turbokv-bench-cuda --cache f16,q8_0,turbo3,q8_0/turbo3 --heads 32 --kv-heads 8 --depth 32768

  --op NAME        attention, or set-rows: one token batch written to K and V   (attention)
  --cache LIST     caches to compare, K/V or one name for both; one named twice shows the noise
                   (f16,q8_0,q4_0,turbo4,turbo3,turbo2,tbq3,q8_0/turbo3)
  --heads N        query heads                                  (32)
  --kv-heads N     heads in the cache                           (8)
  --head-size N    values per head                              (128)
  --depth N        keys in the cache, the batch included        (32768)
  --batch N        query tokens: 1 is decoding, more is prefill (1)
  --seqs N         sequences, each with a cache of its own      (1)
  --layers N       operations per graph, each with its own cache
                   (so many that the caches of a graph take 256 MiB, 4 at least where the memory allows; 1 for
                   batches over 64)
  --rounds N       measurements of each cache, in shuffled order (20)
  --ms N           length of a measurement in milliseconds      (10)
  --device NAME    CUDA0, CPU, ..                               (CUDA0)
  --json           one line of JSON with every time

What is measured: a graph of --layers operations is computed again and again without waiting, for --ms milliseconds, and
then the host waits once. A time is that wall time / graphs / layers. ggml's CUDA backend replays such a graph as a CUDA
graph from the third time on, so that it is kernel time with the gaps between the kernels of one stream. No operation
finds its cache in L2: all others were read since. set-rows counts K and V together as one operation. Values are normally
distributed; the rotation that llama.cpp's graph does for quantized caches is no part of this.

Columns: median, fastest and slowest time of an operation; its ratio to f16's time, median over the rounds (less is
faster); packed bytes of K and V (set-rows: bytes written) per time; and their share of the bandwidth of a copy on the
device in the same rounds, bytes read and written together.
Exit codes: 1 for a failure, 2 for wrong arguments, 77 where there is no such CUDA device.
)";

#include "bench.h"

struct options : shape_options {
    std::string caches   = "f16,q8_0,q4_0,turbo4,turbo3,turbo2,tbq3,q8_0/turbo3";
    std::string op       = "attention";
    std::string device   = "CUDA0";
    int64_t     n_seqs   = 1;
    int64_t     n_layers = 0;
    int64_t     n_rounds = 20;
    int64_t     ms       = 10;
    bool        json     = false;

    options() {
        n_head    = 32;
        n_head_kv = 8;
        depth     = 32768;
    }

    bool attention() const { return op == "attention"; }
};

static options parse(int argc, char ** argv) {
    options o;
    parse_options(argc, argv,
                  o.numbers({
                      { "--seqs", &o.n_seqs, 1024 },
                      { "--layers", &o.n_layers, 1 << 12 },
                      { "--rounds", &o.n_rounds, 100000 },
                      { "--ms", &o.ms, 60000 },
                  }),
                  { { "--cache", &o.caches }, { "--op", &o.op }, { "--device", &o.device } },
                  { { "--json", &o.json } });
    o.check();
    if (o.op != "attention" && o.op != "set-rows") {
        fail(2, "--op is attention or set-rows, not '%s'", o.op.c_str());
    }
    return o;
}

// What can be filled with values; whether the device has the operation is asked for each.
static std::vector<ggml_type> cache_types() {
    std::vector<ggml_type> types;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const ggml_type          t      = (ggml_type) i;
        const ggml_type_traits * traits = ggml_get_type_traits(t);
        if (traits->type_name && traits->blck_size != 0 && (t == GGML_TYPE_F32 || traits->from_float_ref)) {
            types.push_back(t);
        }
    }
    return types;
}

// The rows of x again and again, from another one on each time: encoded once, which takes the host long.
static void fill(ggml_tensor * t, const std::vector<float> & x) {
    const int64_t        n_rows = std::min<int64_t>(x.size() / t->ne[0], ggml_nrows(t));
    const size_t         row    = ggml_row_size(t->type, t->ne[0]);
    std::vector<uint8_t> bytes(n_rows * row);
    if (t->type == GGML_TYPE_F32) {
        memcpy(bytes.data(), x.data(), bytes.size());
    } else {
        ggml_quantize_chunk(t->type, x.data(), bytes.data(), 0, n_rows, t->ne[0], nullptr);
    }
    const size_t size = ggml_nbytes(t);
    for (size_t at = 0, turn = 0; at < size; turn++) {
        const size_t from = turn * 7 % n_rows * row;
        const size_t n    = std::min(bytes.size() - from, size - at);
        ggml_backend_tensor_set(t, bytes.data() + from, at, n);
        at += n;
    }
}

// One graph, computed again and again; or a copy.
struct workload : cache_pair {
    double                  bytes    = 0;  // of one operation
    int64_t                 n_layers = 1;
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph *           graph = nullptr;
    ggml_tensor *           from = nullptr, *to = nullptr;  // of a copy
    int64_t                 n_graphs = 1;                   // per measurement
    std::vector<double>     times;                          // of one operation, in seconds

    void begin(int64_t n_tensors) {
        ctx.reset(ggml_init(
            { (size_t) n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom((size_t) n_tensors, false),
              nullptr, true }));
        graph = ggml_new_graph_custom(ctx.get(), (size_t) n_tensors, false);
    }

    void allocate(ggml_backend_t backend) {
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            if (!ggml_backend_supports_op(backend, node)) {
                fail(1, "%s has no %s for %s", ggml_backend_name(backend), ggml_op_name(node->op), name.c_str());
            }
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            fail(1, "no memory for %s: take a smaller --depth, --seqs or --layers", name.c_str());
        }
    }

    // Seconds of one operation.
    double run(ggml_backend_t backend, int64_t n) const {
        const double start = now();
        for (int64_t i = 0; i < n; ++i) {
            if (from) {
                ggml_backend_tensor_copy_async(backend, backend, from, to);
            } else if (ggml_backend_graph_compute_async(backend, graph) != GGML_STATUS_SUCCESS) {
                fail(1, "%s failed", name.c_str());
            }
        }
        ggml_backend_synchronize(backend);
        return (now() - start) / (n * n_layers);
    }

    // The first two calls run outside a CUDA graph, the third captures and instantiates one.
    void warm_up(ggml_backend_t backend, const options & o) {
        run(backend, 4);
        const double seconds = run(backend, 4) * n_layers;
        n_graphs             = std::max<int64_t>(2, std::llround(std::min(1e5, o.ms * 1e-3 / seconds)));
    }
};

static void parse_cache(workload & w, const std::string & pair, const options & o) {
    (cache_pair &) w = cache_pair(pair, o.head_size, cache_types());
    const size_t row = ggml_row_size(w.type_k, o.head_size) + ggml_row_size(w.type_v, o.head_size);
    w.bytes          = (double) row * o.n_head_kv * o.n_seqs * (o.attention() ? o.depth : o.batch);
}

// `memory`: how much of the device a cache may take. set-rows has caches of --depth, too, though it reads none.
static void choose_layers(workload & w, const options & o, double memory) {
    const double cache = w.bytes / (o.attention() ? 1 : o.batch) * (o.attention() ? 1 : o.depth);
    w.n_layers         = o.n_layers;
    if (w.n_layers == 0) {
        w.n_layers = o.attention() && o.batch > 64 ? 1 : (int64_t) std::ceil((256 << 20) / cache);
        if (w.n_layers < 4 && !(o.attention() && o.batch > 64) && 4 * cache < memory) {
            w.n_layers = 4;
        }
        w.n_layers = std::min<int64_t>(w.n_layers, 1024);
    }
}

// The cache of a layer as llama.cpp lays it out: [head size * KV heads, cells, sequences].
static ggml_tensor * new_store(workload & w, ggml_type type, const options & o) {
    return ggml_new_tensor_3d(w.ctx.get(), type, o.head_size * o.n_head_kv, o.depth, o.n_seqs);
}

static void copy_layers(const std::vector<ggml_tensor *> & tensors, const std::vector<float> & x) {
    fill(tensors[0], x);
    for (size_t i = 1; i < tensors.size(); ++i) {
        ggml_backend_tensor_copy(tensors[0], tensors[i]);
    }
}

static void build_attention(workload & w, ggml_backend_t backend, const options & o, const std::vector<float> & x) {
    w.begin(16 * w.n_layers + 16);
    ggml_context *             c    = w.ctx.get();
    ggml_tensor *              mask = ggml_new_tensor_4d(c, GGML_TYPE_F16, o.depth, o.batch, 1, o.n_seqs);
    std::vector<ggml_tensor *> queries, keys, values;
    ggml_tensor *              out  = nullptr;
    const auto                 view = [&](ggml_tensor * s) {
        ggml_tensor * v = ggml_view_4d(c, s, o.head_size, o.n_head_kv, o.depth, o.n_seqs,
                                                       ggml_row_size(s->type, o.head_size), s->nb[1], s->nb[2], 0);
        return ggml_permute(c, v, 0, 2, 1, 3);
    };
    for (int64_t i = 0; i < w.n_layers; ++i) {
        queries.push_back(ggml_new_tensor_4d(c, GGML_TYPE_F32, o.head_size, o.n_head, o.batch, o.n_seqs));
        keys.push_back(new_store(w, w.type_k, o));
        values.push_back(new_store(w, w.type_v, o));
        out = ggml_flash_attn_ext(c, ggml_permute(c, queries.back(), 0, 2, 1, 3), view(keys.back()),
                                  view(values.back()), mask, 1.0f / sqrtf((float) o.head_size), 0.0f, 0.0f);
        ggml_build_forward_expand(w.graph, out);
    }
    w.allocate(backend);
    copy_layers(queries, x);
    copy_layers(keys, x);
    copy_layers(values, x);
    std::vector<ggml_fp16_t> m(o.depth * o.batch);  // causal: the batch is the end of the sequence
    for (int64_t i = 0; i < o.depth * o.batch; ++i) {
        m[i] = ggml_fp32_to_fp16(i % o.depth <= o.depth - o.batch + i / o.depth ? 0.0f : -INFINITY);
    }
    for (int64_t s = 0; s < o.n_seqs; ++s) {
        ggml_backend_tensor_set(mask, m.data(), s * mask->nb[3], m.size() * sizeof(m[0]));
    }
    w.run(backend, 1);
    std::vector<float> y(o.head_size);
    ggml_backend_tensor_get(out, y.data(), 0, y.size() * sizeof(float));
    if (!std::all_of(y.begin(), y.end(), [](float v) { return std::isfinite(v); })) {
        fail(1, "attention over %s is not finite", w.name.c_str());
    }
}

static void build_set_rows(workload & w, ggml_backend_t backend, const options & o, const std::vector<float> & x) {
    w.begin(16 * w.n_layers + 16);
    ggml_context *             c   = w.ctx.get();
    ggml_tensor *              ids = ggml_new_tensor_2d(c, GGML_TYPE_I64, o.batch, o.n_seqs);
    std::vector<ggml_tensor *> rows;
    for (int64_t i = 0; i < w.n_layers; ++i) {
        for (ggml_type type : { w.type_k, w.type_v }) {
            rows.push_back(ggml_new_tensor_3d(c, GGML_TYPE_F32, o.head_size * o.n_head_kv, o.batch, o.n_seqs));
            ggml_build_forward_expand(w.graph, ggml_set_rows(c, new_store(w, type, o), rows.back(), ids));
        }
    }
    w.allocate(backend);
    copy_layers(rows, x);
    std::vector<int64_t> i(o.batch * o.n_seqs);
    for (size_t j = 0; j < i.size(); ++j) {
        i[j] = o.depth - o.batch + j % o.batch;
    }
    ggml_backend_tensor_set(ids, i.data(), 0, ggml_nbytes(ids));
}

// A copy of 1 GiB, or of what fits: bytes count twice, read and written. Not as an operation: in a CUDA graph the copy
// engine would do it, which is slower than the kernel that does it otherwise.
static void build_copy(workload & w, ggml_backend_t backend, double memory) {
    const int64_t n = (int64_t) std::min<double>(1 << 28, memory / 16);  // floats
    w.name          = "a copy";
    w.bytes         = 8.0 * n;
    w.begin(16);
    w.from = ggml_new_tensor_1d(w.ctx.get(), GGML_TYPE_F32, n);
    w.to   = ggml_new_tensor_1d(w.ctx.get(), GGML_TYPE_F32, n);
    w.allocate(backend);
    ggml_backend_buffer_clear(w.buffer.get(), 0x5a);
}

int main(int argc, char ** argv) {
    const options o = parse(argc, argv);
    ggml_backend_load_all();
    ggml_backend_dev_t device = ggml_backend_dev_by_name(o.device.c_str());
    if (device == nullptr) {
        std::string names;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            names += std::string(" ") + ggml_backend_dev_name(ggml_backend_dev_get(i));
        }
        fail(o.device.rfind("CUDA", 0) == 0 ? 77 : 2, "there is no device %s, only:%s", o.device.c_str(),
             names.c_str());
    }
    ggml_backend_ptr backend{ ggml_backend_dev_init(device, nullptr) };
    if (!backend) {
        fail(1, "%s could not be initialized", o.device.c_str());
    }
    std::vector<workload> caches;
    for (size_t start = 0, end = 0; end != std::string::npos; start = end + 1) {
        end = o.caches.find(',', start);
        caches.emplace_back();
        parse_cache(caches.back(), o.caches.substr(start, end - start), o);
    }

    size_t free_bytes, total_bytes;
    ggml_backend_dev_memory(device, &free_bytes, &total_bytes);
    const double memory = 0.8 * (double) free_bytes / (double) (caches.size() + 1);
    workload     copy;
    build_copy(copy, backend.get(), std::min(memory, 16e9));
    copy.warm_up(backend.get(), o);
    const std::vector<float> x = gaussian(1 << 20);
    for (workload & w : caches) {
        choose_layers(w, o, memory);
        o.attention() ? build_attention(w, backend.get(), o, x) : build_set_rows(w, backend.get(), o, x);
        w.warm_up(backend.get(), o);
    }

    // Other clocks or other work then meet all caches alike.
    std::vector<workload *> order{ &copy };
    for (workload & w : caches) {
        order.push_back(&w);
    }
    std::mt19937 rng(42);
    for (int64_t round = 0; round < o.n_rounds; ++round) {
        std::shuffle(order.begin(), order.end(), rng);
        for (workload * w : order) {
            w->run(backend.get(), 1);  // the clocks and the queue as they are in the middle of a measurement
            w->times.push_back(w->run(backend.get(), w->n_graphs));
        }
    }

    const double copy_bytes_s = copy.bytes / median(copy.times);
    const char * gpu          = ggml_backend_dev_description(device);
    if (o.json) {
        printf(
            "{\"device\": \"%s\", \"op\": \"%s\", \"heads\": %d, \"kv_heads\": %d, \"head_size\": %d, \"depth\": %d, "
            "\"batch\": %d, \"seqs\": %d, \"rounds\": %d, \"copy_GB_per_s\": %.1f, \"caches\": [",
            gpu, o.op.c_str(), (int) o.n_head, (int) o.n_head_kv, (int) o.head_size, (int) o.depth, (int) o.batch,
            (int) o.n_seqs, (int) o.n_rounds, copy_bytes_s / 1e9);
    } else {
        printf(
            "%s: %s, %d heads of %d, %d in the cache, depth %d, batch %d, %d sequences; %d rounds\n"
            "copy on the device: %.0f GB/s read and written\n\n"
            "| cache         | layers |    us/op |  fastest |  slowest | time / f16 |   GB/s | of copy |\n"
            "|---------------|-------:|---------:|---------:|---------:|-----------:|-------:|--------:|\n",
            gpu, o.op.c_str(), (int) o.n_head, (int) o.head_size, (int) o.n_head_kv, (int) o.depth, (int) o.batch,
            (int) o.n_seqs, (int) o.n_rounds, copy_bytes_s / 1e9);
    }
    const auto f16 = std::find_if(caches.begin(), caches.end(), [](auto & w) { return w.name == "f16"; });
    for (const workload & w : caches) {
        std::vector<double> ratios;
        for (size_t i = 0; f16 != caches.end() && i < w.times.size(); ++i) {
            ratios.push_back(w.times[i] / f16->times[i]);
        }
        const double time    = median(w.times);
        const auto   range   = std::minmax_element(w.times.begin(), w.times.end());
        const double bytes_s = w.bytes / time;
        char         ratio[32];
        snprintf(ratio, sizeof(ratio), "%.4f", ratios.empty() ? 0.0 : median(ratios));
        if (o.json) {
            printf(
                "%s{\"cache\": \"%s\", \"layers\": %d, \"bytes\": %.0f, \"us\": %.3f, \"us_min\": %.3f, "
                "\"us_max\": %.3f, \"ratio_to_f16\": %s, \"GB_per_s\": %.1f, \"share_of_copy\": %.4f, \"us_all\": [",
                &w == &caches[0] ? "" : ", ", w.name.c_str(), (int) w.n_layers, w.bytes, time * 1e6, *range.first * 1e6,
                *range.second * 1e6, ratios.empty() ? "null" : ratio, bytes_s / 1e9, bytes_s / copy_bytes_s);
            for (const double & t : w.times) {
                printf("%s%.3f", &t == &w.times[0] ? "" : ", ", t * 1e6);
            }
            printf("]}");
        } else {
            printf("| %-13s | %6d | %8.2f | %8.2f | %8.2f | %10s | %6.0f | %6.1f%% |\n", w.name.c_str(),
                   (int) w.n_layers, time * 1e6, *range.first * 1e6, *range.second * 1e6, ratios.empty() ? "-" : ratio,
                   bytes_s / 1e9, 100 * bytes_s / copy_bytes_s);
        }
    }
    fputs(o.json ? "]}\n" : "", stdout);
    return 0;
}
