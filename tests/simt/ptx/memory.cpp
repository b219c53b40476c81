// Loads, stores, copies and atomics of PTX, each through the emulator's checks. A shared address is an offset.
#include <cstring>

#include "ptx/machine.h"

namespace ptx {
namespace {

using simt::Path;

uintptr_t shared_at(const Warp& w, const Instruction& i, unsigned lane, uint32_t offset, size_t bytes) {
    simt::Shared& shared = w.block->block->shared;
    if (size_t{offset} + bytes > shared.bytes)
        fault(w, i, "out-of-bounds shared access of " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
                        " of " + std::to_string(shared.bytes), lane);
    if (offset % bytes) fault(w, i, "misaligned shared access of " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset), lane);
    return shared.low + offset;
}

// A launch let in before the wait would let the next one in, and that one the next.
void let_next_begin(Warp& w, const Instruction& i) {
    if (!w.waited) fault(w, i, "the next grid may begin before griddepcontrol.wait");
}

void check_waited(const Warp& w, const Instruction& i) {
    if (!w.waited) fault(w, i, "memory is touched before griddepcontrol.wait, while the grid ahead may still be running");
}

// A cache operator, such as .cg, is a hint: it changes nothing in what a load may see.
// EARLY: a weight, which no kernel writes (``load_weight`` in dependent_launch.py).
template <class T, unsigned N, bool SHARED, bool EARLY = false>
void load(Warp& w, const Instruction& i) {
    constexpr size_t BYTES = sizeof(T) * N;
    if constexpr (!SHARED && !EARLY) check_waited(w, i);
    each_lane(w.mask, [&](unsigned lane) {
        uintptr_t at;
        if constexpr (SHARED)
            at = shared_at(w, i, lane, get<uint32_t>(w, i.o[N], lane) + static_cast<uint32_t>(i.imm[0]), BYTES);
        else
            at = get<uint64_t>(w, i.o[N], lane) + static_cast<uint64_t>(i.imm[0]);
        {
            As who(w.lanes[lane]);
            simt::access_aligned(at, BYTES, simt::READ, Path::l2, site_of(i));
        }
        T values[N];
        std::memcpy(values, reinterpret_cast<const void*>(at), BYTES);
        for (unsigned n = 0; n < N; ++n) set<T>(w, i.o[n], lane, values[n]);
    });
}

template <class T, unsigned N, bool SHARED>
void store(Warp& w, const Instruction& i) {
    constexpr size_t BYTES = sizeof(T) * N;
    if constexpr (!SHARED) check_waited(w, i);
    each_lane(w.mask, [&](unsigned lane) {
        uintptr_t at;
        if constexpr (SHARED) {
            const uint32_t offset = get<uint32_t>(w, i.o[0], lane) + static_cast<uint32_t>(i.imm[0]);
            at = shared_at(w, i, lane, offset, BYTES);
            stored(w, offset, BYTES);
        } else {
            at = get<uint64_t>(w, i.o[0], lane) + static_cast<uint64_t>(i.imm[0]);
        }
        T values[N];
        for (unsigned n = 0; n < N; ++n) values[n] = get<T>(w, i.o[n + 1], lane);
        {
            As who(w.lanes[lane]);
            simt::writes_again = SHARED && !std::memcmp(reinterpret_cast<void*>(at), values, BYTES);
            simt::access_aligned(at, BYTES, simt::WRITE, Path::l2, site_of(i));
            simt::writes_again = false;
        }
        std::memcpy(reinterpret_cast<void*>(at), values, BYTES);
    });
}

// Bytes beyond those of the source are zeros; without a number all of them are copied.
template <bool WHOLE, bool L2_ALONE>
void copy(Warp& w, const Instruction& i) {
    const auto bytes = static_cast<unsigned>(i.imm[2]);
    check_waited(w, i);
    if (bytes != 16 && (L2_ALONE || (bytes != 4 && bytes != 8)))
        fault(w, i, "cp.async of " + std::to_string(bytes) + " bytes; accepted are " + (L2_ALONE ? "16" : "4, 8 and 16"));
    each_lane(w.mask, [&](unsigned lane) {
        const uint32_t to = get<uint32_t>(w, i.o[0], lane) + static_cast<uint32_t>(i.imm[0]);
        const uint64_t from = get<uint64_t>(w, i.o[1], lane) + static_cast<uint64_t>(i.imm[1]);
        const uint32_t wanted = WHOLE ? bytes : get<uint32_t>(w, i.o[2], lane);
        if (wanted > bytes) fault(w, i, "cp.async of more bytes than it writes", lane);
        auto* shared = reinterpret_cast<void*>(shared_at(w, i, lane, to, bytes));
        stored(w, to, bytes, false);
        As who(w.lanes[lane]);
        simt::begin_copy(shared, reinterpret_cast<const void*>(from), bytes, wanted, site_of(i));
    });
}
void copy_commit(Warp& w, const Instruction&) {
    each_lane(w.mask, [&](unsigned lane) {
        As who(w.lanes[lane]);
        simt::copy_async_commit();
    });
}
void copy_wait(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        As who(w.lanes[lane]);
        simt::end_copies(static_cast<int>(i.imm[0]));
    });
}

