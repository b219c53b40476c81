#include "emulator/module.h"

#include "emulator/runtime.h"

namespace py = pybind11;

namespace simt {
namespace {

py::dict statistics_of_last_launch() {
    const Statistics& s = statistics;
    using py::arg;
    return py::dict(arg("blocks") = s.blocks, arg("threads") = s.threads, arg("switches") = s.switches,
                    arg("block_barriers") = s.block_barriers, arg("named_barriers") = s.named_barriers,
                    arg("warp_barriers") = s.warp_barriers, arg("collectives") = s.collectives, arg("mma") = s.mma,
                    arg("ldmatrix") = s.ldmatrix, arg("async_copies") = s.async_copies,
                    arg("counter_adds") = s.counter_adds, arg("counter_polls") = s.counter_polls,
                    arg("atomics") = s.atomics, arg("shared_accesses") = s.shared_accesses,
                    arg("global_accesses") = s.global_accesses, arg("global_bytes_read") = s.global_bytes_read,
                    arg("global_bytes_written") = s.global_bytes_written);
}

template <class T>
void set(T& setting, const py::object& value) {
    if (!value.is_none()) setting = value.cast<T>();
}

}  // namespace

void bind(py::module_& m) {
    m.def(
        "allow", [](uintptr_t address, size_t bytes, bool settled) { allow(address, bytes, settled); },
        py::arg("address"), py::arg("bytes"), py::arg("settled") = false,
        "The next launch may read and write here. The first allow() after a launch forgets those before it. settled: no "
        "launch ahead of it writes there.");
    m.def("forget", &forget_allowed, "Nothing is allowed any more.");
    m.def(
        "configure",
        [](const py::object& seed, const py::object& multiprocessors, const py::object& blocks_per_multiprocessor,
           const py::object& compute_capability, const py::object& shared_bytes_per_block,
           const py::object& cooperative) {
            set(settings.seed, seed);
            set(settings.multiprocessors, multiprocessors);
            set(settings.blocks_per_multiprocessor, blocks_per_multiprocessor);
            set(settings.compute_capability, compute_capability);
            set(settings.shared_bytes_per_block, shared_bytes_per_block);
            set(settings.cooperative, cooperative);
        },
        py::kw_only(), py::arg("seed") = py::none(), py::arg("multiprocessors") = py::none(),
        py::arg("blocks_per_multiprocessor") = py::none(), py::arg("compute_capability") = py::none(),
        py::arg("shared_bytes_per_block") = py::none(), py::arg("cooperative") = py::none(),
        "The order of threads, and the size of the imaginary GPU; what is not named stays.");
    m.def(
        "reset", [] { settings = Settings{}; }, "Settings as they are at first.");
    m.def("statistics", &statistics_of_last_launch, "Counts of the last launch, failed or not.");
}

}  // namespace simt
