// Our types in the graph operations that a KV cache needs, on one device, through ggml's public interface.
//
// What moves or converts values must match the reference codec to the bit. MUL_MAT and FLASH_ATTN_EXT on the CPU
// quantize their float operand to q8_0 first (f16 for an f16 K). For normally distributed values that alone is a
// relative error of (amax / 127)^2 / 12, about 3e-5 of the power; rounding adds less. Attention passes it on roughly
// one to one, because scores of unit variance move by what the query moves. The worst of our small cases measures 1e-4.
// A GPU has the same limit: its kernels round to f16.

#include "ops-attention.h"

#include <cstdlib>

static const char * const HELP =
    R"(Our types in the operations of a KV cache: SET_ROWS, GET_ROWS, CPY, MUL_MAT, FLASH_ATTN_EXT.

    test-turbokv-ops [--device NAME] [--full [SHARD/SHARDS]] [--every N]

  --device NAME   CPU, CUDA0, ..  (CPU)
  --full          every pair of types with every shape: hours on two cores, minutes on a GPU; a shard takes every
                  SHARDS-th case of attention from number SHARD on
  --every N       only every N-th case of attention: for compute-sanitizer

Exit codes: 0 all is right, 1 something is not, 2 wrong arguments, 77 this machine or build lacks the CUDA device.
)";

static void test_quantize_chunk(ggml_type type, tally & t) {
    const int64_t              row   = 3 * ggml_blck_size(type);
    const std::vector<float>   x     = gaussian(5 * row);
    const std::vector<uint8_t> ref   = encode(type, x, row);
    const size_t               bytes = ggml_row_size(type, row);
    std::vector<uint8_t>       q(ref.size(), 0xa5);
    current         = format("ggml_quantize_chunk to %s", ggml_type_name(type));
    size_t written  = ggml_quantize_chunk(type, x.data(), q.data(), 2 * row, 3, row, nullptr);  // from the third row on
    const bool kept = written == 3 * bytes && q[2 * bytes - 1] == 0xa5;
    t.add(kept ? differs(q.data() + 2 * bytes, ref.data() + 2 * bytes, 3 * bytes) : INFINITY,
          format("%s, rows 2-4", ggml_type_name(type)));
    ggml_quantize_chunk(type, x.data(), q.data(), 0, 5, row, nullptr);
    t.add(differs(q.data(), ref.data(), ref.size()), format("%s, all rows", ggml_type_name(type)));
}

static void test_get_rows(ggml_type type, tally & t) {
    const int64_t row = 3 * ggml_blck_size(type), n_rows = 11, n_planes = 3, n_ids = 7;
    graph         g;
    ggml_tensor * src = g.tensor(type, row, n_rows, n_planes);
    ggml_tensor * ids = g.tensor(GGML_TYPE_I32, n_ids, n_planes);
    ggml_tensor * out = ggml_get_rows(g.ctx.get(), src, ids);
    if (!g.allocate(out, t)) {
        return;
    }
    const std::vector<uint8_t> q = encode(type, gaussian(row * n_rows * n_planes), row);
    std::vector<int32_t>       i(n_ids * n_planes);
    for (size_t j = 0; j < i.size(); ++j) {
        i[j] = (5 * j + j / n_ids) % n_rows;  // neither in order nor the same in all planes
    }
    i[1] = i[0];  // a row may be asked for twice
    set(src, q);
    set(ids, i);
    g.compute();
    const std::vector<float> y     = get<float>(out);
    double                   worst = 0.0;
    for (size_t j = 0; j < i.size(); ++j) {
        const std::vector<float> ref = decode(type, q.data() + (j / n_ids * n_rows + i[j]) * src->nb[1], row);
        worst                        = std::max(worst, differs(ref.data(), y.data() + j * row, row * sizeof(float)));
    }
    t.add(worst, ggml_type_name(type));
}

