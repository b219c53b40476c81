// What the emulator adds to a module of kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace simt {
void bind(pybind11::module_& module);
}
