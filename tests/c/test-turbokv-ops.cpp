// Our types in the graph operations that a KV cache needs, on the CPU backend, through ggml's public interface.
// Usage: test-turbokv-ops [--full [SHARD/SHARDS]]. Without --full fewer group sizes and batches; a shard takes every
// SHARDS-th K/V pair from number SHARD on.
//
// What moves or converts values must match the reference codec to the bit. MUL_MAT and FLASH_ATTN_EXT quantize
// their float operand to q8_0 first (f16 for an f16 K). For normally distributed values that alone is a relative
// error of (amax / 127)^2 / 12, about 3e-5 of the power; rounding adds less. Attention passes it on roughly one
// to one, because scores of unit variance move by what the query moves. The worst of our small cases measures 6e-5.

#include "ops-graph.h"

static const double MAX_NMSE = 2e-4;

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
    g.allocate();
    const std::vector<uint8_t> q = encode(type, gaussian(row * n_rows * n_planes), row);
    std::vector<int32_t>       i(n_ids * n_planes);
    for (size_t j = 0; j < i.size(); ++j) {
        i[j] = (5 * j + j / n_ids) % n_rows;  // neither in order nor the same in all planes
    }
    i[1] = i[0];  // a row may be asked for twice
    set(src, q);
    set(ids, i);
    g.compute(out);
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
    g.allocate();

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
    g.compute(out);
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
        g.allocate();
        const std::vector<float>   x   = gaussian(ggml_nelements(src));
        const std::vector<uint8_t> ref = encode(type, x, row);
        set(src, x);
        g.compute(out);
        t.add(differs(get<uint8_t>(dst).data(), ref.data(), ref.size()), format("f32 -> %s", ggml_type_name(type)));
    }
    for (int64_t n_stream : { 1, 3 }) {  // a permuted cache view to contiguous f32
        graph         g;
        cache         k(g, type, row, 2, n_rows, n_stream);
        ggml_tensor * dst = g.tensor(GGML_TYPE_F32, row, n_rows, 2, n_stream);
        ggml_tensor * out = ggml_cpy(g.ctx.get(), k.view(g), dst);
        g.allocate();
        k.fill();
        g.compute(out);
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

// In float64. Eight sums, so that it can be vectorized; n a multiple of 8.
static double dot(const float * a, const float * b, int64_t n) {
    double lanes[8] = { 0.0 };
    for (int64_t j = 0; j < n; j += 8) {
        for (int64_t l = 0; l < 8; ++l) {
            lanes[l] += (double) a[j + l] * b[j + l];
        }
    }
    return std::accumulate(lanes, lanes + 8, 0.0);
}

// K as src0, as attention without the fused operation does it: [head, n_kv, n_head] x [head, n_batch, n_head * gqa].
static void test_mul_mat(ggml_type type, int64_t head, int64_t gqa, int64_t n_batch, int64_t n_stream, tally & t) {
    const int64_t n_head = 2, n_kv = 37;
    graph         g;
    cache         k(g, type, head, n_head, n_kv, n_stream);
    ggml_tensor * q   = g.tensor(GGML_TYPE_F32, head, n_batch, n_head * gqa, n_stream);
    ggml_tensor * out = ggml_mul_mat(g.ctx.get(), k.view(g), q);
    g.allocate();
    k.fill();
    const std::vector<float> x  = gaussian(ggml_nelements(q));
    const std::vector<float> kd = k.decoded();
    set(q, x);
    g.compute(out);

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

struct attention_case {
    ggml_type type_k, type_v;
    int64_t   head, gqa, n_batch, n_stream, n_kv;
};

static void test_flash_attn(const attention_case & c, tally & t) {
    const int64_t n_head_kv = 2, n_head = n_head_kv * c.gqa;
    const float   scale = 1.0f / sqrtf(c.head);
    graph         g;
    cache         k(g, c.type_k, c.head, n_head_kv, c.n_kv, c.n_stream);
    cache         v(g, c.type_v, c.head, n_head_kv, c.n_kv, c.n_stream);
    ggml_tensor * q    = g.tensor(GGML_TYPE_F32, c.head, n_head, c.n_batch, c.n_stream);
    ggml_tensor * mask = g.tensor(GGML_TYPE_F16, c.n_kv, c.n_batch, 1, c.n_stream);
    ggml_tensor * out = ggml_flash_attn_ext(g.ctx.get(), ggml_permute(g.ctx.get(), q, 0, 2, 1, 3), k.view(g), v.view(g),
                                            mask, scale, 0.0f, 0.0f);
    g.allocate();
    k.fill();
    v.fill();
    const std::vector<float> x = gaussian(ggml_nelements(q));
    set(q, x);

    // Causal; every stream is shorter than the one before it, so that no stream can stand in for another.
    const auto               n_visible = [&](int64_t b, int64_t s) { return c.n_kv - c.n_batch + 1 + b - 5 * s; };
    std::vector<ggml_fp16_t> m(ggml_nelements(mask));
    for (size_t r = 0; r < m.size(); ++r) {
        const int64_t i = r % c.n_kv, b = r / c.n_kv % c.n_batch, s = r / c.n_kv / c.n_batch;
        m[r] = ggml_fp32_to_fp16(i < n_visible(b, s) ? 0.0f : -INFINITY);
    }
    set(mask, m);
    g.compute(out);

    // In float64. Of large batches every seventh query: their number only decides how threads share the work.
    const std::vector<float> kd = k.decoded();
    const std::vector<float> vd = v.decoded();
    const std::vector<float> y  = get<float>(out);  // [n_stream][n_batch][n_head][head], as q
    std::vector<float>       seen;
    std::vector<double>      ref;
    std::vector<double>      row(c.head);
    for (int64_t r = 0; r < n_head * c.n_batch * c.n_stream; ++r) {
        const int64_t h = r % n_head / c.gqa, b = r / n_head % c.n_batch, s = r / n_head / c.n_batch;
        if (c.n_batch > 64 && b % 7 != 3) {
            continue;
        }
        std::vector<double> score(n_visible(b, s));
        double              top = -INFINITY;
        double              sum = 0.0;
        for (size_t i = 0; i < score.size(); ++i) {
            score[i] = scale * dot(&kd[((s * c.n_kv + i) * n_head_kv + h) * c.head], &x[r * c.head], c.head);
            top      = std::max(top, score[i]);
        }
        for (double & w : score) {
            w = exp(w - top);
            sum += w;
        }
        std::fill(row.begin(), row.end(), 0.0);
        for (size_t i = 0; i < score.size(); ++i) {
            const float * vr = &vd[((s * c.n_kv + i) * n_head_kv + h) * c.head];
            const double  w  = score[i] / sum;
            for (int64_t j = 0; j < c.head; ++j) {
                row[j] += w * vr[j];
            }
        }
        seen.insert(seen.end(), &y[r * c.head], &y[r * c.head] + c.head);
        ref.insert(ref.end(), row.begin(), row.end());
    }
    t.add(nmse(seen, ref),
          format("%s/%s, head %d, gqa %d, batch %d, %d streams, %d cells", ggml_type_name(c.type_k),
                 ggml_type_name(c.type_v), (int) c.head, (int) c.gqa, (int) c.n_batch, (int) c.n_stream, (int) c.n_kv));
}

// Without its hook our attention is never called, and upstream's gives nearly the same, slowly. With the reference
// implementation asked for, upstream's it is: the two must not agree to the bit.
static void test_attention_is_ours() {
    graph         g;
    cache         k(g, GGML_TYPE_TURBO3, 128, 2, 100, 1);
    cache         v(g, GGML_TYPE_TURBO3, 128, 2, 100, 1);
    ggml_tensor * q   = g.tensor(GGML_TYPE_F32, 128, 1, 2);
    ggml_tensor * out = ggml_flash_attn_ext(g.ctx.get(), q, k.view(g), v.view(g), nullptr, 0.1f, 0.0f, 0.0f);
    g.allocate();
    k.fill();
    v.fill();
    set(q, gaussian(ggml_nelements(q)));
    g.compute(out);
    const std::vector<float> ours = get<float>(out);
    ggml_backend_cpu_set_use_ref(g.backend.get(), true);
    g.compute(out);
    const std::vector<float> reference = get<float>(out);
    if (ours == reference || !(nmse(ours, { reference.begin(), reference.end() }) < MAX_NMSE)) {
        n_failures++;
        fprintf(stderr, "FAIL FLASH_ATTN_EXT: our attention was not called, or the reference implementation was not\n");
    }
}

// Calls f(head, gqa, n_batch, n_stream) for every shape.
template <typename F>
static void for_each_shape(bool full, F f) {
    const std::vector<int64_t> groups  = full ? std::vector<int64_t>{ 1, 2, 4, 8 } : std::vector<int64_t>{ 1, 4 };
    const std::vector<int64_t> batches = full ? std::vector<int64_t>{ 1, 2, 3, 8, 512 } : std::vector<int64_t>{ 1, 7 };
    for (int64_t head : { 64, 128, 256 }) {
        for (int64_t gqa : groups) {
            for (int64_t n_batch : batches) {
                for (int64_t n_stream : { 1, 3 }) {
                    f(head, gqa, n_batch, n_stream);
                }
            }
        }
    }
}

// Pairs of which at least one is ours.
static std::vector<std::pair<ggml_type, ggml_type>> pairs() {
    std::vector<std::pair<ggml_type, ggml_type>> all;
    for (ggml_type ours : our_types) {
        for (ggml_type other : our_types) {
            all.push_back({ ours, other });
        }
        for (ggml_type other : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            all.push_back({ ours, other });
            all.push_back({ other, ours });
        }
    }
    return all;
}

int main(int argc, char ** argv) {
    const bool full  = argc >= 2 && std::string(argv[1]) == "--full";
    int        shard = 0, n_shards = 1;
    if ((argc > 1 && !full) || argc > 3 ||
        (argc == 3 && (sscanf(argv[2], "%d/%d", &shard, &n_shards) != 2 || shard < 0 || shard >= n_shards))) {
        fprintf(stderr, "usage: %s [--full [SHARD/SHARDS]]\n", argv[0]);
        return 2;
    }
    ggml_set_abort_callback([](const char * message) { fprintf(stderr, "FAIL %s: %s\n", current.c_str(), message); });
    for (ggml_type type : our_types) {
        if (ggml_get_type_traits(type)->to_float == nullptr || ggml_get_type_traits_cpu(type)->vec_dot == nullptr) {
            fprintf(stderr, "FAIL type %d is not registered; test-turbokv-traits says what is missing\n", type);
            return 1;
        }
    }
    tally chunk("quantize_chunk", 0.0), get_rows("GET_ROWS", 0.0), set_rows("SET_ROWS", 0.0), cpy("CPY", 0.0);
    tally mul_mat("MUL_MAT", MAX_NMSE), attention("FLASH_ATTN_EXT", MAX_NMSE);
    for (ggml_type type : our_types) {
        test_quantize_chunk(type, chunk);
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
    test_attention_is_ours();
    const auto all_pairs = pairs();
    for (size_t i = shard; i < all_pairs.size(); i += n_shards) {
        const auto & pair = all_pairs[i];
        if (full) {
            fprintf(stderr, "%s/%s, %d cases so far\n", ggml_type_name(pair.first), ggml_type_name(pair.second),
                    attention.n_cases);
        }
        for_each_shape(full, [&](int64_t head, int64_t gqa, int64_t n_batch, int64_t n_stream) {
            if (head % ggml_blck_size(pair.first) == 0 && head % ggml_blck_size(pair.second) == 0) {
                const int64_t n_kv = n_batch == 1 ? 517 : n_batch + 76;  // no multiple of any tile
                test_flash_attn({ pair.first, pair.second, head, gqa, n_batch, n_stream, n_kv }, attention);
            }
        });
    }
    for (const tally * t : { &chunk, &get_rows, &set_rows, &cpy, &mul_mat, &attention }) {
        t->print();
    }
    return n_failures != 0;
}
