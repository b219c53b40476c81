// Threads of the standard library, for compilers without OpenMP (Apple's clang).
//
// They are made when first wanted and sleep between calls. One call uses them at a time: another one meanwhile, from
// inside a body or from another thread of the process, runs on its own thread alone, which is right as work is taken, not
// dealt out. A child process has none of its parent's threads and makes its own. They end with the process.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace smolvla::cpu {

class ThreadPool {
public:
    // This process's. Never destroyed: a thread may still sleep in it when the process ends, or be the parent's.
    static ThreadPool& here() {
        static std::atomic<ThreadPool*> current{nullptr};
        ThreadPool* pool = current.load(std::memory_order_acquire);
        while (!pool || pool->process_ != process()) {
            ThreadPool* const fresh = new ThreadPool;
            if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
            delete fresh;
        }
        return *pool;
    }

    // Runs `call`, which may not throw, on this thread and on up to `helpers` others; returns when all are done.
    void run(int helpers, const std::function<void()>& call) {
        if (busy_.exchange(true, std::memory_order_acquire)) return call();
        {
            const std::lock_guard<std::mutex> hold(state_);
            helpers = grow(helpers);
            call_ = &call;
            wanted_ = helpers;
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        call();
        std::unique_lock<std::mutex> hold(state_);
        wanted_ = 0;  // who has not come by now finds nothing left to do
        done_.wait(hold, [&] { return running_ == 0; });
        busy_.store(false, std::memory_order_release);
    }

private:
    static long process() {
#if defined(__unix__) || defined(__APPLE__)
        return static_cast<long>(getpid());
#else
        return 0;
#endif
    }

    // How many of so many helpers there are, after making those that the system grants.
    int grow(int helpers) {
        for (; threads_ < helpers; ++threads_) try {
                std::thread([this] { work(); }).detach();
            } catch (const std::system_error&) {
                break;
            }
        return std::min(threads_, helpers);
    }

    void work() {
        std::unique_lock<std::mutex> hold(state_);
        for (;;) {
            wake_.wait(hold, [&] { return wanted_ > 0; });
            --wanted_;
            ++running_;
            const std::function<void()>& call = *call_;
            hold.unlock();
            call();
            hold.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    const long process_ = process();
    std::atomic<bool> busy_{false};
    std::mutex state_;
    std::condition_variable wake_, done_;
    const std::function<void()>* call_ = nullptr;
    int threads_ = 0, wanted_ = 0, running_ = 0;
};

}  // namespace smolvla::cpu
