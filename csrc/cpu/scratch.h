// Memory that a thread keeps between calls, one piece a slot: it grows to the largest need seen and nothing is allocated
// after that.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace smolvla::cpu {

class Scratch {
public:
    // At least `count` floats, aligned to a cache line, contents undefined; valid until the thread's next call for the slot.
    template <int kSlot = 0>
    static float* reserve(int64_t count) {
        thread_local Buffer buffer;
        if (buffer.count < count) {
            buffer.data.reset();
            buffer.count = 0;
            buffer.data.reset(new (std::align_val_t{kAlignment}) float[count]);
            buffer.count = count;
        }
        return buffer.data.get();
    }

private:
    static constexpr size_t kAlignment = 64;
    struct Free {
        void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
    };
    struct Buffer {
        std::unique_ptr<float[], Free> data;
        int64_t count = 0;
    };
};

}  // namespace smolvla::cpu
