#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "planted.h"
#include "emulator/module.h"

namespace py = pybind11;

PYBIND11_MODULE(_planted, m) {
    simt::bind(m);
    const auto groups = [] {
        return std::vector{planted::memory_kernels(), planted::order_kernels(), planted::warp_kernels(),
                           planted::cluster_kernels(), planted::primitives()};
    };
    m.def(
        "run",
        [groups](const std::string& name, bool mended, uintptr_t a, uintptr_t b) {
            for (const auto& group : groups())
                for (const planted::Entry& entry : group)
                    if (entry.name == name)
                        return planted::launch(entry.name, entry.kernel, entry.grid, nullptr,
                                               planted::Args{mended, reinterpret_cast<uint32_t*>(a),
                                                             reinterpret_cast<uint32_t*>(b)});
            throw std::invalid_argument("no kernel " + name);
        },
        py::arg("name"), py::arg("mended"), py::arg("a"), py::arg("b"));
    m.def(
        "launch",
        [](unsigned blocks, unsigned threads, size_t shared_bytes, bool cooperative, unsigned cluster) {
            planted::launch("empty", static_cast<planted::Kernel>([](planted::Args) {}),
                            {blocks, threads, shared_bytes, cooperative, cluster}, nullptr, planted::Args{});
        },
        py::arg("blocks"), py::arg("threads"), py::arg("shared_bytes"), py::arg("cooperative"), py::arg("cluster") = 1);
    m.def("names", [groups] {
        std::vector<std::string> names;
        for (const auto& group : groups())
            for (const planted::Entry& entry : group) names.push_back(entry.name);
        return names;
    });
}
