// Arithmetic, logic, comparisons and branches of PTX, lane by lane. fp32 rounds to nearest, never contracted; .ftz flushes.
// Approximate instructions are off by the units in the last place that the PTX manual allows them (div.full, ex2 and rsqrt about
// two), which the operand's bits draw: nothing may rest on more, and the same operand gives the same result.
#include <bit>
#include <cmath>
#include <limits>

#include "ptx/machine.h"

namespace ptx {
namespace {

using simt::bits;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using f32 = float;
using f64 = double;

template <class D, class A, auto f>
void unary(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) { set<D>(w, i.o[0], lane, static_cast<D>(f(get<A>(w, i.o[1], lane)))); });
}
template <class D, class A, class B, auto f>
void binary(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        set<D>(w, i.o[0], lane, static_cast<D>(f(get<A>(w, i.o[1], lane), get<B>(w, i.o[2], lane))));
    });
}
template <class D, class A, class B, class C, auto f>
void ternary(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        set<D>(w, i.o[0], lane,
               static_cast<D>(f(get<A>(w, i.o[1], lane), get<B>(w, i.o[2], lane), get<C>(w, i.o[3], lane))));
    });
}
template <class T, auto f>
void compare(Warp& w, const Instruction& i) {
    uint32_t found = 0;
    each_lane(w.mask, [&](unsigned lane) {
        found |= static_cast<uint32_t>(f(get<T>(w, i.o[1], lane), get<T>(w, i.o[2], lane))) << lane;
    });
    uint32_t& p = w.p[static_cast<size_t>(i.o[0])];
    p = (p & ~w.mask) | found;
}
template <class T>
void select(Warp& w, const Instruction& i) {
    const uint32_t p = w.p[static_cast<size_t>(i.o[3])];
    each_lane(w.mask, [&](unsigned lane) {
        set<T>(w, i.o[0], lane, p >> lane & 1 ? get<T>(w, i.o[1], lane) : get<T>(w, i.o[2], lane));
    });
}
template <auto f>
void predicates(Warp& w, const Instruction& i) {
    uint32_t& p = w.p[static_cast<size_t>(i.o[0])];
    const uint32_t a = w.p[static_cast<size_t>(i.o[1])];
    const uint32_t b = i.opcode->operands.size() > 2 ? w.p[static_cast<size_t>(i.o[2])] : 0;
    p = (p & ~w.mask) | (f(a, b) & w.mask);
}

// Every NaN is the one that the device makes.
constexpr auto plain = [](auto x) {
    if constexpr (sizeof(x) == 4) return std::isnan(x) ? bits<f32>(0x7fffffffu) : x;
    else return x;
};
constexpr auto add_f = [](auto a, auto b) { return plain(a + b); };
constexpr auto sub_f = [](auto a, auto b) { return plain(a - b); };
constexpr auto mul_f = [](auto a, auto b) { return plain(a * b); };
constexpr auto fma_f = [](auto a, auto b, auto c) { return plain(std::fma(a, b, c)); };
constexpr auto div_f = [](f32 a, f32 b) { return plain(a / b); };
constexpr auto root_f = [](f32 a) { return plain(std::sqrt(a)); };
// Integers wrap: computed as unsigned.
constexpr auto add_i = [](auto a, auto b) { return u64(a) + u64(b); };
constexpr auto sub_i = [](auto a, auto b) { return u64(a) - u64(b); };
constexpr auto mul_i = [](auto a, auto b) { return u64(a) * u64(b); };
constexpr auto mad_i = [](auto a, auto b, auto c) { return u64(a) * u64(b) + u64(c); };
constexpr auto and_i = [](auto a, auto b) { return a & b; };
constexpr auto or_i = [](auto a, auto b) { return a | b; };
constexpr auto xor_i = [](auto a, auto b) { return a ^ b; };
constexpr auto same = [](auto a) { return a; };
constexpr auto negative = [](auto a) { return -a; };
constexpr auto negative_i = [](auto a) { return u64{0} - u64(a); };
constexpr auto complement = [](auto a) { return ~a; };
constexpr auto magnitude = [](f32 a) { return bits<f32>(bits<u32>(a) & 0x7fffffffu); };
constexpr auto high = [](auto a, auto b) {
    if constexpr (sizeof(a) == 2) return (s64(a) * s64(b)) >> 16;
    else return (s64(a) * s64(b)) >> 32;
};
constexpr auto high_unsigned = [](auto a, auto b) { return (u64(a) * u64(b)) >> (8 * sizeof(a)); };
// What a device gives for a division by zero is not defined; this is what it does.
constexpr auto quotient = [](auto a, auto b) { return b == 0 ? decltype(a)(-1) : b == decltype(b)(-1) && std::is_signed_v<decltype(b)> ? decltype(a)(u64{0} - u64(a)) : decltype(a)(a / b); };
constexpr auto remainder_i = [](auto a, auto b) { return b == 0 ? a : b == decltype(b)(-1) && std::is_signed_v<decltype(b)> ? decltype(a)(0) : decltype(a)(a % b); };
constexpr auto least = [](auto a, auto b) { return b < a ? b : a; };
constexpr auto most = [](auto a, auto b) { return a < b ? b : a; };
constexpr auto left = [](auto a, u32 by) { return by >= 8 * sizeof(a) ? decltype(a)(0) : decltype(a)(u64(a) << by); };
constexpr auto right = [](auto a, u32 by) {
    if (by >= 8 * sizeof(a)) return decltype(a)(a < 0 ? -1 : 0);
    return decltype(a)(a >> by);
};

