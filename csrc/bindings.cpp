// smolvla_fast._cpu: addresses and sizes in, nothing checked. The wrappers in smolvla_fast/ops/cpu/ check.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/attention.h"
#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/image_prep.h"
#include "cpu/int16_linear.h"
#include "cpu/int8_attention.h"
#include "cpu/int8_linear.h"
#include "cpu/int8_matmul.h"
#include "cpu/integer_level.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/quantize.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"

namespace py = pybind11;
using namespace smolvla::cpu;

namespace {

py::list levels() {
    py::list names;
    for (int i = 0; i <= static_cast<int>(best_level()); ++i) names.append(kLevelNames[i]);
    return names;
}

void set_level(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_level()); ++i)
        if (name == kLevelNames[i]) return level().store(static_cast<Level>(i));
    throw std::invalid_argument("no instruction level " + name + " on this processor");
}

// Two OpenMP runtimes in one process fight over the cores; this names ours, so that a test can see it is torch's.
std::string openmp_library() {
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) && info.dli_fname) return info.dli_fname;
#endif
    return "";
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void bind_rms_norm(py::module_& m, const char* name) {
    m.def(
        name,
        [](uintptr_t x, uintptr_t weight, uintptr_t y, int64_t rows, int64_t width, float eps, int num_threads) {
            rms_norm(at<const T>(x), at<const T>(weight), at<T>(y), rows, width, eps, num_threads);
        },
        py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("rows"), py::arg("width"), py::arg("eps"),
        py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

template <class X, class Y>
void bind_layer_norm(py::module_& m, const char* name) {
    m.def(
        name,
        [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, int64_t rows, int64_t width, float eps,
           int num_threads) {
            layer_norm(at<const X>(x), at<const float>(weight), at<const float>(bias), at<Y>(y), rows, width, eps,
                       num_threads);
        },
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("rows"), py::arg("width"),
        py::arg("eps"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

Attention attention_at(const std::array<uintptr_t, 5>& at_, const std::array<int64_t, 6>& sizes,
                       const std::array<int64_t, 12>& strides, float scale) {
    Attention a{at<void>(at_[0]), at<void>(at_[1]), at<void>(at_[2]), at<uint8_t>(at_[3]), at<void>(at_[4]),
                sizes[0],         sizes[1],         sizes[2],         sizes[3],            sizes[4],
                sizes[5],         {},               {},               {},                  {},
                scale,            nullptr};
    int64_t* const to[] = {a.q_strides, a.k_strides, a.v_strides, a.mask_strides};
    for (int i = 0; i < 4; ++i) std::copy_n(strides.begin() + 3 * i, 3, to[i]);
    return a;
}

template <class T>
void bind_attention(py::module_& m, const char* name) {
    m.def(
        name,
        [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mask, uintptr_t out, const std::array<int64_t, 6>& sizes,
           const std::array<int64_t, 12>& strides, float scale, int num_threads) {
            attention<T>(attention_at({q, k, v, mask, out}, sizes, strides, scale), num_threads);
        },
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("out"), py::arg("sizes"),
        py::arg("strides"), py::arg("scale"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_int8_attention(py::module_& m) {
    m.def(
        "int8_attention",
        [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mask, uintptr_t out, const std::array<int64_t, 6>& sizes,
           const std::array<int64_t, 12>& strides, float scale, int num_threads, float limit, uintptr_t error,
           uintptr_t spread) {
            int8_attention(attention_at({q, k, v, mask, out}, sizes, strides, scale), limit, at<float>(error),
                           at<float>(spread), num_threads);
        },
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("out"), py::arg("sizes"),
        py::arg("strides"), py::arg("scale"), py::arg("num_threads"), py::arg("limit"), py::arg("error"),
        py::arg("spread"), py::call_guard<py::gil_scoped_release>());
}

template <class T>
void bind_rope(py::module_& m, const char* name) {
    m.def(
        name,
        [](uintptr_t x, uintptr_t y, uintptr_t sin, uintptr_t cos, const std::array<int64_t, 4>& sizes,
           const std::array<int64_t, 3>& y_strides, int64_t table_stride, int num_threads) {
            const Rope a{at<void>(x), at<void>(y), at<float>(sin), at<float>(cos), sizes[0], sizes[1], sizes[2],
                         sizes[3],    {y_strides[0], y_strides[1], y_strides[2]}, table_stride};
            rope<T>(a, num_threads);
        },
        py::arg("x"), py::arg("y"), py::arg("sin"), py::arg("cos"), py::arg("sizes"), py::arg("y_strides"),
        py::arg("table_stride"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

template <class X, class Y>
void bind_image_prep(py::module_& m, const char* name) {
    m.def(
        name,
        [](uintptr_t x, uintptr_t y, const std::array<int64_t, 7>& sizes, const std::array<int64_t, 4>& strides,
           int num_threads) {
            const ImagePrep a{at<void>(x), at<void>(y), sizes[0],   sizes[1],   sizes[2],   sizes[3],  sizes[4],
                              sizes[5],    sizes[6],    strides[0], strides[1], strides[2], strides[3]};
            image_prep<X, Y>(a, num_threads);
        },
        py::arg("x"), py::arg("y"), py::arg("sizes"), py::arg("strides"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
}

template <class X, class T, class Out>
void bind_linear(py::module_& m, const char* name) {
    m.def(
        name,
        [](uintptr_t x, uintptr_t norm_weight, uintptr_t weight, uintptr_t up_weight, uintptr_t bias,
           uintptr_t residual, uintptr_t y, int64_t rows, int64_t inputs, int64_t outputs, int activation, float eps,
           int num_threads) {
            const Linear a{at<void>(x),    at<void>(norm_weight), at<void>(weight), at<void>(up_weight),
                           at<void>(bias), at<void>(residual),    at<void>(y),      rows,
                           inputs,         outputs,               static_cast<Activation>(activation), eps};
            linear<X, T, Out>(a, num_threads);
        },
        py::arg("x"), py::arg("norm_weight"), py::arg("weight"), py::arg("up_weight"), py::arg("bias"),
        py::arg("residual"), py::arg("y"), py::arg("rows"), py::arg("inputs"), py::arg("outputs"),
        py::arg("activation"), py::arg("eps"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

template <class X, class E>
void bind_quantize_rows(py::module_& m, const char* name) {
    m.def(
        name,
        [](int norm, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t data, uintptr_t scale, int64_t rows,
           int64_t width, float eps, int num_threads) {
            quantize_rows(static_cast<Norm>(norm), at<const X>(x), at<const float>(weight), at<const float>(bias),
                          IntegerRows<E>{at<E>(data), at<float>(scale)}, rows, width, eps, num_threads);
        },
        py::arg("norm"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("data"), py::arg("scale"),
        py::arg("rows"), py::arg("width"), py::arg("eps"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
}

void bind_int8_matmul(py::module_& m) {
    m.def(
        "int8_matmul",
        [](uintptr_t data, uintptr_t weight, uintptr_t scale, uintptr_t sums, int64_t rows, int64_t inputs,
           int64_t outputs, int num_threads) {
            int8_matmul({at<uint8_t>(data), at<int8_t>(weight), at<float>(scale), at<float>(sums), rows, inputs, outputs},
                        num_threads);
        },
        py::arg("data"), py::arg("weight"), py::arg("scale"), py::arg("sums"), py::arg("rows"), py::arg("inputs"),
        py::arg("outputs"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_int8_linear(py::module_& m) {
    m.def("int8_rows_fit", &int8_rows_fit, py::arg("rows"), py::arg("num_threads"), "whether y may be null");
    m.def("int8_panel_bytes", &int8_panel_bytes, py::arg("inputs"), "of 32 outputs");
    m.def(
        "pack_int8_panels",
        [](uintptr_t weight, uintptr_t panels, int64_t outputs, int64_t inputs) {
            pack_int8_panels(at<int8_t>(weight), at<int8_t>(panels), outputs, inputs);
        },
        py::arg("weight"), py::arg("panels"), py::arg("outputs"), py::arg("inputs"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "int8_linear",
        [](uintptr_t x, uintptr_t x_scale, uintptr_t weight, uintptr_t up_weight, uintptr_t scale, uintptr_t up_scale,
           uintptr_t bias, uintptr_t residual, uintptr_t y, uintptr_t up_sums, uintptr_t out_data, uintptr_t out_scale,
           int64_t rows, int64_t inputs, int64_t outputs, int activation, int num_threads) {
            int8_linear({at<uint8_t>(x), at<float>(x_scale), at<int8_t>(weight), at<int8_t>(up_weight), at<float>(scale),
                         at<float>(up_scale), at<float>(bias), at<float>(residual), at<float>(y), at<float>(up_sums),
                         {at<uint8_t>(out_data), at<float>(out_scale)}, rows, inputs, outputs,
                         static_cast<Activation>(activation)},
                        num_threads);
        },
        py::arg("x"), py::arg("x_scale"), py::arg("weight"), py::arg("up_weight"), py::arg("scale"), py::arg("up_scale"),
        py::arg("bias"), py::arg("residual"), py::arg("y"), py::arg("up_sums"), py::arg("out_data"), py::arg("out_scale"),
        py::arg("rows"), py::arg("inputs"), py::arg("outputs"), py::arg("activation"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
}

void bind_int16_linear(py::module_& m) {
    m.def(
        "int16_linear",
        [](uintptr_t x, uintptr_t x_scale, uintptr_t weight, uintptr_t scale, uintptr_t up_weight, uintptr_t up_scale,
           uintptr_t bias, uintptr_t residual, uintptr_t y, int64_t rows, int64_t words, int64_t outputs, int activation,
           int num_threads) {
            int16_linear({at<int16_t>(x), at<float>(x_scale), at<int16_t>(weight), at<int16_t>(up_weight), at<float>(scale),
                          at<float>(up_scale), at<float>(bias), at<float>(residual), at<float>(y), rows, words, outputs,
                          static_cast<Activation>(activation)},
                         num_threads);
        },
        py::arg("x"), py::arg("x_scale"), py::arg("weight"), py::arg("scale"), py::arg("up_weight"), py::arg("up_scale"),
        py::arg("bias"), py::arg("residual"), py::arg("y"), py::arg("rows"), py::arg("words"), py::arg("outputs"),
        py::arg("activation"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_sums(py::module_& m) {
    m.def(
        "finish_sums",
        [](uintptr_t sums, uintptr_t scale, uintptr_t bias, uintptr_t residual, int activation, int64_t rows,
           int64_t width, int num_threads) {
            const Sums a{at<float>(sums), at<float>(scale), at<float>(bias), static_cast<Activation>(activation),
                         rows, width};
            finish_sums(a, at<const float>(residual), num_threads);
        },
        py::arg("sums"), py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("activation"),
        py::arg("rows"), py::arg("width"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "quantize_sums",
        [](uintptr_t sums, uintptr_t scale, uintptr_t bias, uintptr_t up, uintptr_t out_data, uintptr_t out_scale,
           int activation, int64_t rows, int64_t width, int num_threads) {
            const Sums a{at<float>(sums), at<float>(scale), at<float>(bias), static_cast<Activation>(activation),
                         rows, width};
            const IntegerRows<uint8_t> out{at<uint8_t>(out_data), at<float>(out_scale)};
            quantize_sums(a, at<const float>(up), out, num_threads);
        },
        py::arg("sums"), py::arg("scale"), py::arg("bias"), py::arg("up"), py::arg("out_data"), py::arg("out_scale"),
        py::arg("activation"), py::arg("rows"), py::arg("width"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "smolvla_fast's kernels for CPUs, on raw addresses";
    m.def("levels", &levels, "instruction levels this processor runs, lowest first");
    m.def("level", [] { return kLevelNames[static_cast<int>(level().load())]; }, "the level in use");
    m.def("set_level", &set_level, py::arg("name"), "for tests: use this level from now on, in the whole process");
    m.def("integer_level", [] { return kIntegerLevelNames[static_cast<int>(integer_level())]; },
          "what multiplies integers at the level in use");
    m.def("openmp_library", &openmp_library, "path of the OpenMP runtime in use, or an empty string");
    bind_rms_norm<float>(m, "rms_norm_float32");
    bind_rms_norm<bfloat16>(m, "rms_norm_bfloat16");
    bind_layer_norm<float, float>(m, "layer_norm_float32_float32");
    bind_layer_norm<float, bfloat16>(m, "layer_norm_float32_bfloat16");
    bind_layer_norm<bfloat16, bfloat16>(m, "layer_norm_bfloat16_bfloat16");
    bind_attention<float>(m, "attention_float32");
    bind_attention<bfloat16>(m, "attention_bfloat16");
    bind_int8_attention(m);
    bind_rope<float>(m, "rope_float32");
    bind_rope<bfloat16>(m, "rope_bfloat16");
    bind_image_prep<uint8_t, float>(m, "image_prep_uint8_float32");
    bind_image_prep<uint8_t, bfloat16>(m, "image_prep_uint8_bfloat16");
    bind_image_prep<float, float>(m, "image_prep_float32_float32");
    bind_image_prep<float, bfloat16>(m, "image_prep_float32_bfloat16");
    bind_quantize_rows<float, uint8_t>(m, "quantize_rows_float32_uint8");
    bind_quantize_rows<bfloat16, uint8_t>(m, "quantize_rows_bfloat16_uint8");
    bind_quantize_rows<float, int16_t>(m, "quantize_rows_float32_int16");
    bind_quantize_rows<bfloat16, int16_t>(m, "quantize_rows_bfloat16_int16");
    bind_int8_matmul(m);
    bind_int8_linear(m);
    bind_int16_linear(m);
    bind_sums(m);
    // linear, dtypes of x, weight and y
    bind_linear<float, float, float>(m, "linear_float32_float32_float32");
    bind_linear<float, bfloat16, float>(m, "linear_float32_bfloat16_float32");
    bind_linear<float, bfloat16, bfloat16>(m, "linear_float32_bfloat16_bfloat16");
    bind_linear<bfloat16, bfloat16, float>(m, "linear_bfloat16_bfloat16_float32");
    bind_linear<bfloat16, bfloat16, bfloat16>(m, "linear_bfloat16_bfloat16_bfloat16");
}
