// What ggml and its CPU backend know about our types: ids, names, sizes, conversions and vec_dot.

#include "ggml-cpu.h"
#include "ggml.h"
#include "turbokv-tables.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

// Pinned by hand, not generated: ids and sizes stand in slot files and RPC messages, so they must never change.
struct expected {
    const char * name;
    ggml_type    type;
    int          id;
    int64_t      block;
    size_t       size;
    double       bits;  // per value
};

static const expected types[] = {
    { "turbo2", GGML_TYPE_TURBO2, 224, 128, 34, 2.125 }, { "turbo2_64", GGML_TYPE_TURBO2_64, 225, 64, 18, 2.25 },
    { "turbo3", GGML_TYPE_TURBO3, 226, 128, 50, 3.125 }, { "turbo3_64", GGML_TYPE_TURBO3_64, 227, 64, 26, 3.25 },
    { "turbo4", GGML_TYPE_TURBO4, 228, 128, 66, 4.125 }, { "turbo4_64", GGML_TYPE_TURBO4_64, 229, 64, 34, 4.25 },
    { "tbq2", GGML_TYPE_TBQ2, 230, 128, 34, 2.125 },     { "tbq3", GGML_TYPE_TBQ3, 231, 128, 50, 3.125 },
    { "tbq4", GGML_TYPE_TBQ4, 232, 128, 66, 4.125 },
};

static const ggml_type all_types[] = {
#include "turbokv-cache-types.inc"
};

static_assert(GGML_TYPE_COUNT == 256, "GGML_TYPE_COUNT must cover our ids");
static_assert(GGML_TYPE_TURBOKV_FIRST == 224, "our ids start at 224");
static_assert(sizeof(types) / sizeof(types[0]) == sizeof(all_types) / sizeof(all_types[0]), "a type is not tested");

static int n_failures = 0;

static void check(bool ok, const char * format, ...) {
    if (ok) {
        return;
    }
    n_failures++;
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAIL ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
}

static std::vector<float> gaussian(int64_t n, uint32_t seed) {
    std::mt19937                    rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float>              x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    return x;
}

// Every id is either one of ours, with its pinned description, or none of ours.
static void check_ids() {
    for (int id = 0; id < GGML_TYPE_COUNT; ++id) {
        const ggml_type_traits * traits = ggml_get_type_traits((ggml_type) id);
        const expected *         mine   = nullptr;
        for (const expected & e : types) {
            mine = e.id == id ? &e : mine;
        }
        if (mine == nullptr) {
            check(id < GGML_TYPE_TURBOKV_FIRST || traits->blck_size == 0, "id %d is ours but not in the table", id);
            const std::string name = traits->type_name == nullptr ? "" : traits->type_name;
            check(name.find("turbo") != 0 && name.find("tbq") != 0, "id %d is called %s", id, name.c_str());
            continue;
        }
        check(mine->type == id, "%s has id %d, not %d", mine->name, mine->type, id);
        const std::string name = traits->type_name == nullptr ? "" : traits->type_name;
        check(name == mine->name, "id %d is called '%s', not %s", id, name.c_str(), mine->name);
        check(traits->blck_size == mine->block, "%s: block of %d, not %d", mine->name, (int) traits->blck_size,
              (int) mine->block);
        check(traits->type_size == mine->size, "%s: %zu bytes, not %zu", mine->name, traits->type_size, mine->size);
        check(traits->is_quantized, "%s: not is_quantized", mine->name);
        check(traits->to_float != nullptr, "%s: no to_float", mine->name);
        check(traits->from_float_ref != nullptr, "%s: no from_float_ref", mine->name);

        const ggml_type_traits_cpu * cpu = ggml_get_type_traits_cpu((ggml_type) id);
        check(cpu->from_float != nullptr, "%s: no from_float in the CPU backend", mine->name);
        check(cpu->vec_dot != nullptr, "%s: no vec_dot in the CPU backend", mine->name);
        check(cpu->vec_dot_type == GGML_TYPE_Q8_0, "%s: vec_dot takes %s, not q8_0", mine->name,
              ggml_type_name(cpu->vec_dot_type));
        check(cpu->nrows == 1, "%s: nrows is %d, but vec_dot does one row", mine->name, (int) cpu->nrows);

        if (traits->blck_size == 0) {
            continue;  // ggml_row_size would divide by it
        }
        for (int64_t n = mine->block; n <= 40 * mine->block; n += mine->block) {
            const size_t bytes = ggml_row_size(mine->type, n);
            check(8 * bytes == mine->bits * n, "%s: a row of %d values has %zu bytes, that is not %.3f bits per value",
                  mine->name, (int) n, bytes, mine->bits);
        }
    }
}

// Puts the first values of a block onto the thresholds of all tables, to the nearest float or one beside it, as `turn`
// says.
static void set_on_thresholds(float * x, int64_t block, size_t turn) {
    std::vector<double> thresholds;
    thresholds.insert(thresholds.end(), std::begin(turbokv_lm4_thresholds), std::end(turbokv_lm4_thresholds));
    thresholds.insert(thresholds.end(), std::begin(turbokv_lm8_thresholds), std::end(turbokv_lm8_thresholds));
    thresholds.insert(thresholds.end(), std::begin(turbokv_lm16_thresholds), std::end(turbokv_lm16_thresholds));
    thresholds.insert(thresholds.end(), std::begin(turbokv_tbq3_thresholds), std::end(turbokv_tbq3_thresholds));

    double rest  = 0.0;
    double share = block;  // of the rest in the sum of squares, in units of the block's mean square
    for (size_t j = thresholds.size(); j < (size_t) block; ++j) {
        rest += (double) x[j] * x[j];
    }
    for (const double t : thresholds) {
        share -= t * t;
    }
    const double rms = std::sqrt(rest / share);
    for (size_t t = 0; t < thresholds.size(); ++t) {
        const float inf       = std::numeric_limits<float>::infinity();
        const float at        = (float) (thresholds[t] * rms);
        const float beside[3] = { at, std::nextafter(at, inf), std::nextafter(at, -inf) };
        x[t]                  = beside[(t + turn) % 3];
    }
}

