// smolvla_fast._cuda: CUDA C++ kernels on raw addresses. Loads on a machine without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"

namespace py = pybind11;
using namespace smolvla::cuda;

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "smolvla_fast's CUDA C++ kernels, on raw addresses";
    m.def("runtime_version", &runtime_version, "CUDA runtime this was built with: 1000 * major + 10 * minor");
    m.def("driver_version", &driver_version, "highest CUDA version the driver supports; 0 without a driver");
    m.def("device_count", &device_count, "number of GPUs; 0 without a driver");
    m.def(
        "device",
        [](int index) {
            const Device d = device(index);
            return py::dict(py::arg("name") = d.name, py::arg("compute_capability") = d.compute_capability,
                            py::arg("multiprocessors") = d.multiprocessors, py::arg("memory_bytes") = d.memory_bytes,
                            py::arg("l2_bytes") = d.l2_bytes,
                            py::arg("shared_bytes_per_block") = d.shared_bytes_per_block,
                            py::arg("code_version") = d.code_version, py::arg("ptx_version") = d.ptx_version);
        },
        py::arg("index") = 0, "properties of one GPU, and which of the compiled codes it takes; starts a CUDA context");
}