template <class A, class D>
void unpack(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        const A both = get<A>(w, i.o[2], lane);
        set<D>(w, i.o[0], lane, static_cast<D>(both));
        set<D>(w, i.o[1], lane, static_cast<D>(both >> (8 * sizeof(D))));
    });
}

// A NaN gives way to the other number; -0 is less than +0.
f32 least_f(f32 a, f32 b) {
    if (std::isnan(a)) return std::isnan(b) ? bits<f32>(0x7fffffffu) : b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}
f32 most_f(f32 a, f32 b) {
    if (std::isnan(a)) return std::isnan(b) ? bits<f32>(0x7fffffffu) : b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a < b ? b : a;
}

f32 flush(f32 x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Off by up to so many units in the last place, as the operand's bits draw.
f32 nearly(f64 exact, u32 seed, int units) {
    auto x = plain(static_cast<f32>(exact));
    if (!std::isnormal(x) || static_cast<f64>(x) == exact) return x;
    const u32 drawn = (seed ^ seed >> 15) * 0x9e3779b1u >> 24;
    const f32 towards = drawn & 1 ? 0.0f : std::copysign(std::numeric_limits<f32>::max(), x);
    for (int left = static_cast<int>(drawn >> 1) % (units + 1); left > 0; --left) x = std::nextafter(x, towards);
    return x;
}
template <bool FTZ>
f32 exp2_near(f32 x) {
    const f32 y = nearly(std::exp2(static_cast<f64>(FTZ ? flush(x) : x)), bits<u32>(x), 2);
    return FTZ ? flush(y) : y;
}
f32 rsqrt_near(f32 x) { return flush(nearly(1.0 / std::sqrt(static_cast<f64>(flush(x))), bits<u32>(x), 1)); }
f32 sqrt_near(f32 x) { return flush(nearly(std::sqrt(static_cast<f64>(flush(x))), bits<u32>(x), 1)); }
// A divisor above 2^126 gives 0, or NaN for what is infinite.
f32 divide_near(f32 a, f32 b) {
    if (std::isfinite(b) && std::fabs(b) > 0x1p126f)
        return std::isfinite(a) ? std::copysign(0.0f, a * std::copysign(1.0f, b)) : bits<f32>(0x7fffffffu);
    return nearly(static_cast<f64>(a) / static_cast<f64>(b), bits<u32>(a) ^ bits<u32>(b), 2);
}

u32 field_unsigned(u32 a, u32 from, u32 length) {
    from &= 255, length &= 255;
    if (from > 31 || length == 0) return 0;
    const u64 wide = u64(a) >> from;
    return static_cast<u32>(length > 31 ? wide : wide & ((u64{1} << length) - 1));
}
u32 field_signed(u32 a, u32 from, u32 length) {
    from &= 255, length &= 255;
    if (length == 0) return 0;
    const u32 last = std::min(from + length - 1, 31u);
    const bool sign = a >> last & 1;
    const u32 found = field_unsigned(a, from, length), have = from > 31 ? 0 : std::min(length, 32 - from);
    return sign && have < 32 ? found | ~u32{0} << have : found;
}

u32 permute(u32 a, u32 b, u32 how) {
    const u64 both = u64(b) << 32 | a;
    u32 found = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const u32 pick = how >> (4 * i) & 15;
        u32 byte = static_cast<u32>(both >> (8 * (pick & 7)) & 255);
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        found |= byte << (8 * i);
    }
    return found;
}

void branch(Warp& w, const Instruction& i) { go_to(w, static_cast<uint32_t>(i.imm[0])); }
void leave(Warp& w, const Instruction& i) { end_lanes(w, i); }
void barrier(Warp& w, const Instruction& i) {
    if (i.imm[0] != 0) fault(w, i, "bar.sync of a barrier other than 0 is not emulated");
    arrive(w, i);
}

