// What a warp does as one: shuffles, ldmatrix and stmatrix, mma, and wgmma, which reads shared memory until it is waited for.
#include <algorithm>
#include <cstring>

#include "emulator/mma.h"
#include "ptx/machine.h"

namespace ptx {
namespace {

using simt::bits;
using simt::Path;

template <bool EXCLUSIVE_OR>
void shuffle(Warp& w, const Instruction& i) {
    uint32_t from[LANES];
    for (unsigned lane = 0; lane < LANES; ++lane) from[lane] = get<uint32_t>(w, i.o[1], lane);
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const uint32_t operand = get<uint32_t>(w, i.o[2], lane), clamp = get<uint32_t>(w, i.o[3], lane);
        if (clamp != 31 || get<uint32_t>(w, i.o[4], lane) != ALL)
            fault(w, i, "a shuffle of a part of the warp is not emulated", lane);
        set<uint32_t>(w, i.o[0], lane, from[EXCLUSIVE_OR ? (lane ^ operand) & 31 : operand & 31]);
    }
}

template <bool LEAST>
void reduce(Warp& w, const Instruction& i) {
    auto found = get<int32_t>(w, i.o[1], 0);
    for (unsigned lane = 0; lane < LANES; ++lane) {
        if (get<uint32_t>(w, i.o[2], lane) != ALL) fault(w, i, "a reduction of a part of the warp is not emulated", lane);
        const auto other = get<int32_t>(w, i.o[1], lane);
        if (lane > 0) found = LEAST ? std::min(found, other) : static_cast<int32_t>(int64_t{found} + other);
    }
    for (unsigned lane = 0; lane < LANES; ++lane) set<int32_t>(w, i.o[0], lane, found);
}

unsigned char* row_of(Warp& w, const Instruction& i, unsigned lane, uint32_t offset) {
    simt::Shared& shared = w.block->block->shared;
    if (size_t{offset} + 16 > shared.bytes)
        fault(w, i, "out-of-bounds row of a matrix at shared byte " + std::to_string(offset) + " of " + std::to_string(shared.bytes), lane);
    if (offset % 16) fault(w, i, "misaligned row of a matrix at shared byte " + std::to_string(offset), lane);
    return reinterpret_cast<unsigned char*>(shared.low + offset);
}

template <unsigned N, bool TRANSPOSED>
void load_matrices(Warp& w, const Instruction& i) {
    uint16_t rows[8 * N][8];
    for (unsigned lane = 0; lane < 8 * N; ++lane) {
        const auto* row = row_of(w, i, lane, get<uint32_t>(w, i.o[N], lane) + static_cast<uint32_t>(i.imm[0]));
        As who(w.lanes[lane]);
        simt::access(reinterpret_cast<uintptr_t>(row), 16, simt::READ, Path::l2, site_of(i));
        std::memcpy(rows[lane], row, 16);
    }
    for (unsigned lane = 0; lane < LANES; ++lane)
        for (unsigned n = 0; n < N; ++n) {
            const auto* tile = &rows[8 * n];
            const unsigned g = lane / 4, t = lane % 4 * 2;
            const uint32_t low = TRANSPOSED ? tile[t][g] : tile[g][t], high = TRANSPOSED ? tile[t + 1][g] : tile[g][t + 1];
            set<uint32_t>(w, i.o[n], lane, low | high << 16);
        }
}

template <unsigned N, bool TRANSPOSED>
void store_matrices(Warp& w, const Instruction& i) {
    uint16_t rows[8 * N][8];
    for (unsigned lane = 0; lane < LANES; ++lane)
        for (unsigned n = 0; n < N; ++n) {
            auto* tile = &rows[8 * n];
            const unsigned g = lane / 4, t = lane % 4 * 2;
            const auto pair = get<uint32_t>(w, i.o[1 + n], lane);
            (TRANSPOSED ? tile[t][g] : tile[g][t]) = static_cast<uint16_t>(pair);
            (TRANSPOSED ? tile[t + 1][g] : tile[g][t + 1]) = static_cast<uint16_t>(pair >> 16);
        }
    for (unsigned lane = 0; lane < 8 * N; ++lane) {
        const uint32_t offset = get<uint32_t>(w, i.o[0], lane) + static_cast<uint32_t>(i.imm[0]);
        auto* row = row_of(w, i, lane, offset);
        As who(w.lanes[lane]);
        simt::writes_again = !std::memcmp(row, rows[lane], 16);
        simt::access(reinterpret_cast<uintptr_t>(row), 16, simt::WRITE, Path::l2, site_of(i));
        simt::writes_again = false;
        std::memcpy(row, rows[lane], 16);
        stored(w, offset, 16);
    }
}

enum class Kind { bf16, f16, tf32 };
float tf32(uint32_t x) { return bits<float>(x & ~0x1fffu); }
template <Kind KIND>
void put(uint32_t pair, float& low, float& high) {
    if constexpr (KIND == Kind::tf32) {
        low = tf32(pair);
        return;
    }
    low = KIND == Kind::bf16 ? bits<float>(pair << 16) : simt::widen_fp16(static_cast<uint16_t>(pair));
    high = KIND == Kind::bf16 ? bits<float>(pair & 0xffff0000u) : simt::widen_fp16(static_cast<uint16_t>(pair >> 16));
}

// d = a · b + c in tiles of 16 x 8: 16 of k for 16-bit floats, 8 for tf32.
template <Kind KIND>
void multiply(Warp& w, const Instruction& i) {
    float a[16][16] = {}, b[16][8] = {}, d[16][8];
    const int32_t *A = i.o + 4, *B = i.o + 8, *C = i.o + 10;
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const unsigned g = lane / 4, t = lane % 4;
        const auto from = [&](const int32_t* list, unsigned n) { return get<uint32_t>(w, list[n], lane); };
        if constexpr (KIND == Kind::tf32) {
            a[g][t] = tf32(from(A, 0)), a[g + 8][t] = tf32(from(A, 1));
            a[g][t + 4] = tf32(from(A, 2)), a[g + 8][t + 4] = tf32(from(A, 3));
            b[t][g] = tf32(from(B, 0)), b[t + 4][g] = tf32(from(B, 1));
        } else {
            put<KIND>(from(A, 0), a[g][2 * t], a[g][2 * t + 1]);
            put<KIND>(from(A, 1), a[g + 8][2 * t], a[g + 8][2 * t + 1]);
            put<KIND>(from(A, 2), a[g][2 * t + 8], a[g][2 * t + 9]);
            put<KIND>(from(A, 3), a[g + 8][2 * t + 8], a[g + 8][2 * t + 9]);
            put<KIND>(from(B, 0), b[2 * t][g], b[2 * t + 1][g]);
            put<KIND>(from(B, 1), b[2 * t + 8][g], b[2 * t + 9][g]);
        }
        for (unsigned n = 0; n < 4; ++n) d[g + n / 2 * 8][2 * t + n % 2] = get<float>(w, C[n], lane);
    }
    simt::multiply_tile(a, b, d);
    for (unsigned lane = 0; lane < LANES; ++lane)
        for (unsigned n = 0; n < 4; ++n) set<float>(w, i.o[n], lane, d[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2]);
    ++simt::statistics.mma;
}

