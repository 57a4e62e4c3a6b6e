// FLASH_ATTN_EXT on one device against attention in float64 over the decoded caches.

#pragma once

#include "ops-graph.h"

static const double MAX_NMSE = 2e-4;  // test-turbokv-ops.cpp says why

enum mask_kind { CAUSAL, NO_MASK, WINDOW, LATE, SCATTERED };  // LATE: a short window, all before it is masked

// Rows whose scale is NaN: what sees one must not be finite, all else must not notice.
enum poison_kind { NOTHING, NAN_IN_K, NAN_IN_V, NAN_MASKED };

struct feature {
    const char * name;
    mask_kind    mask;
    bool         sinks;
    float        max_bias, softcap;
    poison_kind  poison;
};

static const feature features[] = {
    { "causal", CAUSAL, false, 0.0f, 0.0f, NOTHING },       { "no mask", NO_MASK, false, 0.0f, 0.0f, NOTHING },
    { "window", WINDOW, false, 0.0f, 0.0f, NOTHING },       { "late", LATE, false, 0.0f, 0.0f, NOTHING },
    { "scattered", SCATTERED, false, 0.0f, 0.0f, NOTHING }, { "sinks", CAUSAL, true, 0.0f, 0.0f, NOTHING },
    { "softcap", CAUSAL, false, 0.0f, 2.0f, NOTHING },      { "ALiBi", CAUSAL, false, 8.0f, 0.0f, NOTHING },
    { "all of them", WINDOW, true, 8.0f, 2.0f, NOTHING },   { "NaN in K", CAUSAL, false, 0.0f, 0.0f, NAN_IN_K },
    { "NaN in V", CAUSAL, true, 0.0f, 0.0f, NAN_IN_V },     { "NaN masked", WINDOW, false, 0.0f, 0.0f, NAN_MASKED },
};
static const int N_FEATURES = sizeof(features) / sizeof(features[0]);

struct attention_case {
    ggml_type type_k, type_v;
    int64_t   head, gqa, n_batch, n_stream, n_kv;
    feature   with = features[0];

    static const int64_t n_head_kv = 2;

    int64_t n_head() const { return n_head_kv * gqa; }

    // The keys [first, end) are before query b and inside its window. Every stream is shorter than the one before it,
    // so that no stream can stand in for another.
    int64_t end(int64_t b, int64_t s) const { return n_kv - n_batch + 1 + b - 5 * s; }

    int64_t first(int64_t b, int64_t s) const {
        const int64_t width = std::min(with.mask == LATE ? n_kv / 8 + 1 : n_kv / 3 + 1, (n_kv - n_batch) / 2);
        return with.mask == WINDOW || with.mask == LATE ? std::max<int64_t>(0, end(b, s) - width) : 0;
    }

    bool sees(int64_t b, int64_t s, int64_t i) const {
        if (with.mask == NO_MASK) {
            return true;
        }
        const bool dropped = with.mask == SCATTERED && (i * 2654435761u + b * 40503u + s) % 7 < 3 && i + 1 < end(b, s);
        return i >= first(b, s) && i < end(b, s) && !dropped;
    }

    // In the first stream, under the first KV head. Of several queries one at least does not see it.
    int64_t poisoned_token() const { return with.poison == NAN_MASKED ? first(0, 0) - 1 : n_kv - (n_batch + 1) / 2; }

    double slope(int64_t h) const {
        if (with.max_bias == 0.0f) {
            return 1.0;
        }
        const double n = pow(2.0, floor(log2((double) n_head())));
        return h < n ? pow(2.0, -with.max_bias / n * (h + 1)) : pow(2.0, -with.max_bias / 2 / n * (2 * (h - n) + 1));
    }

    std::string name() const {
        return format("%s/%s, head %d, gqa %d, batch %d, %d streams, %d cells, %s", ggml_type_name(type_k),
                      ggml_type_name(type_v), (int) head, (int) gqa, (int) n_batch, (int) n_stream, (int) n_kv,
                      with.name);
    }

    // What a context can ask for: a type of ours has the block size that fits the heads. All that the GPU must do.
    bool natural() const {
        const auto fits = [&](ggml_type type) {
            return ggml_blck_size(type) == 32 || ggml_blck_size(type) == 1 ||
                   ggml_blck_size(type) == (head % 128 == 0 ? 128 : 64);
        };
        return fits(type_k) && fits(type_v) && (head == 64 || head == 128 || head == 256);
    }

