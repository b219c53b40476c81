#include "ptx/machine.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "emulator/ranges.h"

namespace ptx {

const Program* program = nullptr;

namespace {

constexpr uint64_t MOST_STEPS = 100'000'000;  // of one warp

void reconverge(Warp& warp) {
    for (unsigned left = warp.active; left; left &= left - 1) warp.pcs[__builtin_ctz(left)] = warp.pc;
    if (!warp.alive) return;
    uint32_t lowest = UINT32_MAX;
    for (unsigned left = warp.alive; left; left &= left - 1) lowest = std::min(lowest, warp.pcs[__builtin_ctz(left)]);
    warp.active = 0;
    for (unsigned left = warp.alive; left; left &= left - 1)
        if (warp.pcs[__builtin_ctz(left)] == lowest) warp.active |= left & -left;
    warp.pc = lowest;
    warp.apart = warp.active != warp.alive;
}

void check_pending(const Warp& warp, const Instruction& at) {
    if (at.opcode->operands.find("W") != std::string::npos) return;  // a wgmma, which looks itself
    size_t next = 0;
    for (const char kind : at.opcode->operands) {
        if (kind != 'r' && kind != 'd' && kind != 'p' && kind != 'a' && kind != 'A') continue;
        const int32_t reg = at.o[next++];
        if (kind != 'r' && kind != 'a') continue;
        for (const AsyncMatrix& matrix : warp.matrices) {
            const auto is = [&](const std::vector<int32_t>& list) {
                return std::find(list.begin(), list.end(), reg) != list.end();
            };
            if (is(matrix.accumulators))
                fault(warp, at, "an accumulator of the wgmma at line " + std::to_string(matrix.issue->line) +
                                    ", which was not waited for");
        }
    }
}

void take_turn(Warp& warp, uint64_t steps) {
    simt::unbroken_accesses = 0;
    while (steps-- && warp.alive && !warp.at_barrier) {
        const Instruction& at = program->code[warp.pc++];
        warp.mask = warp.active;
        if (at.guard >= 0) {
            const uint32_t wanted = warp.p[static_cast<size_t>(at.guard)];
            warp.mask &= at.negated ? ~wanted : wanted;
        }
        if (warp.mask && !warp.matrices.empty()) check_pending(warp, at);
        if (++warp.steps > MOST_STEPS) fault(warp, at, "a hundred million instructions, and no end");
        if (at.opcode->together && warp.mask && warp.mask != ALL)
            fault(warp, at, std::to_string(__builtin_popcount(warp.mask)) + " of 32 lanes come here without the others");
        if (warp.mask) at.run(warp, at);
        if (warp.apart) reconverge(warp);
    }
}

std::unique_ptr<Group> start(unsigned number, const Grid& grid, const std::vector<Constant>& arguments) {
    simt::Launch& run = *simt::launch;
    auto block = std::make_unique<simt::Block>();
    block->number = number;
    block->position = {number % grid.blocks.x, number / grid.blocks.x % grid.blocks.y,
                       number / grid.blocks.x / grid.blocks.y};
    block->shared.prepare(grid.shared_bytes);
    block->threads = std::vector<simt::Thread>(grid.threads);
    auto group = std::make_unique<Group>();
    group->block = block.get();
    group->warps = std::vector<Warp>(grid.threads / LANES);
    group->generic.assign((grid.shared_bytes + 3) / 4, Generic{});
    const simt::Ref<simt::Clock> nothing(new simt::Clock(grid.threads));
    for (unsigned i = 0; i < grid.threads; ++i) {
        simt::Thread& thread = block->threads[i];
        thread.index = i;
        thread.lane = i % LANES;
        thread.block = block.get();
        thread.position = {i, 0, 0};
        thread.id = simt::thread_id(number, i);
        thread.local = nothing;
        group->warps[i / LANES].lanes[i % LANES] = &thread;
    }
    unsigned index = 0;
    for (Warp& warp : group->warps) {
        warp.block = group.get();
        warp.index = index++;
        warp.waited = !grid.dependent;
        warp.r.assign(static_cast<size_t>(program->r) * LANES, 0);
        warp.d.assign(static_cast<size_t>(program->d) * LANES, 0);
        warp.p.assign(static_cast<size_t>(program->p), 0);
        const auto fill = [&](const Constant& constant) {
            const auto from = static_cast<size_t>(constant.index) * LANES;
            if (constant.file == 'p') warp.p[static_cast<size_t>(constant.index)] = constant.value ? ALL : 0;
            for (unsigned lane = 0; lane < LANES && constant.file != 'p'; ++lane)
                if (constant.file == 'r')
                    warp.r[from + lane] = static_cast<uint32_t>(constant.value);
                else
                    warp.d[from + lane] = constant.value;
        };
        for (const Constant& constant : program->constants) fill(constant);
        for (const Constant& argument : arguments) fill(argument);
        // The first registers are tid.x, ctaid.x to .z and nctaid.x to .z.
        const unsigned own[] = {0, block->position.x, block->position.y, block->position.z,
                                grid.blocks.x, grid.blocks.y, grid.blocks.z};
        for (unsigned lane = 0; lane < LANES; ++lane) {
            warp.r[lane] = warp.lanes[lane]->index;
            for (unsigned i = 1; i < 7; ++i) warp.r[i * LANES + lane] = own[i];
        }
    }
    ++simt::statistics.blocks;
    run.blocks.push_back(std::move(block));
    return group;
}

void play(const Grid& grid, const std::vector<Constant>& arguments) {
    const unsigned count = grid.blocks.x * grid.blocks.y * grid.blocks.z;
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[simt::draw(i)]);
    const size_t at_once = 1 + simt::draw(4);
    std::vector<std::unique_ptr<Group>> groups;
    unsigned started = 0;
    while (started < count || !groups.empty()) {
        while (started < count && groups.size() < at_once) groups.push_back(start(order[started++], grid, arguments));
        const size_t which = simt::draw(groups.size());
        Group& group = *groups[which];
        std::vector<Warp*> ready;
        for (Warp& warp : group.warps)
            if (warp.alive && !warp.at_barrier) ready.push_back(&warp);
        if (!ready.empty()) {
            Warp& warp = *ready[simt::draw(ready.size())];
            take_turn(warp, uint64_t{1} << simt::draw(12));
        }
        if (group.ended < group.warps.size()) continue;
        auto& blocks = simt::launch->blocks;
        blocks.erase(std::find_if(blocks.begin(), blocks.end(),
                                  [&](const auto& block) { return block.get() == group.block; }));
        groups.erase(groups.begin() + static_cast<ptrdiff_t>(which));
    }
}

std::string place_of(uint32_t line) {
    return line && line <= program->places.size() ? " at " + program->places[line - 1] : "";
}

struct Counter {
    uint32_t before;
    const Instruction* last;
};
std::unordered_map<const uint32_t*, Counter> counters;

void check_counters() {
    for (const auto& [at, counter] : counters)
        if (*at != counter.before)
            throw std::runtime_error(program->name + simt::source_line(site_of(*counter.last)) + ": a counter that was " +
                                     std::to_string(counter.before) + " before the launch is " + std::to_string(*at) +
                                     " behind it, and the next launch counts from there");
}

}  // namespace

