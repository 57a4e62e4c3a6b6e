// The attention kernels of cuda/ on an emulated GPU against attention in float64: no GPU, no nvcc. The cases are those
// of test-turbokv-ops, which runs the kernels as nvcc compiles them.
//
// What it cannot show: that the instructions do what tests/cuda/on-cpu/common.cuh says, and races within a warp.

#include "common.cuh"
#include "flash-attn.cuh"
#include "ops-attention.h"

static const char * const HELP =
    R"(cuda/'s attention for few queries on an emulated GPU, against float64.

    test-turbokv-cuda-attention [--every N] [--from M]

  --every N   only every N-th case (1: all, a quarter of an hour)
  --from M    from the M-th on
)";

// What the kernels are told that they run on: many and few blocks; shared memory for four tiles of each group, and for
// hardly two, so that slots are used again.
static const cuda_device gpus[] = {
    { __CUDA_ARCH__, 132, 227 * 1024 },
    { __CUDA_ARCH__, 1, 227 * 1024 },
    { __CUDA_ARCH__, 2, 99 * 1024 },
    { __CUDA_ARCH__, 1, 64 * 1024 },
};

static bool supports(ggml_backend_t, const ggml_tensor * op) {
    return op->op != GGML_OP_FLASH_ATTN_EXT || turbokv_cuda_decode_alloc_size(0, op) > 0;
}

static enum ggml_status compute(ggml_backend_t, ggml_cgraph * nodes) {
    for (int i = 0; i < ggml_graph_n_nodes(nodes); ++i) {
        ggml_tensor * op = ggml_graph_node(nodes, i);
        if (op->op != GGML_OP_FLASH_ATTN_EXT) {
            continue;  // views
        }
        const size_t              bytes = turbokv_cuda_decode_alloc_size(0, op), beyond = 4096;
        std::vector<uint8_t>      memory(bytes + beyond + 256, 0xff);
        uint8_t *                 data = (uint8_t *) (((uintptr_t) memory.data() + 127) & ~(uintptr_t) 127);
        void *                    home = op->data;
        ggml_backend_cuda_context context;
        op->data        = data;
        const bool done = turbokv_cuda_decode(context, op);
        op->data        = home;
        memcpy(home, data, ggml_nbytes(op));
        if (!done || std::any_of(data + bytes, data + bytes + beyond, [](uint8_t b) { return b != 0xff; })) {
            fail(format("%s: %s", current.c_str(), done ? "scratch beyond what was asked for" : "not done"));
        }
    }
    return GGML_STATUS_SUCCESS;
}

int main(int argc, char ** argv) {
    int every = 1, from = 0;
    for (int i = 1; i < argc; ++i) {
        int * number = strcmp(argv[i], "--every") == 0 ? &every : strcmp(argv[i], "--from") == 0 ? &from : nullptr;
        if (strcmp(argv[i], "--help") == 0) {
            fputs(HELP, stdout);
            return 0;
        }
        if (number == nullptr || i + 1 == argc || (*number = atoi(argv[++i])) < (number == &every)) {
            fputs(HELP, stderr);
            return 2;
        }
    }
    const int no_device = open_device("CPU");
    if (no_device != 0) {
        return no_device;
    }
    on_cpu        = false;  // the cases, and what is expected of NaN
    supports_op   = supports;
    compute_graph = compute;

    tally      flash_attn("FLASH_ATTN_EXT", MAX_NMSE), poisoned("FLASH_ATTN_EXT of NaN", MAX_NMSE);
    const auto cases = attention_cases(false);
    for (size_t i = from; i < cases.size(); i += every) {
        const attention_case & c = cases[i];
        tally &                t = c.with.poison == NOTHING ? flash_attn : poisoned;
        the_gpu.devices[0]       = gpus[i / every % 4];
        const double work        = (double) c.n_batch * c.gqa * c.n_kv * c.n_stream;
        if (c.n_batch > 2 * TURBOKV_DECODE_MAX_QUERIES || work > 1e6) {
            t.n_absent++;
        } else {
            test_flash_attn(c, t);
        }
    }
    flash_attn.print();
    poisoned.print();
    if (n_failures != 0) {
        fprintf(stderr, "%d failures\n", n_failures);
    }
    ggml_backend_free(backend);
    return n_failures != 0;
}
