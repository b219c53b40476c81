// Warp instructions: lanes wait until all that the mask names are there, the last one does the work for all. Only
// __syncwarp orders memory; shuffles, votes, ldmatrix and mma do not, as in the PTX manual.
#include <algorithm>
#include <cstring>

#include "emulator/mma.h"
#include "emulator/runtime.h"

namespace simt {
namespace {

constexpr unsigned ALL = 0xffffffffu;

std::string hex(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

void shuffle_lanes(const Warp& warp, const Meeting& meeting) {
    for (unsigned lane = 0; lane < LANES; ++lane) {
        if (!(meeting.arrived >> lane & 1)) continue;
        const auto& own = meeting.lanes[lane];
        const int width = own.width, position = static_cast<int>(lane) & (width - 1);
        const int start = static_cast<int>(lane) - position, by = static_cast<int>(own.operand);
        int source = static_cast<int>(lane);
        switch (own.how) {
            case Shuffle::index: source = start + (by & (width - 1)); break;
            case Shuffle::up: if (position - by >= 0) source -= by; break;
            case Shuffle::down: if (position + by < width) source += by; break;
            // A lane of a later segment is out of reach; of an earlier one it is not.
            case Shuffle::exclusive_or: if ((source ^ by) < start + width) source ^= by; break;
        }
        if (source < 0 || source >= static_cast<int>(LANES) || !(meeting.arrived >> source & 1))
            fail("shuffle reads lane " + std::to_string(source) + ", which takes no part: mask " + hex(meeting.mask) +
                     ", there are " + hex(meeting.arrived),
                 warp.lanes[lane]->site, warp.lanes[lane]);
        warp.lanes[lane]->result = meeting.lanes[source].value;
    }
}

void load_lanes(const Warp& warp, const Meeting& meeting, bool transposed) {
    uint16_t rows[LANES][8];
    Thread* const self = current;
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const auto at = reinterpret_cast<uintptr_t>(meeting.lanes[lane].in);
        current = warp.lanes[lane];  // the lane that names the row answers for it
        if (!current->block->shared.holds(at)) fail("out-of-bounds ldmatrix: not in shared memory", current->site);
        access_aligned(at, 16, READ, Path::l2, current->site);
        std::memcpy(rows[lane], meeting.lanes[lane].in, 16);
    }
    current = self;
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const unsigned group = lane / 4, pair = lane % 4 * 2;
        auto* out = static_cast<uint32_t*>(meeting.lanes[lane].out);
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            const auto* tile = &rows[8 * matrix];
            const uint16_t low = transposed ? tile[pair][group] : tile[group][pair];
            const uint16_t high = transposed ? tile[pair + 1][group] : tile[group][pair + 1];
            out[matrix] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

void mma_lanes(const Meeting& meeting, bool is_bf16) {
    float a[16][16], b[16][8], d[16][8];
    const auto put = [&](uint32_t pair, float& low, float& high) {
        low = is_bf16 ? bits<float>(pair << 16) : widen_fp16(static_cast<uint16_t>(pair));
        high = is_bf16 ? bits<float>(pair & 0xffff0000u) : widen_fp16(static_cast<uint16_t>(pair >> 16));
    };
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const auto& own = *static_cast<const MmaLane*>(meeting.lanes[lane].in);
        const unsigned g = lane / 4, t = lane % 4 * 2;
        put(own.a[0], a[g][t], a[g][t + 1]);
        put(own.a[1], a[g + 8][t], a[g + 8][t + 1]);
        put(own.a[2], a[g][t + 8], a[g][t + 9]);
        put(own.a[3], a[g + 8][t + 8], a[g + 8][t + 9]);
        put(own.b[0], b[t][g], b[t + 1][g]);
        put(own.b[1], b[t + 8][g], b[t + 9][g]);
        std::memcpy(&d[g][t], own.d, 8);
        std::memcpy(&d[g + 8][t], own.d + 2, 8);
    }
    multiply_tile(a, b, d);
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const auto& own = *static_cast<const MmaLane*>(meeting.lanes[lane].in);
        std::memcpy(own.d, &d[lane / 4][lane % 4 * 2], 8);
        std::memcpy(own.d + 2, &d[lane / 4 + 8][lane % 4 * 2], 8);
    }
}

// Who performs it is a lane that took part, or one whose end completed the meeting of the others.
void perform(Warp& warp, const Meeting& meeting) {
    ++statistics.collectives;
    switch (meeting.what) {
        case Collective::shuffle:
            shuffle_lanes(warp, meeting);
            break;
        case Collective::ballot: {
            unsigned votes = 0;
            for (unsigned lane = 0; lane < LANES; ++lane)
                if (meeting.arrived >> lane & 1) votes |= meeting.lanes[lane].value << lane;
            for (unsigned lane = 0; lane < LANES; ++lane)
                if (meeting.arrived >> lane & 1) warp.lanes[lane]->result = votes;
            break;
        }
        case Collective::warp_barrier: {
            std::vector<Thread*> participants;
            for (unsigned lanes = meeting.arrived; lanes; lanes &= lanes - 1)
                participants.push_back(warp.lanes[__builtin_ctz(lanes)]);
            ++statistics.warp_barriers;
            meet(participants);
            break;
        }
        case Collective::ldmatrix:
        case Collective::ldmatrix_trans:
            ++statistics.ldmatrix;
            load_lanes(warp, meeting, meeting.what == Collective::ldmatrix_trans);
            break;
        case Collective::mma_bf16:
        case Collective::mma_fp16:
            ++statistics.mma;
            mma_lanes(meeting, meeting.what == Collective::mma_bf16);
            break;
    }
}

void release(Warp& warp, size_t index) {
    const Meeting meeting = warp.meetings[index];
    warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(index));
    perform(warp, meeting);
    for (unsigned lanes = meeting.arrived; lanes; lanes &= lanes - 1) {
        Thread* thread = warp.lanes[__builtin_ctz(lanes)];
        if (thread != current) make_ready(*thread);
    }
}