    // Our own kernels keep a NaN from queries that do not see it. On a GPU larger batches and unusual pairs go through
    // upstream's, which sum 0 * NaN, and so do ours with a V in f16: there only those that see it are judged.
    bool contains_nan() const {
        const auto packed = [](ggml_type type) {
            return type >= GGML_TYPE_TURBOKV_FIRST || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
        };
        return on_cpu || (natural() && (packed(type_k) || type_k == GGML_TYPE_F16) && packed(type_v) && n_batch <= 16);
    }
};

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

// One attention operation with its inputs, on the device and here.
struct attention {
    attention_case     c;
    graph              g;
    cache              k, v;
    ggml_tensor *      q;
    ggml_tensor *      mask  = nullptr;
    ggml_tensor *      sinks = nullptr;
    ggml_tensor *      out;
    std::vector<float> x, sink;

    explicit attention(const attention_case & c)
        : c(c),
          k(g, c.type_k, c.head, c.n_head_kv, c.n_kv, c.n_stream),
          v(g, c.type_v, c.head, c.n_head_kv, c.n_kv, c.n_stream) {
        q = g.tensor(GGML_TYPE_F32, c.head, c.n_head(), c.n_batch, c.n_stream);
        if (c.with.mask != NO_MASK) {
            mask = g.tensor(GGML_TYPE_F16, c.n_kv, c.n_batch, 1, c.n_stream);
        }
        out = ggml_flash_attn_ext(g.ctx.get(), ggml_permute(g.ctx.get(), q, 0, 2, 1, 3), k.view(g), v.view(g), mask,
                                  1.0f / sqrtf(c.head), c.with.max_bias, c.with.softcap);
        if (c.with.sinks) {
            sinks = g.tensor(GGML_TYPE_F32, c.n_head());
            ggml_flash_attn_ext_add_sinks(out, sinks);
        }
    }

    void fill() {
        k.fill();
        v.fill();
        x = gaussian(ggml_nelements(q));
        set(q, x);
        if (sinks != nullptr) {
            sink = gaussian(c.n_head());
            for (float & value : sink) {
                value += 3.0f;  // as much as tens of keys: a lost sink shows
            }
            set(sinks, sink);
        }
        if (mask != nullptr) {
            std::vector<ggml_fp16_t> m(ggml_nelements(mask));
            for (size_t r = 0; r < m.size(); ++r) {
                const int64_t i = r % c.n_kv, b = r / c.n_kv % c.n_batch, s = r / c.n_kv / c.n_batch;
                m[r] = ggml_fp32_to_fp16(c.sees(b, s, i) ? mask_value(b, s, i) : -INFINITY);
            }
            set(mask, m);
        }
        // The caches as they were go to the reference.
        kd = k.decoded();
        vd = v.decoded();
        const std::vector<uint8_t> bad(1024, 0xff);
        const auto                 poison = [&](const cache & to) {
            ggml_backend_tensor_set(to.store, bad.data(), to.offset(c.poisoned_token(), 0),
                                                    ggml_row_size(to.store->type, c.head));
        };
        if (c.with.poison == NAN_IN_K || c.with.poison == NAN_MASKED) {
            poison(k);
        }
        if (c.with.poison == NAN_IN_V || c.with.poison == NAN_MASKED) {
            poison(v);
        }
    }

    // On a GPU: what the kernels give when they are called, and what the graph replays that they are captured in.
    std::vector<std::vector<float>> results() {
        std::vector<std::vector<float>> all;
        for (int run = 0; run < n_runs; ++run) {
            const std::vector<float> nothing(ggml_nelements(out), NAN);
            set(out, nothing);
            g.compute();
            if (run != 1) {
                all.push_back(get<float>(out));  // [n_stream][n_batch][n_head][head], as q
            }
        }
        return all;
    }

    // Row r of the result, in float64.
    void reference(int64_t r, double * row) const {
        const int64_t       h = r % c.n_head(), b = r / c.n_head() % c.n_batch, s = r / c.n_head() / c.n_batch;
        const int64_t       kv_head = h / c.gqa;
        std::vector<double> score(c.n_kv, -INFINITY);
        double              top = c.with.sinks ? sink[h] : -INFINITY;
        for (int64_t i = 0; i < c.n_kv; ++i) {
            if (c.sees(b, s, i)) {
                const double raw =
                    dot(&kd[((s * c.n_kv + i) * c.n_head_kv + kv_head) * c.head], &x[r * c.head], c.head) /
                    sqrt((double) c.head);
                score[i] = c.with.softcap == 0.0f ? raw : c.with.softcap * tanh(raw / c.with.softcap);
                score[i] += c.slope(h) * (c.with.mask == NO_MASK ? 0.0f : mask_value(b, s, i));
                top = std::max(top, score[i]);
            }
        }
        double sum = c.with.sinks ? exp(sink[h] - top) : 0.0;
        for (double & w : score) {
            w = exp(w - top);
            sum += w;
        }
        std::fill_n(row, c.head, 0.0);
        for (int64_t i = 0; i < c.n_kv; ++i) {
            const float * vr = &vd[((s * c.n_kv + i) * c.n_head_kv + kv_head) * c.head];
            const double  w  = score[i] / sum;
            for (int64_t j = 0; w > 0.0 && j < c.head; ++j) {
                row[j] += w * vr[j];
            }
        }
    }