template <typename id_t>
static void test_set_rows(ggml_type type, ggml_type src_type, tally & t) {
    const ggml_type id_type = std::is_same<id_t, int64_t>::value ? GGML_TYPE_I64 : GGML_TYPE_I32;
    const int64_t   row = 2 * ggml_blck_size(type), n_rows = 13, n_planes = 3, n_ids = 7;
    graph           g;
    ggml_tensor *   dst  = g.tensor(type, row, n_rows, n_planes);
    ggml_tensor *   src  = g.tensor(src_type, 2 * row, n_ids, n_planes);
    ggml_tensor *   ids  = g.tensor(id_type, n_ids, n_planes);
    ggml_tensor *   part = ggml_view_3d(g.ctx.get(), src, row, n_ids, n_planes, src->nb[1], src->nb[2], 0);
    ggml_tensor *   out = ggml_set_rows(g.ctx.get(), dst, part, ids);  // rows with a gap after each, as a fused QKV has
    if (!g.allocate(out, t)) {
        return;
    }

    std::vector<float> x = gaussian(ggml_nelements(src));
    if (src_type == GGML_TYPE_F16) {
        std::vector<ggml_fp16_t> half(x.size());
        ggml_fp32_to_fp16_row(x.data(), half.data(), x.size());
        ggml_fp16_to_fp32_row(half.data(), x.data(), x.size());
        set(src, half);
    } else {
        set(src, x);
    }
    std::vector<uint8_t> bytes(ggml_nbytes(dst), 0xa5);  // rows that are not written keep this
    set(dst, bytes);
    std::vector<id_t> i(n_ids * n_planes);
    for (int64_t j = 0; j < n_ids * n_planes; ++j) {
        i[j] = (n_rows - 1 - 5 * (j % n_ids) % n_rows + j / n_ids) % n_rows;
        ggml_get_type_traits(type)->from_float_ref(x.data() + 2 * j * row,
                                                   bytes.data() + (j / n_ids * n_rows + i[j]) * dst->nb[1], row);
    }
    set(ids, i);
    g.compute();
    t.add(differs(get<uint8_t>(dst).data(), bytes.data(), bytes.size()),
          format("%s <- %s, %s ids", ggml_type_name(type), ggml_type_name(src_type), ggml_type_name(id_type)));
}

static void test_cpy(ggml_type type, tally & t) {
    const int64_t row = 2 * ggml_blck_size(type), n_rows = 7, n_planes = 3;
    {
        graph         g;
        ggml_tensor * src = g.tensor(GGML_TYPE_F32, row, n_rows, n_planes);
        ggml_tensor * dst = g.tensor(type, row, n_rows, n_planes);
        ggml_tensor * out = ggml_cpy(g.ctx.get(), src, dst);
        if (!g.allocate(out, t)) {
            return;
        }
        const std::vector<float>   x   = gaussian(ggml_nelements(src));
        const std::vector<uint8_t> ref = encode(type, x, row);
        set(src, x);
        g.compute();
        t.add(differs(get<uint8_t>(dst).data(), ref.data(), ref.size()), format("f32 -> %s", ggml_type_name(type)));
    }
    for (int64_t n_stream : { 1, 3 }) {  // a permuted cache view to contiguous f32
        graph         g;
        cache         k(g, type, row, 2, n_rows, n_stream);
        ggml_tensor * dst = g.tensor(GGML_TYPE_F32, row, n_rows, 2, n_stream);
        ggml_tensor * out = ggml_cpy(g.ctx.get(), k.view(g), dst);
        if (!g.allocate(out, t)) {
            return;
        }
        k.fill();
        g.compute();
        const std::vector<float> x     = k.decoded();
        const std::vector<float> y     = get<float>(dst);
        double                   worst = 0.0;
        for (int64_t r = 0; r < n_rows * 2 * n_stream; ++r) {
            const int64_t i = r % n_rows, h = r / n_rows % 2, s = r / n_rows / 2;
            worst = std::max(worst, differs(&y[r * row], &x[((s * n_rows + i) * 2 + h) * row], row * sizeof(float)));
        }
        t.add(worst, format("%s -> f32, %d streams", ggml_type_name(type), (int) n_stream));
    }
}

// K as src0, as attention without the fused operation does it: [head, n_kv, n_head] x [head, n_batch, n_head * gqa].
static void test_mul_mat(ggml_type type, int64_t head, int64_t gqa, int64_t n_batch, int64_t n_stream, tally & t) {
    const int64_t n_head = 2, n_kv = 37;
    graph         g;
    cache         k(g, type, head, n_head, n_kv, n_stream);
    ggml_tensor * q   = g.tensor(GGML_TYPE_F32, head, n_batch, n_head * gqa, n_stream);
    ggml_tensor * out = ggml_mul_mat(g.ctx.get(), k.view(g), q);
    if (!g.allocate(out, t, on_cpu)) {
        return;
    }
    k.fill();
    const std::vector<float> x  = gaussian(ggml_nelements(q));
    const std::vector<float> kd = k.decoded();
    set(q, x);
    g.compute();

    std::vector<double> ref(ggml_nelements(out));
    for (size_t r = 0; r < ref.size(); ++r) {
        const int64_t i = r % n_kv, b = r / n_kv % n_batch, h = r / n_kv / n_batch % (n_head * gqa);
        const int64_t s  = r / n_kv / n_batch / (n_head * gqa);
        const float * kr = &kd[((s * n_kv + i) * n_head + h / gqa) * head];
        const float * qr = &x[((s * n_head * gqa + h) * n_batch + b) * head];
        ref[r]           = dot(kr, qr, head);
    }
    t.add(nmse(get<float>(out), ref), format("%s, head %d, gqa %d, batch %d, %d streams", ggml_type_name(type),
                                             (int) head, (int) gqa, (int) n_batch, (int) n_stream));
}

