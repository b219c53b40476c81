#include "emulator/ranges.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace simt {
namespace {

// Ranges that lie in one word share its cell, hence one shadow.
struct Shadow {
    uintptr_t low, high;  // of whole cells
    std::unique_ptr<Cell[], decltype(&std::free)> cells{nullptr, &std::free};
};

std::vector<Range> asked;  // as the calls of allow() came
std::vector<Range> settled;
std::vector<Range> ranges;
std::vector<Shadow> shadows;
bool sorted = true, stale = false;
constexpr size_t RECENT = 64;
unsigned recent[RECENT];  // by page: the range found there last, which is most often the next one too

void sort_ranges() {
    sorted = true;
    ranges.clear();
    shadows.clear();
    std::sort(asked.begin(), asked.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
    for (const Range& range : asked) {
        if (ranges.empty() || range.low > ranges.back().high)
            ranges.push_back(range);
        else
            ranges.back().high = std::max(ranges.back().high, range.high);
    }
    for (Range& range : ranges) {
        const uintptr_t low = range.low & ~uintptr_t{3}, high = (range.high + 3) & ~uintptr_t{3};
        if (shadows.empty() || low >= shadows.back().high) shadows.push_back({low, high});
        shadows.back().high = high;
        range.shadow = static_cast<unsigned>(shadows.size() - 1);
    }
    std::fill(recent, recent + RECENT, 0u);
}

int find_image(dl_phdr_info* info, size_t, void* out) {
    const auto here = reinterpret_cast<uintptr_t>(&ranges);
    uintptr_t low = UINTPTR_MAX, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        if (segment.p_type != PT_LOAD) continue;
        low = std::min<uintptr_t>(low, info->dlpi_addr + segment.p_vaddr);
        high = std::max<uintptr_t>(high, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
    }
    if (here < low || here >= high) return 0;
    *static_cast<Image*>(out) = {low, high, info->dlpi_addr};
    return 1;
}

}  // namespace

const Image& image() {
    static const Image found = [] {
        Image image;
        dl_iterate_phdr(find_image, &image);
        return image;
    }();
    return found;
}

const std::vector<Range>& all_ranges() {
    if (!sorted) sort_ranges();
    return ranges;
}

const Range* range_of(uintptr_t at) {
    if (all_ranges().empty()) return nullptr;
    unsigned& guess = recent[at >> 12 & (RECENT - 1)];
    if (at - ranges[guess].low < ranges[guess].high - ranges[guess].low) return &ranges[guess];
    const auto above = std::upper_bound(ranges.begin(), ranges.end(), at,
                                        [](uintptr_t value, const Range& range) { return value < range.low; });
    if (above == ranges.begin() || at >= above[-1].high) return nullptr;
    guess = static_cast<unsigned>(above - ranges.begin() - 1);
    return &ranges[guess];
}

Cell* global_cell(const Range& range, uintptr_t at) {
    Shadow& shadow = shadows[range.shadow];
    const size_t cells = (shadow.high - shadow.low) >> 2;
    if (!shadow.cells) shadow.cells.reset(static_cast<Cell*>(std::calloc(cells, sizeof(Cell))));
    return &shadow.cells[(at - shadow.low) >> 2];
}

void drop_shadows() {
    for (Shadow& shadow : shadows) shadow.cells.reset();
    stale = true;
}

void allow(uintptr_t low, size_t bytes, bool is_settled) {
    if (stale) forget_allowed();
    if (is_settled) settled.push_back({low, low + bytes, 0});
    asked.push_back({low, low + bytes, 0});
    sorted = false;
}

void forget_allowed() {
    asked.clear();
    settled.clear();
    stale = false;
    sort_ranges();
}

bool is_settled(uintptr_t at, size_t bytes) {
    return std::any_of(settled.begin(), settled.end(),
                       [&](const Range& range) { return range.low <= at && at + bytes <= range.high; });
}

bool allowed(uintptr_t low, size_t bytes) {
    const Range* range = range_of(low);
    return range && low + bytes <= range->high;
}

}  // namespace simt
