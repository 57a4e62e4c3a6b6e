// The device's encoders and decoders bit for bit, through ggml's graph operations: against tests/golden/<type>.bin, and
// against the reference codecs on random blocks and on blocks with values on the thresholds between levels.

#include "golden-file.h"
#include "ops-graph.h"
#include "turbokv-srht.h"

static const char * const HELP =
    R"(SET_ROWS, CPY and GET_ROWS of a device against golden vectors and the reference codecs, bit for bit.

    test-turbokv-cuda-golden GOLDEN_FOLDER [--device NAME]

  --device NAME   CUDA0, CPU, ..  (CUDA0)

Exit codes: 0 all is right, 1 something is not, 2 wrong arguments, 77 this machine or build lacks the CUDA device.
)";

static const int64_t N_RANDOM = 100000;  // blocks
static const int64_t N_TIES   = 20000;

struct thresholds {
    ggml_type      type;
    const double * values;
    int            n;
};

#define THRESHOLDS(NAME, table)                                                                                        \
    { GGML_TYPE_##NAME, turbokv_##table##_thresholds, (int) (sizeof(turbokv_##table##_thresholds) / sizeof(double)) }

static const thresholds all_thresholds[] = {
    THRESHOLDS(TURBO2, lm4),    THRESHOLDS(TURBO2_64, lm4), THRESHOLDS(TURBO3, lm8),
    THRESHOLDS(TURBO3_64, lm8), THRESHOLDS(TURBO4, lm16),   THRESHOLDS(TURBO4_64, lm16),
    THRESHOLDS(TBQ2, lm4),      THRESHOLDS(TBQ3, tbq3),     THRESHOLDS(TBQ4, lm16),
};

static bool rotates_by_itself(ggml_type type) {
    return type == GGML_TYPE_TBQ2 || type == GGML_TYPE_TBQ3 || type == GGML_TYPE_TBQ4;
}

enum encoder { BY_SET_ROWS, BY_CPY };

enum decoder { BY_GET_ROWS, BY_CPY_BACK };

// The bytes of x, in rows of `row` values, as the device writes them. Empty: it does not.
static std::vector<uint8_t> device_encode(encoder how, ggml_type type, const std::vector<float> & x, int64_t row,
                                          tally & t) {
    const int64_t n = x.size() / row;
    graph         g;
    ggml_tensor * src = g.tensor(GGML_TYPE_F32, row, n);
    ggml_tensor * dst = g.tensor(type, row, n);
    ggml_tensor * ids = how == BY_SET_ROWS ? g.tensor(GGML_TYPE_I64, n) : nullptr;
    ggml_tensor * out = ids ? ggml_set_rows(g.ctx.get(), dst, src, ids) : ggml_cpy(g.ctx.get(), src, dst);
    if (!g.allocate(out, t)) {
        return {};
    }
    set(src, x);
    set(dst, std::vector<uint8_t>(ggml_nbytes(dst), 0xa5));
    if (ids != nullptr) {
        std::vector<int64_t> i(n);
        std::iota(i.begin(), i.end(), 0);
        set(ids, i);
    }
    g.compute();
    return get<uint8_t>(dst);
}

static std::vector<float> device_decode(decoder how, ggml_type type, const std::vector<uint8_t> & q, int64_t row,
                                        tally & t) {
    const int64_t n = q.size() / ggml_row_size(type, row);
    graph         g;
    ggml_tensor * src = g.tensor(type, row, n);
    ggml_tensor * dst = how == BY_CPY_BACK ? g.tensor(GGML_TYPE_F32, row, n) : nullptr;
    ggml_tensor * ids = how == BY_GET_ROWS ? g.tensor(GGML_TYPE_I32, n) : nullptr;
    ggml_tensor * out = ids ? ggml_get_rows(g.ctx.get(), src, ids) : ggml_cpy(g.ctx.get(), src, dst);
    if (!g.allocate(out, t)) {
        return {};
    }
    set(src, q);
    if (ids != nullptr) {
        std::vector<int32_t> i(n);
        std::iota(i.begin(), i.end(), 0);
        set(ids, i);
    }
    g.compute();
    return get<float>(out);
}

// 0 or infinite, as tally wants it; the first differences go to stderr.
static double compare_bytes(ggml_type type, const std::vector<uint8_t> & q, const std::vector<uint8_t> & expected,
                            const std::vector<float> & x, const char * what) {
    if (q == expected) {
        return 0.0;
    }
    const size_t size  = ggml_type_size(type);
    const size_t block = ggml_blck_size(type);
    int          n_bad = 0;
    for (size_t i = 0; i < expected.size() / size && q.size() == expected.size(); ++i) {
        if (memcmp(&q[i * size], &expected[i * size], size) != 0 && ++n_bad <= 2) {
            size_t b = 0;
            while (q[i * size + b] == expected[i * size + b]) {
                b++;
            }
            fprintf(stderr, "  %s, %s, block %zu (first value %a): byte %zu is 0x%02x, expected 0x%02x\n",
                    ggml_type_name(type), what, i, x[i * block], b, q[i * size + b], expected[i * size + b]);
        }
    }
    fprintf(stderr, "  %s, %s: %d of %zu blocks differ\n", ggml_type_name(type), what, n_bad, expected.size() / size);
    return INFINITY;
}

static double compare_floats(ggml_type type, const std::vector<float> & y, const std::vector<float> & expected,
                             const char * what) {
    size_t n_bad = y.size() == expected.size() ? 0 : expected.size();
    for (size_t i = 0; i < y.size() && y.size() == expected.size(); ++i) {
        const bool same =
            (std::isnan(y[i]) && std::isnan(expected[i])) || memcmp(&y[i], &expected[i], sizeof(float)) == 0;
        if (!same && ++n_bad <= 2) {
            fprintf(stderr, "  %s, %s, block %d, value %d: %.9g, expected %.9g\n", ggml_type_name(type), what,
                    (int) (i / ggml_blck_size(type)), (int) (i % ggml_blck_size(type)), y[i], expected[i]);
        }
    }
    return n_bad == 0 ? 0.0 : INFINITY;
}

// Rows of one block, and longer ones.
static void check_encode(ggml_type type, const std::vector<float> & x, const std::vector<uint8_t> & expected,
                         const char * what, tally & t) {
    for (encoder how : { BY_SET_ROWS, BY_CPY }) {
        for (int64_t n_blocks : { 1, 4 }) {
            const std::string name = format("%s, %s by %s, rows of %d blocks", ggml_type_name(type), what,
                                            how == BY_SET_ROWS ? "SET_ROWS" : "CPY", (int) n_blocks);
            const auto        q    = device_encode(how, type, x, n_blocks * ggml_blck_size(type), t);
            t.add(compare_bytes(type, q, expected, x, name.c_str()), name);
        }
    }
}

static void check_decode(ggml_type type, const std::vector<uint8_t> & q, const std::vector<float> & expected,
                         const char * what, tally & t) {
    for (decoder how : { BY_GET_ROWS, BY_CPY_BACK }) {
        for (int64_t n_blocks : { 1, 4 }) {
            const std::string name = format("%s, %s by %s, rows of %d blocks", ggml_type_name(type), what,
                                            how == BY_GET_ROWS ? "GET_ROWS" : "CPY", (int) n_blocks);
            const auto        y    = device_decode(how, type, q, n_blocks * ggml_blck_size(type), t);
            t.add(compare_floats(type, y, expected, name.c_str()), name);
        }
    }
}

// Blocks of norm sqrt(block) times a power of two, nearly: values on thresholds times that power, or a float beside.
static std::vector<float> blocks_on_thresholds(ggml_type type, const thresholds & levels) {
    const int64_t      block = ggml_blck_size(type);
    std::vector<float> x     = gaussian(N_TIES * block);
    for (int64_t i = 0; i < N_TIES; ++i) {
        std::vector<double> u(block);
        double              power = 0.0;
        for (int64_t j = 0; j < block; ++j) {
            u[j] = j < 2 * levels.n ? levels.values[j % levels.n] * (j % 3 == 0 ? -1 : 1) : 0.3 * x[i * block + j];
            power += u[j] * u[j];
        }
        u[block - 1] = sqrt(std::max(0.01, block - power + u[block - 1] * u[block - 1]));
        if (rotates_by_itself(type)) {  // so that its own rotation gives them back
            std::vector<double> rotated(block);
            hadamard_f64(u.data(), rotated.data());
            for (int64_t j = 0; j < block; ++j) {
                u[j] = rotated[j] * turbokv_srht_signs[j] / sqrt((double) block);
            }
        }
        const int exponent = (int) (rng() % 17) - 8;
        for (int64_t j = 0; j < block; ++j) {
            const float value = ldexpf((float) u[j], exponent);
            const int   move  = (int) (rng() % 4);  // half of them stay
            x[i * block + j]  = move == 0   ? nextafterf(value, INFINITY)
                                : move == 1 ? nextafterf(value, -INFINITY)
                                            : value;
        }
    }
    return x;
}

int main(int argc, char ** argv) {
    const char * folder = nullptr;
    const char * device = "CUDA0";
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(HELP, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--device") == 0 && i + 1 < argc) {
            device = argv[++i];
        } else if (argv[i][0] != '-' && folder == nullptr) {
            folder = argv[i];
        } else {
            fprintf(stderr, "unknown argument '%s'; --help shows what there is\n", argv[i]);
            return 2;
        }
    }
    if (folder == nullptr) {
        fputs(HELP, stderr);
        return 2;
    }
    const int no_device = open_device(device);
    if (no_device != 0) {
        return no_device;
    }
    ggml_set_abort_callback([](const char * message) { fprintf(stderr, "FAIL %s: %s\n", current.c_str(), message); });

    tally encoded("golden, encoded", 0.0), decoded("golden, decoded", 0.0), random("Gaussian blocks", 0.0);
    tally ties("on thresholds", 0.0), random_decoded("Gaussian, decoded", 0.0);
    for (ggml_type type : our_types) {
        const int64_t block = ggml_blck_size(type);
        golden_file   g;
        char          error[8192];
        if (!golden_read(folder, ggml_type_name(type), type, (int) block, ggml_type_size(type), &g, error,
                         sizeof(error))) {
            fail(error);
            continue;
        }
        const int64_t              n = g.n_blocks;
        const std::vector<float>   x(g.x, g.x + n * block), y(g.y, g.y + n * block);
        const std::vector<uint8_t> q(g.q, g.q + n * ggml_type_size(type));
        golden_free(&g);
        check_encode(type, x, q, "golden", encoded);
        check_decode(type, q, y, "golden", decoded);

        const std::vector<float>   many   = gaussian(N_RANDOM * block);
        const std::vector<uint8_t> many_q = encode(type, many, block);
        check_encode(type, many, many_q, "Gaussian", random);
        check_decode(type, many_q, decode(type, many_q.data(), N_RANDOM * block), "Gaussian", random_decoded);

        const auto levels = std::find_if(std::begin(all_thresholds), std::end(all_thresholds),
                                         [&](const thresholds & row) { return row.type == type; });
        if (levels == std::end(all_thresholds)) {
            fail(format("%s has no row in all_thresholds[]", ggml_type_name(type)));
            continue;
        }
        const std::vector<float> at = blocks_on_thresholds(type, *levels);
        check_encode(type, at, encode(type, at, block), "thresholds", ties);
    }
    for (const tally * t : { &encoded, &decoded, &random, &random_decoded, &ties }) {
        t->print();
    }
    if (n_failures != 0) {
        fprintf(stderr, "%d failures\n", n_failures);
    }
    ggml_backend_free(backend);
    return n_failures != 0;
}
