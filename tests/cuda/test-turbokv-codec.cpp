// The device codec, cuda/codec.cuh, on an emulated warp against the C reference, bit for bit and without a GPU: the
// inputs of tests/golden/*.bin, random blocks of all magnitudes, and random bytes.
// Usage: test-turbokv-codec GOLDEN_FOLDER
//
// What it cannot show: that nvcc keeps the arithmetic. scripts/gpu.sh runs test-turbokv-ops for that.

#include "codec.cuh"

#include <cstdio>
#include <fstream>
#include <random>
#include <string>

static int n_wrong = 0;

static bool same(float a, float b) {
    return (std::isnan(a) && std::isnan(b)) || as<uint32_t>(a) == as<uint32_t>(b);
}

static void expect(bool ok, ggml_type type, const char * what, int block) {
    if (!ok && ++n_wrong <= 20) {
        fprintf(stderr, "%s, block %d: %s\n", ggml_type_name(type), block, what);
    }
}

template <typename codec>
static void check_decode(ggml_type type, const std::vector<uint8_t> & bytes, int block) {
    float want[codec::qk];
    ggml_get_type_traits(type)->to_float(bytes.data(), want, codec::qk);
    alignas(8) float    f32[codec::qk + 1];
    alignas(8) uint16_t f16[codec::qk + 1];
    run_warp([&] { turbokv_store_values<true>(turbokv_load_indices<codec>(bytes.data()), f32); });
    expect(std::equal(want, want + codec::qk, f32, same), type, "decoded values, aligned", block);
    for (int shift = 0; shift < 2; ++shift) {  // odd: pairs are not aligned
        run_warp([&] { turbokv_store_values(turbokv_load_indices<codec>(bytes.data()), f32 + shift); });
        run_warp([&] { turbokv_store_values(turbokv_load_indices<codec>(bytes.data()), (half *) f16 + shift); });
        bool ok = true;
        for (int j = 0; j < codec::qk; ++j) {
            const float rounded = ggml_fp16_to_fp32(ggml_fp32_to_fp16(want[j]));
            ok &= same(f32[j + shift], want[j]) && same(ggml_fp16_to_fp32(f16[j + shift]), rounded);
        }
        expect(ok, type, "decoded values", block);
    }
}

template <typename codec>
static void check_encode(ggml_type type, const std::vector<float> & x, int block) {
    std::vector<uint8_t> want(codec::block_bytes, 0xa5), got(want);
    ggml_get_type_traits(type)->from_float_ref(x.data(), want.data(), codec::qk);
    run_warp([&] { turbokv_encode_block<codec>(x.data(), got.data()); });
    expect(got == want, type, "encoded bytes", block);
    check_decode<codec>(type, want, block);
}

template <typename codec>
static void check(ggml_type type, const std::string & golden) {
    std::ifstream file(golden + "/" + ggml_type_name(type) + ".bin", std::ios::binary);
    uint32_t      header[6];  // magic, version, type, block, bytes, blocks
    file.read((char *) header, sizeof(header));
    GGML_ASSERT(file && header[3] == codec::qk && header[4] == codec::block_bytes && header[5] > 0);
    std::vector<float> x(codec::qk);
    for (uint32_t block = 0; block < header[5]; ++block) {
        file.read((char *) x.data(), x.size() * sizeof(float));
        file.ignore(codec::block_bytes + x.size() * sizeof(float));
        GGML_ASSERT(file);
        check_encode<codec>(type, x, block);
    }

    std::mt19937                    random(type);
    std::normal_distribution<float> gaussian;
    for (int block = 1000; block < 1600; ++block) {
        const int exponent = block < 1300 ? 0 : (int) (random() % 250) - 145;
        for (float & v : x) {
            v = std::ldexp(random() % 16 ? gaussian(random) : 0.0f, exponent);
        }
        check_encode<codec>(type, x, block);
    }
    std::vector<uint8_t> bytes(codec::block_bytes);
    for (int block = 2000; block < 2200; ++block) {
        std::generate(bytes.begin(), bytes.end(), [&] { return (uint8_t) random(); });
        check_decode<codec>(type, bytes, block);
    }
}

static const ggml_type types[] = {
#include "turbokv-cache-types.inc"
};

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s GOLDEN_FOLDER\n", argv[0]);
        return 2;
    }
    for (const ggml_type type : types) {
        turbokv_with_codec(type, [&](auto codec) { check<decltype(codec)>(type, argv[1]); });
    }
    printf("%d wrong\n", n_wrong);
    return n_wrong != 0;
}
