// Fibers: a stack of its own for each thread of a kernel, and the switch from one to another.
#pragma once

#include <cstddef>
#include <vector>

// The switch is written for x86-64; elsewhere, or where asked for, the C library's does, at a hundred times the cost.
#if defined(__x86_64__) && !defined(SMOLVLA_SIMT_UCONTEXT)
#define SMOLVLA_SIMT_SWITCH
#else
#include <ucontext.h>
#endif

namespace simt {

// Enough for a kernel's local arrays many times over; pages that are never touched cost nothing.
constexpr size_t STACK_BYTES = 128 * 1024;

struct Fiber {
#if defined(SMOLVLA_SIMT_SWITCH)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

// The fiber begins in entry, which must never return, when it is first switched to.
void prepare(Fiber& fiber, unsigned char* stack, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);

// Stacks that are kept from one launch to the next, each with a page below it that must not be touched.
class Stacks {
public:
    unsigned char* take();
    void give_back(unsigned char* stack) { free_.push_back(stack); }

private:
    void grow();
    std::vector<unsigned char*> free_;
};

}  // namespace simt
