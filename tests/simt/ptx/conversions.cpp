// cvt: between widths of integers, and between the floats of the tiers.
#include <cmath>

#include "emulator/ptx.h"
#include "ptx/machine.h"

namespace ptx {
namespace {

using simt::bits;

template <class D, class A>
void convert(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) { set<D>(w, i.o[0], lane, static_cast<D>(get<A>(w, i.o[1], lane))); });
}

void truncate(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        const auto x = get<float>(w, i.o[1], lane);
        const int32_t y = std::isnan(x) ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : static_cast<int32_t>(x);
        set<int32_t>(w, i.o[0], lane, y);
    });
}

void from_bf16(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) { set<uint32_t>(w, i.o[0], lane, uint32_t{get<uint16_t>(w, i.o[1], lane)} << 16); });
}
void to_bf16(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) { set<uint16_t>(w, i.o[0], lane, simt::round_to_bf16(get<float>(w, i.o[1], lane))); });
}
// A product of two bf16 is exact in fp32.
void multiply_bf16(Warp& w, const Instruction& i) {
    const auto wide = [&](int32_t reg, unsigned lane) { return bits<float>(uint32_t{get<uint16_t>(w, reg, lane)} << 16); };
    each_lane(w.mask, [&](unsigned lane) { set<uint16_t>(w, i.o[0], lane, simt::round_to_bf16(wide(i.o[1], lane) * wide(i.o[2], lane))); });
}
void from_fp16(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) { set<float>(w, i.o[0], lane, simt::widen_fp16(get<uint16_t>(w, i.o[1], lane))); });
}
void to_fp16(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) { set<uint16_t>(w, i.o[0], lane, simt::round_to_fp16(get<float>(w, i.o[1], lane))); });
}

// The first operand comes to lie in the upper half.
template <uint16_t (*round)(float)>
void pair(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        const uint32_t upper = round(get<float>(w, i.o[1], lane)), lower = round(get<float>(w, i.o[2], lane));
        set<uint32_t>(w, i.o[0], lane, upper << 16 | lower);
    });
}

// Rounded once: on the way to fp32 what is lost stays visible in the last bit, so that the second rounding sees it.
float to_odd(double exact) {
    auto near = static_cast<float>(exact);
    if (std::isfinite(near) && static_cast<double>(near) != exact) {
        if (std::fabs(static_cast<double>(near)) > std::fabs(exact)) near = std::nextafter(near, 0.0f);
        near = bits<float>(bits<uint32_t>(near) | 1u);
    }
    return near;
}
float widen_bf16(uint16_t half) { return bits<float>(uint32_t{half} << 16); }
// Two 16-bit floats in a register each: f of the halves of all operands.
template <unsigned N, auto f, auto widen, auto round>
void halves(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        uint32_t found = 0;
        for (unsigned half = 0; half < 2; ++half) {
            double x[3] = {};
            for (unsigned n = 0; n < N; ++n)
                x[n] = widen(static_cast<uint16_t>(get<uint32_t>(w, i.o[n + 1], lane) >> (16 * half)));
            found |= uint32_t{round(to_odd(f(x[0], x[1], x[2])))} << (16 * half);
        }
        set<uint32_t>(w, i.o[0], lane, found);
    });
}

// To nearest, ties away from zero; the 13 bits below are zero.
void to_tf32(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        const auto x = get<uint32_t>(w, i.o[1], lane);
        const bool finite = (x & 0x7f800000u) != 0x7f800000u, nan = (x & 0x7fffffffu) > 0x7f800000u;
        set<uint32_t>(w, i.o[0], lane, finite ? (x + 0x1000u) & ~0x1fffu : nan ? 0x7fffffffu : x);
    });
}