// Without its hook our attention is never called, and upstream's gives nearly the same, slowly. With the reference
// implementation asked for, upstream's it is: the two must not agree to the bit.
static void test_attention_is_ours(tally & t) {
    attention a({ GGML_TYPE_TURBO3, GGML_TYPE_TURBO3, 128, 1, 1, 1, 100 });
    if (!a.g.allocate(a.out, t)) {
        return;
    }
    a.fill();
    a.g.compute();
    const std::vector<float> ours = get<float>(a.out);
    ggml_backend_cpu_set_use_ref(backend, true);
    a.g.compute();
    ggml_backend_cpu_set_use_ref(backend, false);
    const std::vector<float> reference = get<float>(a.out);
    if (ours == reference || !(nmse(ours, { reference.begin(), reference.end() }) < MAX_NMSE)) {
        fail("FLASH_ATTN_EXT: our attention was not called, or the reference implementation was not");
    }
}

int main(int argc, char ** argv) {
    const char * device = "CPU";
    bool         full   = false;
    int          shard = 0, n_shards = 1;
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(HELP, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--device") == 0 && i + 1 < argc) {
            device = argv[++i];
        } else if (strcmp(argv[i], "--every") == 0 && i + 1 < argc) {
            n_shards = std::max(1, atoi(argv[++i]));
        } else if (strcmp(argv[i], "--full") == 0) {
            full = true;
            if (i + 1 < argc && argv[i + 1][0] != '-' &&
                (sscanf(argv[++i], "%d/%d", &shard, &n_shards) != 2 || shard < 0 || shard >= n_shards)) {
                fprintf(stderr, "--full takes SHARD/SHARDS, such as 0/2, not '%s'\n", argv[i]);
                return 2;
            }
        } else {
            fprintf(stderr, "unknown argument '%s'; --help shows what there is\n", argv[i]);
            return 2;
        }
    }
    const int no_device = open_device(device);
    if (no_device != 0) {
        return no_device;
    }
    ggml_set_abort_callback([](const char * message) { fprintf(stderr, "FAIL %s: %s\n", current.c_str(), message); });
    for (ggml_type type : our_types) {
        if (ggml_get_type_traits(type)->to_float == nullptr || ggml_get_type_traits_cpu(type)->vec_dot == nullptr) {
            fprintf(stderr, "FAIL type %d is not registered; test-turbokv-traits says what is missing\n", type);
            return 1;
        }
    }
    tally chunk("quantize_chunk", 0.0), get_rows("GET_ROWS", 0.0), set_rows("SET_ROWS", 0.0), cpy("CPY", 0.0);
    tally mul_mat("MUL_MAT", MAX_NMSE), flash_attn("FLASH_ATTN_EXT", MAX_NMSE);
    tally poisoned("FLASH_ATTN_EXT of NaN", MAX_NMSE), one_by_one("one by one", MAX_NMSE);
    for (ggml_type type : our_types) {
        if (on_cpu) {
            test_quantize_chunk(type, chunk);
        }
        test_get_rows(type, get_rows);
        for (ggml_type src : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
            test_set_rows<int64_t>(type, src, set_rows);
            test_set_rows<int32_t>(type, src, set_rows);
        }
        test_cpy(type, cpy);
        for_each_shape(full, [&](int64_t head, int64_t gqa, int64_t n_batch, int64_t n_stream) {
            if (head % ggml_blck_size(type) == 0) {
                test_mul_mat(type, head, gqa, n_batch, n_stream, mul_mat);
            }
        });
    }
    if (on_cpu) {
        test_attention_is_ours(flash_attn);
    }
    const auto cases = attention_cases(full);
    for (size_t i = shard; i < cases.size(); i += n_shards) {
        if (full && i / n_shards % 500 == 0) {
            fprintf(stderr, "%d of %d cases of attention\n", (int) i, (int) cases.size());
        }
        test_flash_attn(cases[i], cases[i].with.poison == NOTHING ? flash_attn : poisoned);
    }
    for (const type_pair & p : examples) {
        test_one_by_one({ p.first, p.second, 128, 4, on_cpu ? 17 : 64, 1, 300 }, one_by_one);
    }
    for (const tally * t : { &chunk, &get_rows, &set_rows, &cpy, &mul_mat, &flash_attn, &poisoned, &one_by_one }) {
        t->print();
    }
    if (!on_cpu) {
        printf("quantize_chunk and the choice of the CPU attention are no matter of a device: run without --device\n");
    }
    if (n_failures != 0) {
        fprintf(stderr, "%d failures\n", n_failures);
    }
    ggml_backend_free(backend);
    return n_failures != 0;
}