uint32_t join_meeting(Collective what, unsigned mask, const Meeting::Lane& mine, void* site) {
    Thread& thread = *current;
    Warp& warp = *thread.warp;
    const unsigned bit = 1u << thread.lane;
    if (!(mask & bit)) fail("lane " + std::to_string(thread.lane) + " is missing in its mask " + hex(mask), site);
    thread.site = site;
    size_t index = warp.meetings.size();
    for (size_t i = 0; i < warp.meetings.size(); ++i) {
        const Meeting& other = warp.meetings[i];
        if (other.what == what && other.mask == mask) {
            index = i;
        } else if ((other.mask & bit) && (other.arrived & mask)) {
            fail("lanes of one warp meet in different instructions: this one with mask " + hex(mask) + ", while lanes " +
                     hex(other.arrived) + " wait with mask " + hex(other.mask) +
                     source_line(warp.lanes[__builtin_ctz(other.arrived)]->site),
                 site);
        }
    }
    if (index == warp.meetings.size()) warp.meetings.push_back({what, mask, 0, {}});
    Meeting& meeting = warp.meetings[index];
    meeting.lanes[thread.lane] = mine;
    meeting.arrived |= bit;
    if (meeting.arrived == (mask & warp.present & ~warp.exited)) {
        release(warp, index);
        pause();
    } else {
        wait(Waits::collective, static_cast<unsigned>(what), site);
    }
    return thread.result;
}

// Instructions in which the whole warp takes part.
void join_whole(Collective what, const Meeting::Lane& mine, const char* name, void* site) {
    const Warp& warp = *current->warp;
    if (warp.present != ALL || warp.exited)
        fail(std::string(name) + " takes all 32 lanes of a warp; there are " + hex(warp.present & ~warp.exited), site);
    join_meeting(what, ALL, mine, site);
}

}  // namespace

void arrive_at_exit(Thread& thread) {
    Warp& warp = *thread.warp;
    for (size_t i = warp.meetings.size(); i-- > 0;) {
        const Meeting& meeting = warp.meetings[i];
        if (!(meeting.mask >> thread.lane & 1)) continue;
        if (meeting.what >= Collective::ldmatrix)
            fail("the thread ends while its warp waits for it in ldmatrix or mma", warp.lanes[__builtin_ctz(meeting.arrived)]->site);
        if (meeting.arrived == (meeting.mask & warp.present & ~warp.exited)) release(warp, i);
    }
}

uint32_t shuffle(unsigned mask, uint32_t value, unsigned operand, int width, Shuffle how) {
    void* site = SMOLVLA_SIMT_SITE;
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail("shuffle of width " + std::to_string(width) + "; accepted is a power of two up to 32", site);
    Meeting::Lane mine;
    mine.value = value;
    mine.operand = operand;
    mine.width = width;
    mine.how = how;
    return join_meeting(Collective::shuffle, mask, mine, site);
}

unsigned ballot(unsigned mask, bool vote) {
    Meeting::Lane mine;
    mine.value = vote;
    return join_meeting(Collective::ballot, mask, mine, SMOLVLA_SIMT_SITE);
}

void warp_barrier(unsigned mask) { join_meeting(Collective::warp_barrier, mask, {}, SMOLVLA_SIMT_SITE); }

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    Meeting::Lane mine;
    mine.out = r;
    mine.in = row;
    join_whole(transposed ? Collective::ldmatrix_trans : Collective::ldmatrix, mine, "ldmatrix", SMOLVLA_SIMT_SITE);
}

void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
    const MmaLane own{d, a, {b0, b1}};
    Meeting::Lane mine;
    mine.in = &own;
    join_whole(is_bf16 ? Collective::mma_bf16 : Collective::mma_fp16, mine, "mma", SMOLVLA_SIMT_SITE);
}

}  // namespace simt