    // Row r sees what is not finite.
    bool poisoned(int64_t r) const {
        const int64_t h = r % c.n_head(), b = r / c.n_head() % c.n_batch, s = r / c.n_head() / c.n_batch;
        return c.with.poison != NOTHING && s == 0 && h / c.gqa == 0 && c.sees(b, 0, c.poisoned_token());
    }

private:
    std::vector<float> kd, vd;

    float mask_value(int64_t b, int64_t s, int64_t i) const {
        return c.with.max_bias == 0.0f ? 0.0f : ggml_fp16_to_fp32(ggml_fp32_to_fp16(-(float) (c.end(b, s) - 1 - i)));
    }
};

static void test_flash_attn(const attention_case & c, tally & t) {
    attention a(c);
    if (!a.g.allocate(a.out, t, on_cpu || c.natural())) {
        return;
    }
    current += " " + c.name();
    a.fill();
    const auto results = a.results();

    // Of large batches every seventh query: their number only decides how the work is shared out.
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < c.n_head() * c.n_batch * c.n_stream; ++r) {
        if (c.n_batch <= 64 || r / c.n_head() % c.n_batch % 7 == 3) {
            rows.push_back(r);
        }
    }
    std::vector<double> ref(rows.size() * c.head);
    parallel_for(rows.size(), 2.0 * ref.size() * c.n_kv, [&](int64_t i) { a.reference(rows[i], &ref[i * c.head]); });
    double worst = 0.0;
    for (const std::vector<float> & y : results) {
        double error = 0.0, power = 0.0;
        for (size_t i = 0; i < rows.size(); ++i) {
            const bool poisoned = a.poisoned(rows[i]);
            for (int64_t j = 0; j < c.head; ++j) {
                const double value = y[rows[i] * c.head + j], expected = ref[i * c.head + j];
                if (poisoned) {
                    error += std::isfinite(value) ? INFINITY : 0.0;
                    power += 1.0;
                } else if (c.with.poison == NOTHING || c.contains_nan()) {
                    error += (value - expected) * (value - expected);
                    power += expected * expected;
                }
            }
        }
        const double relative = error == 0.0 && power == 0.0 ? 0.0 : error / power;
        worst                 = relative <= worst ? worst : relative;  // stays NaN once it is
    }
    t.add(worst, c.name());
}