void counted(const uint32_t* at, uint32_t before, const Instruction& by) {
    counters.emplace(at, Counter{before, &by}).first->second.last = &by;
}

void* site_of(const Instruction& at) {
    const auto index = static_cast<uintptr_t>(&at - program->code.data());
    return reinterpret_cast<void*>(simt::image().base + index + 1);
}

void fault(const Warp& warp, const Instruction& at, const std::string& what, unsigned lane) {
    simt::fail(what, site_of(at), warp.lanes[lane]);
}

void go_to(Warp& warp, uint32_t address) {
    if (warp.mask == warp.active) {
        warp.pc = address;
        return;
    }
    // Those who stay have the address of the next instruction, those who go another.
    for (unsigned left = warp.active & ~warp.mask; left; left &= left - 1) warp.pcs[__builtin_ctz(left)] = warp.pc;
    for (unsigned left = warp.mask; left; left &= left - 1) warp.pcs[__builtin_ctz(left)] = address;
    warp.active = warp.mask;
    warp.pc = address;
    warp.apart = true;
}

void end_lanes(Warp& warp, const Instruction& at) {
    for (unsigned left = warp.mask; left; left &= left - 1) {
        const unsigned lane = static_cast<unsigned>(__builtin_ctz(left));
        if (!warp.lanes[lane]->copies.empty())
            fault(warp, at, "the thread ends with a cp.async that was never waited for", lane);
    }
    if (!warp.matrices.empty()) fault(warp, at, "the warp ends with a wgmma that was never waited for");
    if (!warp.waited) fault(warp, at, "the warp ends without griddepcontrol.wait: the grid behind it may begin before the one ahead has ended");
    warp.alive &= ~warp.mask;
    if (warp.active != warp.mask) {
        warp.active &= ~warp.mask;
        return;
    }
    warp.active = 0;
    if (warp.alive) return;  // others are elsewhere
    ++warp.block->ended;
    if (warp.block->waiting) fault(warp, at, "the warp ends where others wait at bar.sync");
}

