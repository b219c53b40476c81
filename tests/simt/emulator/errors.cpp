// What an error says: kernel, block, thread, line; and who waits where when nobody can go on.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <unordered_map>

#include "emulator/ranges.h"
#include "emulator/runtime.h"

namespace simt {
namespace {

std::string triple(const uint3& at) {
    return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

// "0-31,64" of a sorted list.
std::string spans(const std::vector<unsigned>& numbers) {
    std::string text;
    for (size_t i = 0; i < numbers.size();) {
        size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
        text += (text.empty() ? "" : ",") + std::to_string(numbers[i]);
        if (last > i) text += "-" + std::to_string(numbers[last]);
        i = last + 1;
    }
    return text;
}

std::string look_up_line(void* site) {
    Dl_info module;
    if (!site || !dladdr(site, &module)) return "";
    // One byte back: what is found is where the call returns to.
    const auto offset = reinterpret_cast<uintptr_t>(site) - reinterpret_cast<uintptr_t>(module.dli_fbase) - 1;
    char command[4096], line[1024];
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, offset);
    FILE* pipe = popen(command, "r");
    if (!pipe) return "";
    // The line itself, then the lines it was inlined into: the first that is a kernel's.
    std::string found;
    while (std::fgets(line, sizeof line, pipe)) {
        const std::string text(line);
        if (text[0] == '?' || (!found.empty() && found.find("/emulator/cuda.h:") == std::string::npos &&
                               found.find("/emulator/ptx.h:") == std::string::npos))
            continue;
        found = text.substr(0, text.find_first_of(" \n"));
    }
    pclose(pipe);
    return found.empty() ? "" : " at " + found.substr(found.rfind('/') + 1);
}

std::string where(const Thread& thread) {
    if (thread.exited) return "ended";
    switch (thread.waits) {
        case Waits::block_barrier:
            return "at __syncthreads" + source_line(thread.site);
        case Waits::named_barrier:
            return "at barrier " + std::to_string(thread.waits_for) + " of " +
                   std::to_string(thread.block->barriers[thread.waits_for].expected) + " threads" +
                   source_line(thread.site);
        case Waits::collective: {
            const char* names[] = {"a shuffle", "a vote", "__syncwarp", "ldmatrix", "ldmatrix.trans", "mma", "mma"};
            return std::string("at ") + names[thread.waits_for] + source_line(thread.site);
        }
        case Waits::cluster_barrier:
            return "at the cluster's barrier" + source_line(thread.site);
        case Waits::copies:
            return "for bulk copies" + source_line(thread.site);
        case Waits::counter:
            return "for a counter that stands at " + std::to_string(*thread.polled) + source_line(thread.site);
        default:
            return "ready";
    }
}

}  // namespace

std::string name_of(const Thread& thread) {
    return "block " + triple(thread.block->position) + " thread " + triple(thread.position);
}

std::string name_of(uint32_t id) {
    const dim3 &grid = launch->shape.blocks, &size = launch->shape.threads;
    const unsigned block = block_of(id), thread = index_of(id);
    return "block " + triple({block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y}) + " thread " +
           triple({thread % size.x, thread / size.x % size.y, thread / size.x / size.y});
}

std::string source_line(void* site) {
    if (launch && launch->place_of)
        return launch->place_of(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(site) - image().base));
    static std::unordered_map<void*, std::string> known;
    const auto found = known.find(site);
    return found != known.end() ? found->second : known[site] = look_up_line(site);
}

void fail(const std::string& what, void* site, const Thread* thread) {
    if (!launch || (!current && !thread)) throw std::runtime_error(what);
    launch->error = launch->name + ", " + name_of(thread ? *thread : *current) + source_line(site) + ": " + what;
    Thread* self = current;
    current = nullptr;
    if (launch->place_of) throw std::runtime_error(launch->error);
    // Never to return: the launch is over, and its stacks are used again.
    switch_fiber(self->fiber, launch->host);
    __builtin_unreachable();
}

std::string deadlock_report() {
    constexpr size_t BLOCKS_SHOWN = 4;
    const Thread* first = nullptr;
    std::string text;
    size_t shown = 0;
    for (const auto& block : launch->blocks) {
        std::map<std::tuple<bool, Waits, unsigned, void*, const void*>, std::vector<unsigned>> groups;
        for (const Thread& thread : block->threads) {
            if (!first && !thread.exited) first = &thread;
            const bool ended = thread.exited;
            groups[{ended, ended ? Waits::nothing : thread.waits, ended ? 0 : thread.waits_for,
                    ended ? nullptr : thread.site, ended ? nullptr : thread.polled}]
                .push_back(thread.index);
        }
        if (++shown > BLOCKS_SHOWN) continue;
        text += "; block " + triple(block->position) + ":";
        const char* separator = " ";
        for (const auto& [key, threads] : groups) {
            const std::string place = where(block->threads[threads[0]]);
            const bool ended = place == "ended";
            text += separator + ("threads " + spans(threads)) + (ended ? " have ended" : " wait " + place);
            separator = ", ";
        }
    }
    if (shown > BLOCKS_SHOWN) text += "; and " + std::to_string(shown - BLOCKS_SHOWN) + " blocks more";
    return launch->name + ", " + (first ? name_of(*first) : "") + ": deadlock, nobody can go on" + text;
}

}  // namespace simt