// Where an operand of a wgmma lies. Swizzles exchange address bits 4 to 6 with those above 7, so the start may lie within
// a pattern.
struct Descriptor {
    uint32_t start, leading, stride;
    unsigned swizzle;  // bytes of a row of the pattern: 16 without one, 32, 64, 128
    explicit Descriptor(uint64_t d)
        : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
        constexpr unsigned bytes[] = {16, 128, 64, 32};
        swizzle = bytes[d >> 62];
        base_offset = d >> 49 & 7;
    }
    uint64_t base_offset;

    uint32_t swizzled(uint32_t at) const {
        const uint32_t mask = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
        return at ^ (at >> 7 & mask) << 4;
    }
    // The element at a row (of M or N) and a column (of K: 32 bytes of them). Of 16 bits, where k is not contiguous.
    uint32_t at(unsigned row, unsigned k, bool k_is_contiguous, unsigned bytes) const {
        if (k_is_contiguous) {
            const unsigned along = k * bytes;
            if (swizzle == 16) return start + row / 8 * stride + along / 16 * leading + row % 8 * 16 + along % 16;
            return swizzled(start + row / 8 * stride + row % 8 * swizzle + along);
        }
        const unsigned wide = swizzle / 2;  // elements of a row of the pattern
        if (swizzle == 16) return start + row / 8 * stride + k / 8 * leading + k % 8 * 16 + row % 8 * 2;
        return swizzled(start + row / wide * leading + k / 8 * stride + k % 8 * swizzle + row % wide * 2);
    }
};