template <bool ORDERED>
void add(Warp& w, const Instruction& i) {
    check_waited(w, i);
    each_lane(w.mask, [&](unsigned lane) {
        const uint64_t at = get<uint64_t>(w, i.o[1], lane) + static_cast<uint64_t>(i.imm[0]);
        As who(w.lanes[lane]);
        const uint32_t before =
            simt::add_at_once(reinterpret_cast<uint32_t*>(at), get<uint32_t>(w, i.o[2], lane), ORDERED, site_of(i));
        counted(reinterpret_cast<uint32_t*>(at), before, i);
        set<uint32_t>(w, i.o[0], lane, before);
    });
}

// Nothing is read; the address has to be one that may be.
void prefetch(Warp& w, const Instruction& i) {
    each_lane(w.mask, [&](unsigned lane) {
        if (!simt::allowed(get<uint64_t>(w, i.o[0], lane) + static_cast<uint64_t>(i.imm[0]), 1))
            fault(w, i, "out-of-bounds prefetch", lane);
    });
}

template <class T, unsigned N>
void widths(Table& t, const std::string& vector, const std::string& type) {
    const char file = sizeof(T) == 8 ? 'd' : 'r';
    const std::string values(N, file);
    t.push_back({"ld.global." + vector + type, {load<T, N, false>, values + "A"}});
    t.push_back({"ld.global.ca." + vector + type, {load<T, N, false, true>, values + "A"}});
    t.push_back({"ld.global.cg." + vector + type, {load<T, N, false>, values + "A"}});
    t.push_back({"st.global." + vector + type, {store<T, N, false>, "A" + values}});
    t.push_back({"ld.shared." + vector + type, {load<T, N, true>, values + "a"}});
    t.push_back({"st.shared." + vector + type, {store<T, N, true>, "a" + values}});
}

}  // namespace

Table memory() {
    Table t;
    widths<uint8_t, 1>(t, "", "b8");
    widths<uint16_t, 1>(t, "", "b16");
    widths<uint32_t, 1>(t, "", "b32");
    widths<uint64_t, 1>(t, "", "b64");
    widths<uint8_t, 2>(t, "v2.", "b8");
    widths<uint8_t, 4>(t, "v4.", "b8");
    widths<uint16_t, 2>(t, "v2.", "b16");
    widths<uint16_t, 4>(t, "v4.", "b16");
    widths<uint32_t, 2>(t, "v2.", "b32");
    widths<uint32_t, 4>(t, "v4.", "b32");
    widths<uint64_t, 2>(t, "v2.", "b64");
    t.push_back({"cp.async.ca.shared.global", {copy<false, false>, "aAir"}});
    t.push_back({"cp.async.ca.shared.global whole", {copy<true, false>, "aAi"}});
    t.push_back({"cp.async.cg.shared.global", {copy<false, true>, "aAir"}});
    t.push_back({"cp.async.cg.shared.global whole", {copy<true, true>, "aAi"}});
    t.push_back({"prefetch.global.L2", {prefetch, "A"}});
    t.push_back({"griddepcontrol.wait", {wait_for_grid, ""}});
    t.push_back({"griddepcontrol.launch_dependents", {let_next_begin, ""}});
    t.push_back({"cp.async.commit_group", {copy_commit, ""}});
    t.push_back({"cp.async.wait_group", {copy_wait, "i"}});
    t.push_back({"atom.global.gpu.acq_rel.add.u32", {add<true>, "rAr"}});
    t.push_back({"atom.global.gpu.relaxed.add.u32", {add<false>, "rAr"}});
    t.push_back({"atom.global.cta.acq_rel.add.u32", {add<false>, "rAr"}});  // orders nothing between blocks
    return t;
}

}  // namespace ptx
