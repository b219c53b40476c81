// One call of every kernel, as in tests/support/masked.py, compiled for a processor that is not here and run under QEMU.
#include <cstdio>
#include <numeric>
#include <vector>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/image_prep.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/quantize.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"

using namespace smolvla::cpu;

template <class T>
void print(const std::vector<T>& values, const char* behind) {
    std::printf("%.9g%s", std::accumulate(values.begin(), values.end(), 0.0), behind);
}

int main() {
    std::vector<float> x(64), ones(64, 1.0f), y(64), sums(64), out(64), image(192), turned(64), normed(64), scale(64);
    std::iota(x.begin(), x.end(), 0.0f);
    std::vector<uint8_t> pixels(48), data(64);
    std::iota(pixels.begin(), pixels.end(), uint8_t{0});

    rms_norm<float>(x.data(), ones.data(), y.data(), 1, 64, 1e-5f, 1);
    linear<float, float, float>({x.data(), nullptr, ones.data(), nullptr, nullptr, nullptr, sums.data(), 4, 16, 4,
                                 Activation::silu, 1e-5f}, 1);
    Attention a{x.data(), x.data(), x.data(), nullptr, out.data(), 1, 4, 4, 1, 1, 16, {64, 16, 16}, {64, 16, 16},
                {64, 16, 16}, {0, 0, 0}, 0.01f};
    attention<float>(a, 1);
    image_prep<uint8_t, float>({pixels.data(), image.data(), 1, 4, 4, 8, 8, 8, 8, 48, 1, 12, 3}, 1);
    rope<float>({x.data(), turned.data(), ones.data(), ones.data(), 1, 2, 2, 16, {64, 32, 16}, 0}, 1);
    quantize_rows<float>(Norm::rms, x.data(), ones.data(), nullptr, {data.data(), scale.data()}, 1, 64, 1e-5f, 1);
    layer_norm<float, float>(x.data(), ones.data(), ones.data(), normed.data(), 1, 64, 1e-5f, 1);

    std::printf("{\"best\": %d, \"results\": [", static_cast<int>(best_level()));
    for (const auto* each : {&y, &sums, &out, &image, &turned}) print(*each, ", ");
    print(data, ", ");
    print(normed, "]}\n");
}