// Queries one by one, as in generation, and all in one batch, as in a prompt: two kernels, one result.
static void test_one_by_one(const attention_case & c, tally & t) {
    attention      batch(c);
    attention_case one = c;
    one.n_batch        = 1;
    attention single(one);
    if (!batch.g.allocate(batch.out, t) || !single.g.allocate(single.out, t)) {
        return;
    }
    current += " " + c.name();
    batch.fill();
    set(single.k.store, get<uint8_t>(batch.k.store));
    set(single.v.store, get<uint8_t>(batch.v.store));
    batch.g.compute();
    const std::vector<float> y      = get<float>(batch.out);
    const size_t             q_size = ggml_nbytes(single.q), m_size = ggml_nbytes(single.mask);
    std::vector<float>       all;
    std::vector<uint8_t>     m = get<uint8_t>(batch.mask);
    for (int64_t b = 0; b < c.n_batch; ++b) {
        ggml_backend_tensor_set(single.q, batch.x.data() + b * q_size / sizeof(float), 0, q_size);
        ggml_backend_tensor_set(single.mask, m.data() + b * m_size, 0, m_size);
        single.g.compute();
        const std::vector<float> row = get<float>(single.out);
        all.insert(all.end(), row.begin(), row.end());
    }
    t.add(nmse(all, { y.begin(), y.end() }), c.name());
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

using type_pair = std::pair<ggml_type, ggml_type>;

// Pairs of which at least one is ours.
static std::vector<type_pair> pairs() {
    std::vector<type_pair> all;
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

// The first is what users choose, the others stand for every kind of codec and for mixed caches.
static const type_pair examples[] = {
    { GGML_TYPE_TURBO3, GGML_TYPE_TURBO3 }, { GGML_TYPE_Q8_0, GGML_TYPE_TURBO3 }, { GGML_TYPE_TBQ3, GGML_TYPE_TBQ3 },
    { GGML_TYPE_TURBO4, GGML_TYPE_F16 },    { GGML_TYPE_TURBO2, GGML_TYPE_TBQ4 },
};

// Too many to try each with each. Every pair meets every batch, and in turn every group, depth and feature; the
// examples meet all features and batches, the first two all groups and batches.
static std::vector<attention_case> attention_cases(bool full) {
    const int64_t               groups[]  = { 1, 2, 3, 4, 5, 6, 7, 8, 12, 16 };
    const int64_t               batches[] = { 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 64, 512 };
    const int64_t               depths[]  = { 37, 100, 256, 300, 1000, 1537 };
    std::vector<attention_case> cases;
    const auto add = [&](type_pair p, int64_t head, int64_t gqa, int64_t n_batch, int64_t n_stream, int64_t n_kv,
                         const feature & with) {
        if (head % ggml_blck_size(p.first) == 0 && head % ggml_blck_size(p.second) == 0) {
            cases.push_back({ p.first, p.second, head, gqa, n_batch, n_stream, std::max(n_kv, n_batch + 20), with });
        }
    };
    const auto all_pairs = pairs();
    if (on_cpu || full) {
        for (const type_pair & p : all_pairs) {
            for_each_shape(full, [&](int64_t head, int64_t gqa, int64_t n_batch, int64_t n_stream) {
                const int64_t n_kv = n_batch == 1 ? 517 : n_batch + 76;  // no multiple of any tile
                add(p, head, gqa, n_batch, n_stream, n_kv, features[0]);
            });
        }
    }
    for (size_t p = 0; (!on_cpu || full) && p < all_pairs.size(); ++p) {
        for (int64_t head : { 64, 128, 256 }) {
            for (size_t i = 0; i < 12; ++i) {
                const size_t turn = p + head / 64;
                add(all_pairs[p], head, groups[(turn + i) % 10], batches[i], (turn + i) % 2 ? 3 : 1,
                    depths[(turn + 5 * i) % 6], features[(turn + 7 * i) % N_FEATURES]);
            }
        }
    }
    for (const type_pair & p : examples) {
        for (const feature & with : features) {
            for (int64_t n_batch : { 1, 2, 5, 8, 17, 64, 512 }) {
                if (!on_cpu || n_batch == 1 || n_batch == 5 || n_batch == 17) {
                    add(p, 128, 4, n_batch, n_batch % 2 ? 3 : 1, 300, with);
                }
            }
        }
    }
    for (int e = 0; e < 2; ++e) {
        for (size_t i = 0; i < 10; ++i) {
            for (size_t j = 0; j < 12; ++j) {
                if (!on_cpu || full || j == 0 || j == i) {
                    add(examples[e], 128, groups[i], batches[j], 1, depths[(i + j) % 6], features[0]);
                }
            }
        }
    }
    for (const type_pair & p : examples) {
        for (int64_t n_kv : { 4113, 20000 }) {
            for (int64_t n_batch : { 1, 4 }) {
                if (!on_cpu || n_kv < 5000) {
                    add(p, 128, n_batch == 1 ? 8 : 4, n_batch, 1, n_kv, features[0]);
                }
            }
        }
    }
    for (const type_pair & p : examples) {  // so deep that on a GPU all shared memory is used again and again
        add(p, 128, 16, 16, 1, 20000, features[0]);
        add(p, 128, 4, 16, 3, 9964, features[0]);
    }
    for (int i : { 0, 5, 8 }) {  // a prompt so deep that its caches are converted in parts
        if (!on_cpu) {
            add(examples[0], 128, 2, 33, 1, 70000, features[i]);
        }
    }
    for (ggml_type type : { GGML_TYPE_TURBO4, GGML_TYPE_TURBO3 }) {  // the same for one query, of large and small rows
        if (!on_cpu) {
            add({ type, type }, 128, 8, 1, 1, 150001, features[0]);
        }
    }
    for (int64_t n_batch : { 1, 33 }) {  // heads that upstream's CUDA attention has only in pairs, or not at all
        add({ GGML_TYPE_TURBO3_64, GGML_TYPE_TURBO3_64 }, 192, 4, n_batch, 1, 300, features[0]);
        add({ GGML_TYPE_Q8_0, GGML_TYPE_TURBO4_64 }, 320, 4, n_batch, 1, 300, features[0]);
    }
    return cases;
}