template <Kind KIND>
struct Operand {
    static constexpr unsigned BYTES = KIND == Kind::tf32 ? 4 : 2;
    Warp& w;
    const Instruction& i;
    Descriptor from;
    bool contiguous;
    std::vector<std::pair<uint32_t, std::vector<unsigned char>>>& read;

    // Elements of rows [first, first + count), 32 bytes each, into rows of 16; what was read is noted by 16 bytes, once each.
    void gather(unsigned first, unsigned count, float* to) {
        simt::Shared& shared = w.block->block->shared;
        std::vector<bool> seen((shared.bytes + 15) / 16);
        for (unsigned row = first; row < first + count; ++row)
            for (unsigned k = 0; k < 32 / BYTES; ++k) {
                const uint32_t at = from.at(row, k, contiguous, BYTES);
                if (size_t{at} + BYTES > shared.bytes) fault(w, i, "a wgmma reads shared byte " + std::to_string(at) + " of " + std::to_string(shared.bytes));
                if (!seen[at / 16]) {
                    seen[at / 16] = true;
                    take(at / 16 * 16);
                }
                uint32_t value = 0;
                std::memcpy(&value, reinterpret_cast<const void*>(shared.low + at), BYTES);
                float unused;
                put<KIND>(value, to[(row - first) * 16 + k], unused);
            }
    }
    void take(uint32_t at) {
        simt::Shared& shared = w.block->block->shared;
        for (unsigned cell = 0; cell < 4; ++cell)
            if (const Generic& found = w.block->generic[at / 4 + cell]; found.hidden_from >> w.index & 1)
                fault(w, i, "a wgmma reads shared byte " + std::to_string(at + 4 * cell) + ", stored by warp " +
                                std::to_string(found.writer) + " without a fence.proxy.async");
        As who(w.lanes[0]);
        simt::access(shared.low + at, 16, simt::READ, Path::l2, site_of(i));
        const auto* bytes = reinterpret_cast<const unsigned char*>(shared.low + at);
        read.push_back({at, {bytes, bytes + 16}});
    }
};

// A descriptor, which has to be the same in all lanes.
uint64_t alike(const Warp& w, const Instruction& i, int32_t reg) {
    for (unsigned lane = 1; lane < LANES; ++lane)
        if (get<uint64_t>(w, reg, lane) != get<uint64_t>(w, reg, 0)) fault(w, i, "lanes differ in a descriptor", lane);
    return get<uint64_t>(w, reg, 0);
}

