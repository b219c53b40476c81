// A square of 32 rows by 32 outputs is summed in four tiles, with all inputs of a panel in L1. Many rows: a thread takes 64
// of them and all panels, and finishes their sums while they are in L2. Few rows: a thread takes panels.
#include "cpu/int8_linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/integer_level.h"
#include "cpu/integer_simd.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace smolvla::cpu {
namespace {

constexpr int64_t kBlockRows = 64, kStartBytes = kInt8Panel * 4;

#if defined(SMOLVLA_HAS_AMX)
void finish(const Int8Linear& a, int64_t first, int64_t rows, float* sums, const float* up, int num_threads) {
    if (!a.x_scale) return;
    const int64_t at = first * a.outputs;
    const Sums s{sums, a.x_scale + first, a.bias, a.activation, rows, a.outputs};
    if (a.out.data) quantize_sums(s, up, {a.out.data + at, a.out.scale + first}, num_threads);
    else finish_sums(s, a.residual ? a.residual + at : nullptr, num_threads);
}

namespace amx {

constexpr int64_t kSquare = 32;

// Rows of a square as tiles read them: where they lie, or copied where a tile would read beyond the last row or input.
struct SquareOfRows {
    SquareOfRows(const Int8Linear& a, int64_t first, uint8_t* copy)
        : rows(std::min(a.rows - first, kSquare)), at(a.x + first * a.inputs), stride(a.inputs) {
        if (rows == kSquare && a.inputs % kInt8Step == 0) return;
        stride = ceil_div(a.inputs, kInt8Step) * kInt8Step;
        for (int64_t row = 0; row < rows; ++row) {
            std::memcpy(copy + row * stride, at + row * a.inputs, a.inputs);
            std::memset(copy + row * stride + a.inputs, 0, stride - a.inputs);
        }
        std::memset(copy + rows * stride, 0, (kSquare - rows) * stride);
        at = copy;
    }
    int64_t rows;
    const uint8_t* at;
    int64_t stride;
};

// to[row, 0:outputs] = scale · sums of a panel
SMOLVLA_AMX void square(const SquareOfRows& x, const int8_t* panel, int64_t steps, const float* scale, int64_t outputs, float* to,
                        int64_t stride) {
    alignas(64) int32_t sums[kSquare * kInt8Panel];
    const auto* const start = reinterpret_cast<const int32_t*>(panel);
    const int8_t* w = panel + kStartBytes;
    const uint8_t *low = x.at, *high = x.at + 16 * x.stride;
    // GCC's functions do not say that they read memory.
    __asm__ volatile("" ::: "memory");
    // A stride of nothing has every row begin alike.
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start, 0);
    _tile_loadd(3, start + 16, 0);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, low, x.stride);
        _tile_loadd(6, w, 64);
        _tile_loadd(5, high, x.stride);
        _tile_loadd(7, w + 1024, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(3, 5, 7);
        low += kInt8Step;
        high += kInt8Step;
        w += 2048;
    }
    _tile_stored(0, sums, kInt8Panel * 4);
    _tile_stored(1, sums + 16, kInt8Panel * 4);
    _tile_stored(2, sums + 16 * kInt8Panel, kInt8Panel * 4);
    _tile_stored(3, sums + 16 * kInt8Panel + 16, kInt8Panel * 4);
    __asm__ volatile("" ::: "memory");
    if (outputs == kInt8Panel)
        for (int64_t row = 0; row < x.rows; ++row)
            for (int64_t o = 0; o < kInt8Panel; ++o)
                to[row * stride + o] = static_cast<float>(sums[row * kInt8Panel + o]) * scale[o];
    else
        for (int64_t row = 0; row < x.rows; ++row)
            for (int64_t o = 0; o < outputs; ++o)
                to[row * stride + o] = static_cast<float>(sums[row * kInt8Panel + o]) * scale[o];
}

struct Panels {
    explicit Panels(const Int8Linear& a)
        : a(a), steps(ceil_div(a.inputs, kInt8Step)), bytes(int8_panel_bytes(a.inputs)),
          count(ceil_div(a.outputs, kInt8Panel)) {}
    SMOLVLA_AMX void multiply(const SquareOfRows& x, int64_t panel, const int8_t* weight, const float* scale, float* to) const {
        const int64_t first = panel * kInt8Panel;
        square(x, weight + panel * bytes, steps, scale + first, std::min(a.outputs - first, kInt8Panel), to + first, a.outputs);
    }
    const Int8Linear& a;
    int64_t steps, bytes, count;
};