void arrive(Warp& warp, const Instruction& at) {
    Group& group = *warp.block;
    if (group.ended) fault(warp, at, "bar.sync, and a warp of the block has ended");
    warp.at_barrier = true;
    if (++group.waiting < group.warps.size()) return;
    group.waiting = 0;
    std::vector<simt::Thread*> participants;
    for (simt::Thread& thread : group.block->threads) participants.push_back(&thread);
    simt::meet(participants);
    for (Warp& other : group.warps) other.at_barrier = false;
    ++simt::statistics.block_barriers;
}

void wait_for_grid(Warp& warp, const Instruction& at) {
    if (warp.mask != warp.alive) fault(warp, at, "a part of the warp waits");
    warp.waited = true;
}

void stored(Warp& warp, uint32_t offset, size_t bytes, bool hidden) {
    for (size_t cell = offset / 4; cell * 4 < offset + bytes; ++cell)
        warp.block->generic[cell] = {warp.index, hidden ? ALL : 0};
}

const Opcode* find_opcode(const std::string& name) {
    static const std::unordered_map<std::string, Opcode> known = [] {
        std::unordered_map<std::string, Opcode> all;
        for (const Table& table : {arithmetic(), conversions(), memory(), matrices()})
            for (const auto& [key, opcode] : table) all.emplace(key, opcode);
        return all;
    }();
    const auto found = known.find(name);
    return found == known.end() ? nullptr : &found->second;
}

void run(const Program& what, const Grid& grid, const std::vector<Constant>& arguments) {
    if (grid.shared_bytes > simt::settings.shared_bytes_per_block)
        throw std::runtime_error(what.name + ": " + std::to_string(grid.shared_bytes) + " bytes of shared memory; a block has " +
                                 std::to_string(simt::settings.shared_bytes_per_block));
    const uint64_t blocks = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
    if (!blocks || blocks > simt::MAX_BLOCKS) throw std::runtime_error(what.name + ": a grid of " + std::to_string(blocks));
    simt::Launch launch{};
    launch.name = what.name;
    launch.shape = {grid.blocks, dim3(grid.threads), grid.shared_bytes, false};
    launch.random = simt::settings.seed * 0x2545f4914f6cdd1du + 1;
    launch.place_of = place_of;
    program = &what;
    simt::launch = &launch;
    simt::statistics = {};
    const auto end = [] {
        simt::end_of_launch();
        simt::launch = nullptr;
        simt::current = nullptr;
        program = nullptr;
        counters.clear();
    };
    try {
        play(grid, arguments);
        check_counters();
    } catch (...) {
        end();
        throw;
    }
    end();
}

}  // namespace ptx
