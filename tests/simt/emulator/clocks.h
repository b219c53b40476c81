// Who knows what of whom: vector clocks, in two parts. Within a block a thread knows an epoch of each thread; these
// arrays are shared, for after a barrier all know the same. Of other blocks it knows what came over counters.
#pragma once

#include <cstdint>
#include <vector>

namespace simt {

// A counted pointer for one host thread.
template <class T>
class Ref {
public:
    Ref() = default;
    explicit Ref(T* owned) : at_(owned) { take(); }
    Ref(const Ref& other) : at_(other.at_) { take(); }
    Ref(Ref&& other) noexcept : at_(other.at_) { other.at_ = nullptr; }
    Ref& operator=(Ref other) noexcept {
        T* mine = at_;
        at_ = other.at_;
        other.at_ = mine;
        return *this;
    }
    ~Ref() {
        if (at_ && --at_->users == 0) delete at_;
    }
    T* operator->() const { return at_; }
    T& operator*() const { return *at_; }
    explicit operator bool() const { return at_ != nullptr; }
    bool operator==(const Ref& other) const { return at_ == other.at_; }

private:
    void take() {
        if (at_) ++at_->users;
    }
    T* at_ = nullptr;
};

// The newest epoch known of each thread of one block. Never changed once more than one holds it.
struct Clock {
    explicit Clock(size_t threads) : epochs(threads, 0) {}
    Clock(const Clock& other) : epochs(other.epochs) {}
    void join(const Clock& other) {
        for (size_t i = 0; i < epochs.size(); ++i)
            if (epochs[i] < other.epochs[i]) epochs[i] = other.epochs[i];
    }
    int users = 0;
    std::vector<uint32_t> epochs;
};

inline Ref<Clock> join(const Ref<Clock>& a, const Ref<Clock>& b) {
    if (!a || a == b) return b;
    if (!b) return a;
    Ref<Clock> both(new Clock(*a));
    both->join(*b);
    return both;
}

// What is known of all blocks; a block of which nothing is known has no clock. Never changed once shared.
struct Knowledge {
    explicit Knowledge(size_t blocks) : of(blocks) {}
    Knowledge(const Knowledge& other) : of(other.of) {}
    int users = 0;
    std::vector<Ref<Clock>> of;
};

inline Ref<Knowledge> join(const Ref<Knowledge>& a, const Ref<Knowledge>& b) {
    if (!a || a == b) return b;
    if (!b) return a;
    Ref<Knowledge> both(new Knowledge(*a));
    for (size_t i = 0; i < both->of.size(); ++i) both->of[i] = join(a->of[i], b->of[i]);
    return both;
}

}  // namespace simt