// The CPU's from_float is another compilation of the reference: every byte is the same, whatever the input.
static void check_from_float(const expected & e) {
    using limits           = std::numeric_limits<float>;
    const float inf        = limits::infinity();
    const float scales[8]  = { 1e-44f, 1e-39f, 1e-12f, 0.01f, 1.0f, 300.0f, 65504.0f, 1e30f };
    const float special[7] = { 0.0f, -0.0f, limits::denorm_min(), limits::max(), limits::quiet_NaN(), inf, -inf };

    const int64_t      n_blocks = 4096;
    std::vector<float> x        = gaussian(n_blocks * e.block, e.id);
    for (int64_t i = 0; i < n_blocks; ++i) {
        float *    block       = x.data() + i * e.block;
        const bool heavy_tails = i / 8 % 2 == 1;
        for (int64_t j = 0; j < e.block; ++j) {
            block[j] *= scales[i % 8] * (heavy_tails ? std::fabs(block[j]) : 1.0f);
        }
        switch (i / 16 % 4) {
            case 1:
                set_on_thresholds(block, e.block, i);
                break;
            case 2:
                block[i % e.block] = special[i % 7];
                break;
            case 3:
                std::fill(block, block + e.block - i % 2, special[i % 4]);  // with or without one other value
                break;
        }
    }

    const int64_t        n = x.size();
    std::vector<uint8_t> q_ref(ggml_row_size(e.type, n), 0xa5);
    std::vector<uint8_t> q(q_ref.size(), 0x5a);
    ggml_get_type_traits(e.type)->from_float_ref(x.data(), q_ref.data(), n);
    ggml_get_type_traits_cpu(e.type)->from_float(x.data(), q.data(), n);
    for (size_t i = 0; i < q.size(); ++i) {
        check(q[i] == q_ref[i], "%s: byte %zu of block %zu: from_float 0x%02x, from_float_ref 0x%02x", e.name,
              i % e.size, i / e.size, q[i], q_ref[i]);
    }
}

// vec_dot against float64. y follows x, so that the sum does not cancel and a relative bound is meaningful.
static double check_vec_dot(const expected & e) {
    const auto * traits = ggml_get_type_traits(e.type);
    const auto * cpu    = ggml_get_type_traits_cpu(e.type);
    const auto * q8     = ggml_get_type_traits(GGML_TYPE_Q8_0);
    double       worst  = 0.0;
    for (int64_t n = e.block; n <= 4096; n += e.block) {
        std::vector<float> x = gaussian(n, 2 * n);
        std::vector<float> y = gaussian(n, 2 * n + 1);
        for (int64_t i = 0; i < n; ++i) {
            x[i] *= 1.0f + i / e.block;  // no two blocks have the same scale
            y[i] += x[i];
        }
        std::vector<uint8_t> qx(ggml_row_size(e.type, n));
        std::vector<uint8_t> qy(ggml_row_size(GGML_TYPE_Q8_0, n));
        traits->from_float_ref(x.data(), qx.data(), n);
        q8->from_float_ref(y.data(), qy.data(), n);
        traits->to_float(qx.data(), x.data(), n);
        q8->to_float(qy.data(), y.data(), n);

        double expected_dot = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            expected_dot += (double) x[i] * y[i];
        }
        float dot[2] = { NAN, 42.0f };
        cpu->vec_dot(n, dot, 0, qx.data(), 0, qy.data(), 0, 1);
        const double error = fabs(dot[0] - expected_dot) / fabs(expected_dot);
        check(error < 1e-5, "%s: vec_dot of %d values is %.9g, float64 says %.9g", e.name, (int) n, dot[0],
              expected_dot);
        check(dot[1] == 42.0f, "%s: vec_dot writes more than one value", e.name);
        worst = std::max(worst, error);
    }
    return worst;
}

// A block that could not be encoded stays visible in every score.
static void check_vec_dot_nan(const expected & e) {
    const int64_t      n = 4 * e.block;
    std::vector<float> x = gaussian(n, e.id);
    x[2 * e.block]       = std::numeric_limits<float>::infinity();
    std::vector<uint8_t> qx(ggml_row_size(e.type, n));
    std::vector<uint8_t> qy(ggml_row_size(GGML_TYPE_Q8_0, n));
    ggml_get_type_traits(e.type)->from_float_ref(x.data(), qx.data(), n);
    ggml_get_type_traits(GGML_TYPE_Q8_0)->from_float_ref(gaussian(n, 1).data(), qy.data(), n);
    float dot = 0.0f;
    ggml_get_type_traits_cpu(e.type)->vec_dot(n, &dot, 0, qx.data(), 0, qy.data(), 0, 1);
    check(std::isnan(dot), "%s: vec_dot over a block with an infinity is %g, not NaN", e.name, dot);
}

int main() {
    ggml_cpu_init();
    check_ids();
    if (n_failures > 0) {
        return 1;  // the rest would call missing functions
    }
    for (const expected & e : types) {
        const int before = n_failures;
        check_from_float(e);
        const double worst = check_vec_dot(e);
        check_vec_dot_nan(e);
        printf("%-10s %s, vec_dot relative error at most %.1e (limit 1e-05)\n", e.name,
               n_failures == before ? "ok" : "FAILED", worst);
    }
    return n_failures != 0;
}