constexpr auto EQ = [](auto a, auto b) { return a == b; };
constexpr auto NE = [](auto a, auto b) { return a != b; };
constexpr auto LT = [](auto a, auto b) { return a < b; };
constexpr auto LE = [](auto a, auto b) { return a <= b; };
constexpr auto GT = [](auto a, auto b) { return a > b; };
constexpr auto GE = [](auto a, auto b) { return a >= b; };

template <class T>
void integers(Table& t, const std::string& type, const std::string& plain, char file) {
    const std::string two{file, file}, three{file, file, file}, four{file, file, file, file}, shift{file, file, 'r'};
    t.push_back({"add." + type, {binary<T, T, T, add_i>, three}});
    t.push_back({"sub." + type, {binary<T, T, T, sub_i>, three}});
    t.push_back({"mul.lo." + type, {binary<T, T, T, mul_i>, three}});
    t.push_back({"mad.lo." + type, {ternary<T, T, T, T, mad_i>, four}});
    t.push_back({"div." + type, {binary<T, T, T, quotient>, three}});
    t.push_back({"rem." + type, {binary<T, T, T, remainder_i>, three}});
    t.push_back({"min." + type, {binary<T, T, T, least>, three}});
    t.push_back({"max." + type, {binary<T, T, T, most>, three}});
    t.push_back({"shr." + type, {binary<T, T, u32, right>, shift}});
    t.push_back({"neg." + type, {unary<T, T, negative_i>, two}});
    t.push_back({"setp.lt." + type, {compare<T, LT>, std::string("p") + file + file}});
    t.push_back({"setp.le." + type, {compare<T, LE>, std::string("p") + file + file}});
    t.push_back({"setp.gt." + type, {compare<T, GT>, std::string("p") + file + file}});
    t.push_back({"setp.ge." + type, {compare<T, GE>, std::string("p") + file + file}});
    t.push_back({"mov." + type, {unary<T, T, same>, two}});
    if (plain.empty()) return;
    for (const std::string& name : {plain, type}) {
        t.push_back({"setp.eq." + name, {compare<T, EQ>, std::string("p") + file + file}});
        t.push_back({"setp.ne." + name, {compare<T, NE>, std::string("p") + file + file}});
    }
    t.push_back({"and." + plain, {binary<T, T, T, and_i>, three}});
    t.push_back({"or." + plain, {binary<T, T, T, or_i>, three}});
    t.push_back({"xor." + plain, {binary<T, T, T, xor_i>, three}});
    t.push_back({"not." + plain, {unary<T, T, complement>, two}});
    t.push_back({"shl." + plain, {binary<T, T, u32, left>, shift}});
    t.push_back({"mov." + plain, {unary<T, T, same>, two}});
    t.push_back({"selp." + plain, {select<T>, three + "p"}});
}
void warp_barrier(Warp& w, const Instruction& i) {
    if (get<u32>(w, i.o[0], 0) != ALL) fault(w, i, "bar.warp.sync of a part of the warp is not emulated");
    simt::meet({w.lanes, w.lanes + LANES});
}

}  // namespace