// Each warp computes 16 of the 64 rows. Operands: N/2 accumulators, the fragments or the descriptor of a, the descriptor of
// b, the predicate that keeps the accumulators; numbers: signs of a and b, then which operand is not contiguous in k.
template <unsigned N, Kind KIND, bool FROM_REGISTERS>
void multiply_async(Warp& w, const Instruction& i) {
    constexpr unsigned ACC = N / 2;
    if (i.imm[0] != 1 || i.imm[1] != 1) fault(w, i, "a wgmma with a negated operand is not emulated");
    AsyncMatrix under_way{w.group, &i, {i.o, i.o + ACC}, {}};
    for (const AsyncMatrix& other : w.matrices)
        if (other.accumulators != under_way.accumulators)
            for (const int32_t reg : other.accumulators)
                for (const int32_t own : under_way.accumulators)
                    if (reg == own) fault(w, i, "accumulators overlap those of a wgmma of another shape under way");
    float a[16][16] = {};
    static float b[256][16];
    if constexpr (KIND == Kind::tf32) std::fill_n(b[0], sizeof b / sizeof(float), 0.0f);
    constexpr bool MAY_BE_TRANSPOSED = KIND != Kind::tf32;
    const unsigned row = w.index % 4 * 16;
    const int32_t* rest = i.o + ACC;
    if constexpr (FROM_REGISTERS) {
        for (unsigned lane = 0; lane < LANES; ++lane) {
            // A register has two neighbours of 16 bits or one number of 32; half of k lies in the last two.
            constexpr unsigned NEIGHBOURS = KIND == Kind::tf32 ? 1 : 2, HALF = 4 * NEIGHBOURS;
            const unsigned g = lane / 4, t = lane % 4 * NEIGHBOURS;
            const auto pair = [&](unsigned n) { return get<uint32_t>(w, rest[n], lane); };
            float unused;
            for (unsigned n = 0; n < 4; ++n) {
                float* to = &a[g + n % 2 * 8][t + n / 2 * HALF];
                put<KIND>(pair(n), to[0], NEIGHBOURS == 2 ? to[1] : unused);
            }
        }
        for (const AsyncMatrix& other : w.matrices)
            for (const int32_t reg : other.accumulators)
                if (std::find(rest, rest + 4, reg) != rest + 4)
                    fault(w, i, "a fragment is an accumulator of a wgmma that was not waited for");
        rest += 4;
    } else {
        const Descriptor from(alike(w, i, *rest++));
        if (from.base_offset) fault(w, i, "a descriptor with a base offset is not emulated");
        Operand<KIND>{w, i, from, !MAY_BE_TRANSPOSED || i.imm[2] == 0, under_way.read}.gather(row, 16, a[0]);
    }
    const Descriptor from(alike(w, i, *rest++));
    if (from.base_offset) fault(w, i, "a descriptor with a base offset is not emulated");
    const bool contiguous = !MAY_BE_TRANSPOSED || i.imm[FROM_REGISTERS ? 2 : 3] == 0;
    Operand<KIND>{w, i, from, contiguous, under_way.read}.gather(0, N, b[0]);
    const uint32_t keeps = w.p[static_cast<size_t>(*rest)];
    if (keeps != 0 && keeps != ALL) fault(w, i, "lanes differ in whether a wgmma keeps its accumulators");
    const bool keep = keeps != 0;
    float part[16][8], columns[16][8];
    for (unsigned n = 0; n < N; n += 8) {
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned j = 0; j < 8; ++j) columns[k][j] = b[n + j][k];
        const int32_t* d = i.o + n / 2;
        for (unsigned lane = 0; lane < LANES; ++lane)
            for (unsigned r = 0; r < 4; ++r)
                part[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = keep ? get<float>(w, d[r], lane) : 0.0f;
        simt::multiply_tile(a, columns, part);
        for (unsigned lane = 0; lane < LANES; ++lane)
            for (unsigned r = 0; r < 4; ++r) set<float>(w, d[r], lane, part[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
    }
    w.matrices.push_back(std::move(under_way));
    ++simt::statistics.mma;
}

void commit_matrices(Warp& w, const Instruction&) { ++w.group; }
void wait_matrices(Warp& w, const Instruction& i) {
    std::vector<AsyncMatrix> left;
    simt::Shared& shared = w.block->block->shared;
    for (AsyncMatrix& matrix : w.matrices) {
        if (matrix.group + static_cast<unsigned>(i.imm[0]) >= w.group) {
            left.push_back(std::move(matrix));
            continue;
        }
        // Read again, as late as it may be: a store since the issue is a race, or shows in the bytes.
        As who(w.lanes[0]);
        for (const auto& [at, bytes] : matrix.read) {
            simt::access(shared.low + at, 16, simt::READ, Path::l2, site_of(*matrix.issue));
            if (std::memcmp(reinterpret_cast<const void*>(shared.low + at), bytes.data(), 16))
                simt::fail("the operands of a wgmma changed while it was under way", site_of(*matrix.issue));
        }
    }
    w.matrices = std::move(left);
}
void nothing(Warp&, const Instruction&) {}
void fence_proxy(Warp& w, const Instruction&) {
    for (Generic& cell : w.block->generic)
        cell.hidden_from &= cell.writer == w.index ? 0 : ~(1u << w.index);
}

template <unsigned N>
void async_matrices(Table& t) {
    const std::string shape = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(N), name = shape + "k16.f32.", values(N / 2, 'r');
    t.push_back({name + "bf16.bf16 ss", {multiply_async<N, Kind::bf16, false>, values + "ddpiiiiW", true}});
    t.push_back({name + "bf16.bf16 rs", {multiply_async<N, Kind::bf16, true>, values + "rrrrdpiiiW", true}});
    t.push_back({name + "f16.f16 ss", {multiply_async<N, Kind::f16, false>, values + "ddpiiiiW", true}});
    t.push_back({name + "f16.f16 rs", {multiply_async<N, Kind::f16, true>, values + "rrrrdpiiiW", true}});
    t.push_back({shape + "k8.f32.tf32.tf32 ss", {multiply_async<N, Kind::tf32, false>, values + "ddpiiW", true}});
    t.push_back({shape + "k8.f32.tf32.tf32 rs", {multiply_async<N, Kind::tf32, true>, values + "rrrrdpiiW", true}});
}

}  // namespace

Table matrices() {
    Table t{
        {"shfl.sync.bfly.b32", {shuffle<true>, "rrrrr", true}},
        {"shfl.sync.idx.b32", {shuffle<false>, "rrrrr", true}},
        {"redux.sync.add.s32", {reduce<false>, "rrr", true}},
        {"redux.sync.min.s32", {reduce<true>, "rrr", true}},
        {"ldmatrix.sync.aligned.m8n8.x1.shared.b16", {load_matrices<1, false>, "ra", true}},
        {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", {load_matrices<2, false>, "rra", true}},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", {load_matrices<4, false>, "rrrra", true}},
        {"ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16", {load_matrices<1, true>, "ra", true}},
        {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", {load_matrices<2, true>, "rra", true}},
        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", {load_matrices<4, true>, "rrrra", true}},
        {"stmatrix.sync.aligned.m8n8.x1.shared.b16", {store_matrices<1, false>, "ar", true}},
        {"stmatrix.sync.aligned.m8n8.x2.shared.b16", {store_matrices<2, false>, "arr", true}},
        {"stmatrix.sync.aligned.m8n8.x4.shared.b16", {store_matrices<4, false>, "arrrr", true}},
        {"stmatrix.sync.aligned.m8n8.x1.trans.shared.b16", {store_matrices<1, true>, "ar", true}},
        {"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16", {store_matrices<2, true>, "arr", true}},
        {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", {store_matrices<4, true>, "arrrr", true}},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {multiply<Kind::bf16>, "rrrrrrrrrrrrrr", true}},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", {multiply<Kind::f16>, "rrrrrrrrrrrrrr", true}},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", {multiply<Kind::tf32>, "rrrrrrrrrrrrrr", true}},
        {"wgmma.fence.sync.aligned", {nothing, "", true}},
        {"wgmma.commit_group.sync.aligned", {commit_matrices, "", true}},
        {"wgmma.wait_group.sync.aligned", {wait_matrices, "i", true}},
        {"fence.proxy.async.shared::cta", {fence_proxy, "", true}},
    };
    async_matrices<8>(t);
    async_matrices<16>(t);
    async_matrices<32>(t);
    async_matrices<64>(t);
    async_matrices<128>(t);
    async_matrices<256>(t);
    return t;
}

}  // namespace ptx
