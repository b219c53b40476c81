// A machine for PTX: runs what Triton's compiler emits, a warp at a time, on the memory of the emulator.
//
// All lanes of a warp run an instruction at once; where a branch parts them, those at the lowest address go first. Warps and
// blocks take turns that a seed draws. Loads, stores and copies go through the emulator's checks (emulator/memory.h): bounds,
// alignment, unwritten shared memory, and races, which are found by what is ordered before what and not by the turn that
// happens to be drawn, between two lanes of one warp too.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/runtime.h"

namespace ptx {

constexpr unsigned LANES = simt::LANES;
constexpr unsigned ALL = 0xffffffffu;

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&);

// How an instruction is written down. Operands, one letter each: r register of 32 bits or fewer, d of 64, p predicate,
// a address in shared memory (r and an offset), A in global memory (d and an offset), i number, l label; W at the end: a wgmma,
// whose registers it looks after itself. A word behind a name tells forms apart that PTX has under one name: " whole" a copy
// without a number of source bytes, " ss" and " rs" a from shared memory and from registers, " pack" and " unpack" a move.
struct Opcode {
    Run run;
    std::string operands;
    bool together = false;  // all lanes of the warp have to be there
};
const Opcode* find_opcode(const std::string& name);

struct Instruction {
    Run run;
    const Opcode* opcode;
    const int32_t* o;    // registers
    const int64_t* imm;  // offsets, numbers, the address of a label
    int32_t guard;       // a predicate, or -1
    bool negated;
    uint32_t line;
};

struct Constant {
    char file;
    int32_t index;
    uint64_t value;
};

struct Program {
    std::string name;
    std::vector<Instruction> code;
    std::vector<std::string> places;  // of each instruction: line, source line and text, for messages
    std::vector<int32_t> operands;
    std::vector<int64_t> numbers;
    std::vector<Constant> constants;
    int32_t r = 0, d = 0, p = 0;  // sizes of the register files
};

// A wgmma under way: what it reads and writes is nobody's until it was waited for.
struct AsyncMatrix {
    unsigned group;
    const Instruction* issue;
    std::vector<int32_t> accumulators;
    std::vector<std::pair<uint32_t, std::vector<unsigned char>>> read;  // offsets in shared memory, and the bytes found there
};

struct Group;

struct Warp {
    Group* block = nullptr;
    unsigned index = 0;  // in the block
    simt::Thread* lanes[LANES] = {};
    uint32_t pc = 0, pcs[LANES] = {};
    unsigned alive = ALL;   // lanes that have not ended
    unsigned active = ALL;  // those of them at pc; the others wait at pcs
    unsigned mask = ALL;    // those of them that the guard of the instruction lets act
    bool apart = false;     // active is not alive
    bool at_barrier = false;
    bool waited = true;  // for the grid before, of a launch that may begin before that has ended
    uint64_t steps = 0;
    unsigned group = 0;  // of the next wgmma
    std::vector<AsyncMatrix> matrices;
    std::vector<uint32_t> r;
    std::vector<uint64_t> d;
    std::vector<uint32_t> p;
};

// Of four shared bytes: who stored them by an ordinary store, and which warps cannot see that by a wgmma yet. A proxy fence of
// the storing warp opens it to all, one of a reading warp, behind a barrier, to that warp.
struct Generic {
    unsigned writer = 0;
    uint32_t hidden_from = 0;
};

// A block of the grid.
struct Group {
    simt::Block* block = nullptr;
    std::vector<Warp> warps;
    std::vector<Generic> generic;  // of all shared memory
    unsigned ended = 0, waiting = 0;
};

extern const Program* program;

// An instruction as the emulator's `site`.
void* site_of(const Instruction& at);
[[noreturn]] void fault(const Warp& warp, const Instruction& at, const std::string& what, unsigned lane = 0);
void go_to(Warp& warp, uint32_t address);
void end_lanes(Warp& warp, const Instruction& at);
void arrive(Warp& warp, const Instruction& at);
void wait_for_grid(Warp& warp, const Instruction& at);
void counted(const uint32_t* at, uint32_t before, const Instruction& by);  // a launch puts its counters back
void stored(Warp& warp, uint32_t offset, size_t bytes, bool hidden = true);  // hidden: by an ordinary store

// Who acts: the checks ask the emulator's current thread.
class As {
public:
    explicit As(simt::Thread* thread) { simt::current = thread; }
    ~As() { simt::current = nullptr; }
};

template <class F>
inline void each_lane(unsigned mask, F&& f) {
    if (mask == ALL) {
        for (unsigned lane = 0; lane < LANES; ++lane) f(lane);
    } else {
        for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
    }
}

template <class T>
inline T get(const Warp& warp, int32_t reg, unsigned lane) {
    if constexpr (sizeof(T) == 8)
        return simt::bits<T>(warp.d[static_cast<size_t>(reg) * LANES + lane]);
    else if constexpr (sizeof(T) == 4)
        return simt::bits<T>(warp.r[static_cast<size_t>(reg) * LANES + lane]);
    else
        return static_cast<T>(warp.r[static_cast<size_t>(reg) * LANES + lane]);
}

template <class T>
inline void set(Warp& warp, int32_t reg, unsigned lane, T value) {
    if constexpr (sizeof(T) == 8)
        warp.d[static_cast<size_t>(reg) * LANES + lane] = simt::bits<uint64_t>(value);
    else if constexpr (sizeof(T) == 4)
        warp.r[static_cast<size_t>(reg) * LANES + lane] = simt::bits<uint32_t>(value);
    else
        warp.r[static_cast<size_t>(reg) * LANES + lane] = static_cast<std::make_unsigned_t<T>>(value);
}

using Table = std::vector<std::pair<std::string, Opcode>>;
Table arithmetic();
Table conversions();
Table memory();
Table matrices();

struct Grid {
    dim3 blocks;
    unsigned threads;
    size_t shared_bytes;
    bool dependent;  // programmatic dependent launch: memory may be touched behind griddepcontrol.wait alone
};
// Throws std::runtime_error with kernel, block, thread and line.
void run(const Program& what, const Grid& grid, const std::vector<Constant>& arguments);

}  // namespace ptx