Table arithmetic() {
    Table t;
    integers<u16>(t, "u16", "b16", 'r');
    integers<s16>(t, "s16", "", 'r');
    integers<u32>(t, "u32", "b32", 'r');
    integers<s32>(t, "s32", "", 'r');
    integers<u64>(t, "u64", "b64", 'd');
    integers<s64>(t, "s64", "", 'd');
    t.push_back({"mul.hi.s32", {binary<s32, s32, s32, high>, "rrr"}});
    t.push_back({"mul.hi.u32", {binary<u32, u32, u32, high_unsigned>, "rrr"}});
    t.push_back({"mul.hi.u16", {binary<u16, u16, u16, high_unsigned>, "rrr"}});
    t.push_back({"mul.wide.s32", {binary<s64, s32, s32, [](s32 a, s32 b) { return s64(a) * b; }>, "drr"}});
    t.push_back({"mul.wide.u32", {binary<u64, u32, u32, [](u32 a, u32 b) { return u64(a) * b; }>, "drr"}});
    t.push_back({"mad.wide.s32",
                 {ternary<u64, s32, s32, u64, [](s32 a, s32 b, u64 c) { return u64(s64(a) * b) + c; }>, "drrd"}});
    t.push_back({"mad.wide.u32", {ternary<u64, u32, u32, u64, [](u32 a, u32 b, u64 c) { return u64(a) * b + c; }>, "drrd"}});
    t.push_back({"bfe.u32", {ternary<u32, u32, u32, u32, field_unsigned>, "rrrr"}});
    t.push_back({"bfe.s32", {ternary<u32, u32, u32, u32, field_signed>, "rrrr"}});
    t.push_back({"popc.b32", {unary<u32, u32, [](u32 a) { return std::popcount(a); }>, "rr"}});
    t.push_back({"prmt.b32", {ternary<u32, u32, u32, u32, permute>, "rrrr"}});

    for (const char* rounding : {"", "rn."}) {  // what may be contracted, and what may not
        const std::string type = std::string(rounding) + "f32";
        t.push_back({"add." + type, {binary<f32, f32, f32, add_f>, "rrr"}});
        t.push_back({"sub." + type, {binary<f32, f32, f32, sub_f>, "rrr"}});
        t.push_back({"mul." + type, {binary<f32, f32, f32, mul_f>, "rrr"}});
    }
    t.push_back({"fma.rn.f32", {ternary<f32, f32, f32, f32, fma_f>, "rrrr"}});
    t.push_back({"div.rn.f32", {binary<f32, f32, f32, div_f>, "rrr"}});
    t.push_back({"div.full.f32", {binary<f32, f32, f32, divide_near>, "rrr"}});
    t.push_back({"sqrt.rn.f32", {unary<f32, f32, root_f>, "rr"}});
    t.push_back({"neg.f32", {unary<f32, f32, negative>, "rr"}});
    t.push_back({"abs.f32", {unary<f32, f32, magnitude>, "rr"}});
    t.push_back({"min.f32", {binary<f32, f32, f32, least_f>, "rrr"}});
    t.push_back({"max.f32", {binary<f32, f32, f32, most_f>, "rrr"}});
    t.push_back({"ex2.approx.f32", {unary<f32, f32, exp2_near<false>>, "rr"}});
    t.push_back({"ex2.approx.ftz.f32", {unary<f32, f32, exp2_near<true>>, "rr"}});
    t.push_back({"rsqrt.approx.ftz.f32", {unary<f32, f32, rsqrt_near>, "rr"}});
    t.push_back({"sqrt.approx.ftz.f32", {unary<f32, f32, sqrt_near>, "rr"}});
    t.push_back({"setp.gt.f32", {compare<f32, GT>, "prr"}});
    t.push_back({"setp.ge.f32", {compare<f32, GE>, "prr"}});
    t.push_back({"setp.lt.f32", {compare<f32, LT>, "prr"}});
    t.push_back({"setp.le.f32", {compare<f32, LE>, "prr"}});
    t.push_back({"setp.eq.f32", {compare<f32, EQ>, "prr"}});
    t.push_back({"setp.neu.f32", {compare<f32, NE>, "prr"}});
    t.push_back({"setp.num.f32", {compare<f32, [](f32 a, f32 b) { return !std::isnan(a) && !std::isnan(b); }>, "prr"}});
    t.push_back({"setp.nan.f32", {compare<f32, [](f32 a, f32 b) { return std::isnan(a) || std::isnan(b); }>, "prr"}});
    t.push_back({"selp.f32", {select<f32>, "rrrp"}});
    t.push_back({"selp.f64", {select<f64>, "dddp"}});
    for (const char* type : {"f64", "rn.f64"}) {
        t.push_back({std::string("add.") + type, {binary<f64, f64, f64, add_f>, "ddd"}});
        t.push_back({std::string("mul.") + type, {binary<f64, f64, f64, mul_f>, "ddd"}});
    }
    t.push_back({"fma.rn.f64", {ternary<f64, f64, f64, f64, fma_f>, "dddd"}});

    t.push_back({"mov.b32 pack", {binary<u32, u16, u16, [](u16 low, u16 high) { return u32(high) << 16 | low; }>, "rrr"}});
    t.push_back({"mov.b64 pack", {binary<u64, u32, u32, [](u32 low, u32 high) { return u64(high) << 32 | low; }>, "drr"}});
    t.push_back({"mov.b32 unpack", {unpack<u32, u16>, "rrr"}});
    t.push_back({"mov.b64 unpack", {unpack<u64, u32>, "rrd"}});

    t.push_back({"and.pred", {predicates<[](u32 a, u32 b) { return a & b; }>, "ppp"}});
    t.push_back({"or.pred", {predicates<[](u32 a, u32 b) { return a | b; }>, "ppp"}});
    t.push_back({"xor.pred", {predicates<[](u32 a, u32 b) { return a ^ b; }>, "ppp"}});
    t.push_back({"not.pred", {predicates<[](u32 a, u32) { return ~a; }>, "pp"}});
    t.push_back({"mov.pred", {predicates<[](u32 a, u32) { return a; }>, "pp"}});

    t.push_back({"bra", {branch, "l"}});
    t.push_back({"bra.uni", {branch, "l"}});
    t.push_back({"ret", {leave, ""}});
    t.push_back({"bar.sync", {barrier, "i", true}});
    t.push_back({"bar.warp.sync", {warp_barrier, "r", true}});
    return t;
}

}  // namespace ptx