// Blocks of rows.
SMOLVLA_AMX void whole_rows(const Panels& p, Ranges& ranges) {
    const Int8Linear& a = p.a;
    const int64_t copied = kSquare * p.steps * kInt8Step / 4, each = kBlockRows * a.outputs;
    // What y holds is read before it is written, where it is the residual too.
    const bool apart = !a.y || a.y == a.residual;
    float* const scratch = Scratch::reserve(2 * copied + (apart ? each : 0) + (a.up_weight ? each : 0) + 64);
    auto* const copies = reinterpret_cast<uint8_t*>(scratch);
    float* const own = scratch + 2 * copied;
    float* const up = a.up_weight ? own + (apart ? each : 0) : nullptr;
    const IntegerAmx::SetUp set_up;
    for (int64_t begin, end; ranges.next(begin, end);)
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * kBlockRows, rows = std::min(a.rows - first, kBlockRows);
            float* const sums = apart ? own : a.y + first * a.outputs;
            const SquareOfRows low(a, first, copies);
            const bool two = rows > kSquare;
            const SquareOfRows high(a, first + (two ? kSquare : 0), copies + 4 * copied);
            for (int64_t panel = 0; panel < p.count; ++panel) {
                p.multiply(low, panel, a.weight, a.scale, sums);
                if (two) p.multiply(high, panel, a.weight, a.scale, sums + kSquare * a.outputs);
                if (!up) continue;
                p.multiply(low, panel, a.up_weight, a.up_scale, up);
                if (two) p.multiply(high, panel, a.up_weight, a.up_scale, up + kSquare * a.outputs);
            }
            finish(a, first, rows, sums, up, 1);
            if (apart && a.y) std::memcpy(a.y + first * a.outputs, own, rows * a.outputs * sizeof(float));
        }
}

// Panels of all rows.
SMOLVLA_AMX void whole_panels(const Panels& p, Ranges& ranges) {
    const Int8Linear& a = p.a;
    auto* const copy = reinterpret_cast<uint8_t*>(Scratch::reserve(kSquare * p.steps * kInt8Step / 4));
    const IntegerAmx::SetUp set_up;
    for (int64_t begin, end; ranges.next(begin, end);)
        for (int64_t first = 0; first < a.rows; first += kSquare) {
            const SquareOfRows x(a, first, copy);
            for (int64_t panel = begin; panel < end; ++panel) {
                p.multiply(x, panel, a.weight, a.scale, a.y + first * a.outputs);
                if (a.up_weight) p.multiply(x, panel, a.up_weight, a.up_scale, a.up_sums + first * a.outputs);
            }
        }
}

}  // namespace amx
#endif

}  // namespace

int64_t int8_panel_bytes(int64_t inputs) { return kStartBytes + ceil_div(inputs, kInt8Step) * kInt8Step * kInt8Panel; }

void pack_int8_panels(const int8_t* weight, int8_t* panels, int64_t outputs, int64_t inputs) {
    const int64_t bytes = int8_panel_bytes(inputs);
    std::memset(panels, 0, ceil_div(outputs, kInt8Panel) * bytes);
    for (int64_t out = 0; out < outputs; ++out) {
        int8_t* const panel = panels + out / kInt8Panel * bytes;
        const int64_t tile = out % kInt8Panel / 16 * 1024, column = out % 16 * 4;
        int32_t sum = 0;
        for (int64_t i = 0; i < inputs; ++i) {
            const int8_t w = weight[out * inputs + i];
            sum += w;
            panel[kStartBytes + i / kInt8Step * 2048 + tile + i % kInt8Step / 4 * 64 + column + i % 4] = w;
        }
        sum *= -128;
        std::memcpy(panel + out % kInt8Panel * sizeof sum, &sum, sizeof sum);
    }
}

bool int8_rows_fit(int64_t rows, int num_threads) { return rows >= 2 * kBlockRows * num_threads; }

void int8_linear(const Int8Linear& a, int num_threads) {
    // Asking for the level is what has the system grant the tiles.
    if (integer_level() != IntegerLevel::amx) throw std::runtime_error("int8 linear needs AMX, which is not in use here");
#if defined(SMOLVLA_HAS_AMX)
    const amx::Panels p(a);
    if (int8_rows_fit(a.rows, num_threads)) {
        const int64_t blocks = ceil_div(a.rows, kBlockRows);
        return parallel_ranges(blocks, kBlockRows * a.inputs * a.outputs / 256, 1, 1, num_threads,
                               [&](Ranges& ranges) { amx::whole_rows(p, ranges); });
    }
    parallel_ranges(p.count, a.rows * a.inputs * kInt8Panel / 256, 1, 4, num_threads,
                    [&](Ranges& ranges) { amx::whole_panels(p, ranges); });
    finish(a, 0, a.rows, a.y, a.up_sums, num_threads);
#else
    (void)a, (void)num_threads;
#endif
}

}  // namespace smolvla::cpu
