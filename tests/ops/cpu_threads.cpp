// How csrc/cpu/parallel.h deals work out, counted: compiled with OpenMP and without by tests/ops/test_cpu_threads.py.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "cpu/parallel.h"

using namespace smolvla::cpu;

namespace {

constexpr int64_t kRows = 4000, kWidth = 4096;
constexpr int kThreads = 4;

// How often each row was visited by one call: once each, or 0.
bool each_row_once(int64_t rows, int threads) {
    std::vector<std::atomic<int>> visits(rows);
    parallel_rows(rows, kWidth, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) ++visits[row];
    });
    for (const auto& count : visits)
        if (count != 1) return false;
    return true;
}

// Workers of given speeds in simulated time, each taking the next range when it is free: rows, ranges and the end of each.
int deal(int64_t rows, int64_t fine, int64_t coarse, const std::vector<double>& speeds) {
    Ranges ranges(rows, static_cast<int>(speeds.size()), fine, coarse);
    std::vector<double> ends(speeds.size());
    std::vector<int64_t> done(speeds.size()), taken(speeds.size());
    std::vector<bool> busy(speeds.size(), true);
    for (;;) {
        int first = -1;
        for (size_t i = 0; i < speeds.size(); ++i)
            if (busy[i] && (first < 0 || ends[i] < ends[first])) first = static_cast<int>(i);
        if (first < 0) break;
        int64_t begin, end;
        if (!ranges.next(begin, end)) {
            busy[first] = false;
            continue;
        }
        done[first] += end - begin;
        ++taken[first];
        ends[first] += static_cast<double>(end - begin) / speeds[first];
    }
    for (size_t i = 0; i < speeds.size(); ++i)
        std::printf("%lld %lld %.6f\n", static_cast<long long>(done[i]), static_cast<long long>(taken[i]), ends[i]);
    return 0;
}

// A call has ended when every row has been visited, by whoever was slow.
int waits() {
    const auto caller = std::this_thread::get_id();
    std::atomic<int64_t> visited{0};
    parallel_rows(64, 4 * kElementsPerThread, kThreads, [&](int64_t begin, int64_t end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(std::this_thread::get_id() == caller ? 1 : 50));
        visited += end - begin;
    });
    return visited == 64 ? 0 : 1;
}

// The thread of row 0 keeps its range, the first that is dealt and so the largest, until the others have done the rest: how much
// it has done.
int64_t one_waits() {
    std::mutex lock;
    std::condition_variable all_else;
    int64_t done = 0, of_the_held = 0;
    std::thread::id held;
    parallel_rows(kRows, kWidth, kThreads, [&](int64_t begin, int64_t end) {
        std::unique_lock<std::mutex> hold(lock);
        if (begin == 0) {
            held = std::this_thread::get_id();
            all_else.wait(hold, [&] { return done == kRows - (end - begin); });
        }
        done += end - begin;
        if (held == std::this_thread::get_id()) of_the_held += end - begin;
        all_else.notify_all();
    });
    return done == kRows ? of_the_held : -1;
}

int throws() {
    for (int i = 0; i < 3; ++i) {
        std::atomic<int64_t> after{0};
        try {
            parallel_rows(kRows, kWidth, kThreads, [&](int64_t begin, int64_t end) {
                if (begin == 0) throw std::runtime_error("from a body");
                after += end - begin;
            });
            return 1;
        } catch (const std::runtime_error& error) {
            if (std::string(error.what()) != "from a body" || after >= kRows) return 2;
        }
        if (!each_row_once(kRows, kThreads)) return 3;
    }
    return 0;
}

int nested() {
    std::atomic<int64_t> inner{0}, outer{0};
    parallel_rows(40, 4 * kElementsPerThread, kThreads, [&](int64_t begin, int64_t end) {
        outer += end - begin;
        for (int64_t row = begin; row < end; ++row)
            parallel_rows(100, 4 * kElementsPerThread, kThreads, [&](int64_t b, int64_t e) { inner += e - b; });
    });
    return outer == 40 && inner == 4000 ? 0 : 1;
}

int at_once() {
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i)
        callers.emplace_back([&] {
            for (int call = 0; call < 200; ++call) wrong += !each_row_once(200 + call, 1 + call % 5);
        });
    for (auto& caller : callers) caller.join();
    return wrong;
}

// A child, made while another thread is in the middle of a call, has threads that come to it; the parent keeps its own.
int forked() {
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) each_row_once(kRows, kThreads);
    });
    int wrong = 0;
    for (int i = 0; i < 5 && !wrong; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(30);  // a thread that nobody comes to waits for ever
            _exit(one_waits() == kRows / 8 ? 0 : 2);
        }
        int status = 0;
        wrong = waitpid(child, &status, 0) != child || status != 0;
    }
    stop = true;
    busy.join();
    return wrong || one_waits() != kRows / 8;
}

}  // namespace

int main(int count, char** words) {
    const std::string what = count > 1 ? words[1] : "";
    if (what == "deal" && count > 5) {
        std::vector<double> speeds;
        for (int i = 5; i < count; ++i) speeds.push_back(std::atof(words[i]));
        return deal(std::atoll(words[2]), std::atoll(words[3]), std::atoll(words[4]), speeds);
    }
    if (what == "one_waits") return std::printf("%lld\n", static_cast<long long>(one_waits())) < 0;
    if (what == "waits") return waits();
    if (what == "throws") return throws();
    if (what == "nested") return nested();
    if (what == "at_once") return at_once();
    if (what == "forked") return forked();
    if (what == "threads") return std::printf("%d\n", each_row_once(kRows, 16)) < 0;
    return 64;
}
