// What csrc/bindings.cpp takes of pybind11, for a processor that has no Python here: the same bindings, called over a pipe
// by tests/aarch64/guest.py. A call comes as lines of words and the memory that its addresses lie in, and goes back alike.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace pybind11 {

struct arg {
    explicit arg(const char*) {}
};
struct gil_scoped_release {};
template <class>
struct call_guard {};

struct list : std::string {
    void append(const char* word) { *this += std::string(empty() ? "" : " ") + word; }
};

template <class T>
T take(std::istream& words, const T*) {
    std::string word;
    if (!(words >> word)) throw std::invalid_argument("an argument is missing");
    if constexpr (std::is_same_v<T, std::string>) return word;
    else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(std::strtod(word.c_str(), nullptr));
    else return static_cast<T>(std::strtoll(word.c_str(), nullptr, 10));
}
template <class T, size_t kCount>
std::array<T, kCount> take(std::istream& words, const std::array<T, kCount>*) {
    std::array<T, kCount> values;
    for (T& value : values) value = take(words, static_cast<const T*>(nullptr));
    return values;
}

class module_ {
public:
    const char*& doc() { return doc_; }

    template <class Function, class... Extra>
    void def(const char* name, Function function, const Extra&...) {
        add(name, std::function(function));
    }

    std::string call(const std::string& name, std::istream& words) const {
        const auto found = functions_.find(name);
        if (found == functions_.end()) throw std::invalid_argument("no function " + name);
        return found->second(words);
    }

private:
    template <class Result, class... Args>
    void add(const char* name, std::function<Result(Args...)> function) {
        functions_[name] = [function](std::istream& words) -> std::string {
            // In braces, which take the words in order.
            std::tuple<std::decay_t<Args>...> args{take(words, static_cast<const std::decay_t<Args>*>(nullptr))...};
            std::string word;
            if (words >> word) throw std::invalid_argument("one argument too many: " + word);
            if constexpr (std::is_void_v<Result>) return std::apply(function, args), "";
            else if constexpr (std::is_arithmetic_v<Result>) return std::to_string(std::apply(function, args));
            else return std::apply(function, args);
        };
    }
    const char* doc_ = "";
    std::map<std::string, std::function<std::string(std::istream&)>> functions_;
};

// Memory at an address that the caller chose. It ends where a page ends that nobody may touch.
struct Memory {
    char* data;
    size_t size, mapped;

    Memory(uintptr_t address, size_t bytes) : data(reinterpret_cast<char*>(address)), size(bytes) {
        const size_t page = 4096, before = address % page;
        mapped = (before + size + page - 1) / page * page + page;
        void* const got = mmap(data - before, mapped, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (got != data - before) std::perror("mmap"), std::exit(1);
        mprotect(data - before + mapped - page, page, PROT_NONE);
    }
    void free() const { munmap(data - reinterpret_cast<uintptr_t>(data) % 4096, mapped); }
};

inline int serve(const module_& m) {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        size_t count = 0, bytes = 0;
        uintptr_t address = 0;
        std::string name, answer;
        words >> count;
        std::vector<Memory> memory;
        for (size_t i = 0; i < count && words >> address >> bytes; ++i) memory.emplace_back(address, bytes);
        for (const Memory& each : memory) std::cin.read(each.data, static_cast<std::streamsize>(each.size));
        words >> name;
        try {
            answer = "ok " + m.call(name, words);
        } catch (const std::exception& error) {
            answer = std::string("error ") + error.what();
        }
        std::cout << answer << '\n';
        for (const Memory& each : memory) std::cout.write(each.data, static_cast<std::streamsize>(each.size)), each.free();
        std::cout.flush();
    }
    return 0;
}

}  // namespace pybind11

#define PYBIND11_MODULE(name, m)             \
    static void bind(pybind11::module_& m);  \
    int main() {                             \
        pybind11::module_ m;                 \
        bind(m);                             \
        return pybind11::serve(m);           \
    }                                        \
    static void bind(pybind11::module_& m)