// Sign, four bits of exponent (bias 7), three of fraction; no infinity, NaN is all ones.
float widen_e4m3(unsigned byte) {
    const unsigned exponent = byte >> 3 & 15, fraction = byte & 7;
    if ((byte & 127) == 127) return bits<float>(0x7fffffffu);
    const float size = exponent ? std::ldexp(static_cast<float>(8 + fraction), static_cast<int>(exponent) - 10)
                                : std::ldexp(static_cast<float>(fraction), -9);
    return byte & 128 ? -size : size;
}
unsigned round_to_e4m3(float x) {
    if (std::isnan(x)) return 127;
    const unsigned sign = std::signbit(x) ? 128 : 0;
    const float size = std::fabs(x);
    if (size >= 448.0f) return sign | 126;  // satfinite
    int exponent = 0;
    std::frexp(size, &exponent);
    const int step = std::max(exponent - 1, -6) - 3;
    const float units = std::nearbyint(std::ldexp(size, -step));  // ties to even
    const float rounded = std::ldexp(units, step);
    if (rounded > 448.0f) return sign | 126;
    if (rounded == 0) return sign;
    std::frexp(rounded, &exponent);
    if (exponent - 1 < -6) return sign | static_cast<unsigned>(std::ldexp(rounded, 9));
    const auto fraction = static_cast<unsigned>(std::ldexp(rounded, 3 - (exponent - 1))) - 8;
    return sign | static_cast<unsigned>(exponent - 1 + 7) << 3 | fraction;
}
void to_e4m3(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        const unsigned upper = round_to_e4m3(get<float>(w, i.o[1], lane)), lower = round_to_e4m3(get<float>(w, i.o[2], lane));
        set<uint16_t>(w, i.o[0], lane, static_cast<uint16_t>(upper << 8 | lower));
    });
}
void from_e4m3(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        const unsigned both = get<uint16_t>(w, i.o[1], lane);
        const uint32_t upper = simt::round_to_fp16(widen_e4m3(both >> 8)), lower = simt::round_to_fp16(widen_e4m3(both & 255));
        set<uint32_t>(w, i.o[0], lane, upper << 16 | lower);
    });
}

template <auto widen, auto round>
void pairs(Table& t, const std::string& type) {
    constexpr auto fma = [](double a, double b, double c) { return std::fma(a, b, c); };
    constexpr auto mul = [](double a, double b, double) { return a * b; };
    constexpr auto add = [](double a, double b, double) { return a + b; };
    constexpr auto sub = [](double a, double b, double) { return a - b; };
    t.push_back({"fma.rn." + type, {halves<3, fma, widen, round>, "rrrr"}});
    t.push_back({"mul." + type, {halves<2, mul, widen, round>, "rrr"}});
    t.push_back({"add." + type, {halves<2, add, widen, round>, "rrr"}});
    t.push_back({"sub." + type, {halves<2, sub, widen, round>, "rrr"}});
}

}  // namespace

Table conversions() {
    Table t{
        {"cvt.u16.u32", {convert<uint16_t, uint32_t>, "rr"}},
        {"cvt.u32.u16", {convert<uint32_t, uint16_t>, "rr"}},
        {"cvt.s32.s16", {convert<int32_t, int16_t>, "rr"}},
        {"cvt.u32.u64", {convert<uint32_t, uint64_t>, "rd"}},
        {"cvt.u16.u64", {convert<uint16_t, uint64_t>, "rd"}},
        {"cvt.u64.u16", {convert<uint64_t, uint16_t>, "dr"}},
        {"cvt.u64.u32", {convert<uint64_t, uint32_t>, "dr"}},
        {"cvt.s64.s32", {convert<int64_t, int32_t>, "dr"}},
        {"cvt.rn.f32.s32", {convert<float, int32_t>, "rr"}},
        {"cvt.rn.f32.u32", {convert<float, uint32_t>, "rr"}},
        {"cvt.rn.f32.u16", {convert<float, uint16_t>, "rr"}},
        {"cvt.rn.f64.s32", {convert<double, int32_t>, "dr"}},
        {"cvt.f64.f32", {convert<double, float>, "dr"}},
        {"cvt.rn.f32.f64", {convert<float, double>, "rd"}},
        {"cvt.rzi.s32.f32", {truncate, "rr"}},
        {"cvt.f32.bf16", {from_bf16, "rr"}},
        {"cvt.rn.bf16.f32", {to_bf16, "rr"}},
        {"mul.rn.bf16", {multiply_bf16, "rrr"}},
        {"mul.bf16", {multiply_bf16, "rrr"}},
        {"cvt.f32.f16", {from_fp16, "rr"}},
        {"cvt.rn.f16.f32", {to_fp16, "rr"}},
        {"cvt.rn.bf16x2.f32", {pair<simt::round_to_bf16>, "rrr"}},
        {"cvt.rn.f16x2.f32", {pair<simt::round_to_fp16>, "rrr"}},
        {"cvt.rna.tf32.f32", {to_tf32, "rr"}},
        {"cvt.rn.satfinite.e4m3x2.f32", {to_e4m3, "rrr"}},
        {"cvt.rn.f16x2.e4m3x2", {from_e4m3, "rr"}},
    };
    pairs<widen_bf16, simt::round_to_bf16>(t, "bf16x2");
    pairs<simt::widen_fp16, simt::round_to_fp16>(t, "f16x2");
    return t;
}

}  // namespace ptx
