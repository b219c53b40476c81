#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

#if defined(SMOLVLA_SIMT_SWITCH)
// What the calling convention asks a function to preserve, saved on the stack that is left. The floating-point control
// words are never changed here and therefore not saved.
asm(R"(
    .text
    .p2align 4
    .hidden smolvla_simt_switch
    .globl smolvla_simt_switch
    .type smolvla_simt_switch, @function
smolvla_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size smolvla_simt_switch, .-smolvla_simt_switch
)");

extern "C" void smolvla_simt_switch(void** save, void* next);
#endif

namespace simt {

#if defined(SMOLVLA_SIMT_SWITCH)

void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<uintptr_t*>(stack + STACK_BYTES);
    *--top = 0;  // where a caller's address would lie; also what puts the stack where entry expects it
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = 0;
    fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { smolvla_simt_switch(&from.stack_pointer, to.stack_pointer); }

#else

void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

unsigned char* Stacks::take() {
    if (free_.empty()) grow();
    unsigned char* stack = free_.back();
    free_.pop_back();
    return stack;
}

void Stacks::grow() {
    constexpr size_t COUNT = 256;
    const auto guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t stride = STACK_BYTES + guard;
    void* all = mmap(nullptr, COUNT * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::runtime_error("SIMT emulator: no memory for the stacks of threads");
    for (size_t i = COUNT; i-- > 0;) {
        unsigned char* low = static_cast<unsigned char*>(all) + i * stride;
        if (mprotect(low, guard, PROT_NONE)) throw std::runtime_error("SIMT emulator: no guard page below a stack");
        free_.push_back(low + guard);
    }
}

}  // namespace simt
