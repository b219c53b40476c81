// smolvla_fast._cuda: CUDA C++ kernels on raw addresses; nothing is checked here, smolvla_fast/ops/cuda/ checks and is the
// only caller. Loads on a machine without a GPU or a driver. The host emulator compiles the same file under its own name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/denoise_persistent.h"
#include "cuda/device.h"
#include "cuda/euler_step.h"
#include "cuda/image_prep.h"
#include "cuda/linear_residual.h"
#include "cuda/masked_attention.h"
#include "cuda/norm_products.h"

#if defined(SMOLVLA_SIMT)
#include "emulator/module.h"
#endif

#ifndef SMOLVLA_MODULE
#define SMOLVLA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace smolvla::cuda;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

DenoiseSizes denoise_sizes(const std::array<int, 12>& of) {
    return {of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], of[8], of[9], of[10], of[11] != 0};
}

}  // namespace

PYBIND11_MODULE(SMOLVLA_MODULE, m) {
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
    // One block an op, its launcher in cuda/<op>.h.
    m.def(
        "image_prep",
        [](uintptr_t frames, int frames_dtype, const std::array<int64_t, 4>& strides, uintptr_t out, int out_dtype,
           const std::array<int, 3>& frames_size, const std::array<int, 2>& size, const std::array<int, 2>& padding,
           const std::array<float, 2>& scales, uintptr_t stream) {
            image_prep({at<void>(frames), static_cast<DType>(frames_dtype), at<void>(out),
                        static_cast<DType>(out_dtype), frames_size[0], frames_size[1], frames_size[2], size[0], size[1],
                        padding[0], padding[1], scales[0], scales[1], strides[0], strides[1], strides[2], strides[3]},
                       at<void>(stream));
        },
        py::arg("frames"), py::arg("frames_dtype"), py::arg("strides"), py::arg("out"), py::arg("out_dtype"),
        py::arg("frames_size"), py::arg("size"), py::arg("padding"), py::arg("scales"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "euler_step",
        [](const std::array<uintptr_t, 4>& inputs, const std::array<int, 4>& dtypes, uintptr_t x,
           const std::array<uintptr_t, 3>& guidance, const std::array<int64_t, 4>& strides, uintptr_t new_x, uintptr_t v,
           const std::array<int, 4>& sizes, float eps, float dt, float time, uintptr_t stream) {
            const auto dtype = [&](int i) { return static_cast<DType>(dtypes[i]); };
            euler_step({at<void>(inputs[0]), at<void>(inputs[1]), at<void>(inputs[2]), at<void>(inputs[3]), dtype(0),
                        dtype(1), dtype(2), dtype(3), at<float>(x), at<float>(guidance[0]), at<float>(guidance[1]),
                        at<float>(guidance[2]), strides[0], strides[1], strides[2], strides[3], at<float>(new_x),
                        at<float>(v), sizes[0], sizes[1], sizes[2], sizes[3], eps, dt, time},
                       at<void>(stream));
        },
        py::arg("inputs"), py::arg("dtypes"), py::arg("x"), py::arg("guidance"), py::arg("strides"), py::arg("new_x"),
        py::arg("v"), py::arg("sizes"), py::arg("eps"), py::arg("dt"), py::arg("time"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "masked_attention",
        [](const std::array<uintptr_t, 3>& inputs, const std::array<int, 2>& dtypes, uintptr_t mask, uintptr_t out,
           const std::array<std::array<int64_t, 3>, 4>& strides, const std::array<int, 6>& sizes, bool dependent,
           uintptr_t stream) {
            masked_attention({at<void>(inputs[0]), at<void>(inputs[1]), at<void>(inputs[2]),
                              static_cast<DType>(dtypes[0]), static_cast<DType>(dtypes[1]), at<uint8_t>(mask),
                              at<void>(out), strides[0], strides[1], strides[2], strides[3], sizes[0], sizes[1],
                              sizes[2], sizes[3], sizes[4], sizes[5], dependent},
                             at<void>(stream));
        },
        py::arg("inputs"), py::arg("dtypes"), py::arg("mask"), py::arg("out"), py::arg("strides"), py::arg("sizes"),
        py::arg("dependent"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    m.attr("linear_residual_cols") = kLinearResidualCols;
    m.def("linear_residual_clusters", &linear_residual_clusters,
          "clusters of linear_residual that the current device runs at once; 0: none, or no code for them");
    m.def(
        "linear_residual",
        [](const std::array<uintptr_t, 3>& inputs, uintptr_t y, const std::array<uintptr_t, 3>& next,
           const std::array<bool, 2>& fp32, const std::array<int64_t, 3>& strides, const std::array<int, 3>& sizes,
           bool dependent, bool weight_settled, uintptr_t stream) {
            linear_residual({at<void>(inputs[0]), at<void>(inputs[1]), at<void>(inputs[2]), at<void>(y),
                             at<void>(next[0]), at<void>(next[1]), at<float>(next[2]), fp32[0], fp32[1], strides[0],
                             strides[1], strides[2], sizes[0], sizes[1], sizes[2], dependent, weight_settled},
                            at<void>(stream));
        },
        py::arg("inputs"), py::arg("y"), py::arg("next"), py::arg("fp32"), py::arg("strides"), py::arg("sizes"),
        py::arg("dependent"), py::arg("weight_settled"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
    m.def("norm_products_shared_bytes", &norm_products_shared_bytes,
          "what a block of norm_swiglu or norm_qkv_rope takes, at most");
    m.def("norm_products_clusters", &norm_products_clusters,
          "clusters of such blocks that the current device runs at once; 0: none, or no code for them");
    m.def(
        "norm_swiglu",
        [](const std::array<uintptr_t, 4>& inputs, uintptr_t y, const std::array<int64_t, 2>& strides,
           const std::array<int, 4>& sizes, float eps, bool dependent, bool weights_settled, uintptr_t stream) {
            norm_swiglu({{at<void>(inputs[0]), at<float>(inputs[1]), sizes[0], sizes[1], sizes[2], eps, dependent,
                          weights_settled},
                         at<void>(inputs[2]), at<void>(inputs[3]), strides[0], strides[1], at<void>(y), sizes[3]},
                        at<void>(stream));
        },
        py::arg("inputs"), py::arg("y"), py::arg("strides"), py::arg("sizes"), py::arg("eps"), py::arg("dependent"),
        py::arg("weights_settled"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "norm_qkv_rope",
        [](const std::array<uintptr_t, 7>& inputs, const std::array<uintptr_t, 3>& outputs, bool fp32_slots,
           const std::array<int64_t, 6>& strides, const std::array<int, 7>& sizes, float eps, bool dependent,
           bool weights_settled, uintptr_t stream) {
            norm_qkv_rope({{at<void>(inputs[0]), at<float>(inputs[1]), sizes[0], sizes[1], sizes[2], eps, dependent,
                            weights_settled},
                           at<void>(inputs[2]), at<void>(inputs[3]), at<void>(inputs[4]), strides[0], strides[1],
                           strides[2], at<float>(inputs[5]), at<float>(inputs[6]), at<void>(outputs[0]),
                           at<void>(outputs[1]), at<void>(outputs[2]), fp32_slots, sizes[3], sizes[4], sizes[5],
                           sizes[6], strides[3], strides[4], strides[5]},
                          at<void>(stream));
        },
        py::arg("inputs"), py::arg("outputs"), py::arg("fp32_slots"), py::arg("strides"), py::arg("sizes"),
        py::arg("eps"), py::arg("dependent"), py::arg("weights_settled"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "denoise_resources",
        [](const std::array<int, 12>& sizes) {
            const DenoiseResources found = denoise_resources(denoise_sizes(sizes));
            return py::dict(py::arg("blocks") = found.blocks, py::arg("at_once") = found.at_once,
                            py::arg("shared_bytes") = found.shared_bytes, py::arg("ring_bytes") = found.ring_bytes,
                            py::arg("largest_slab") = found.largest_slab,
                            py::arg("counter_barriers") = found.counter_barriers,
                            py::arg("cooperative") = found.cooperative);
        },
        py::arg("sizes"), "what a launch of denoise_persistent would take on the current device");
    m.def(
        "denoise_persistent",
        [](const std::vector<std::array<uintptr_t, 11>>& layers, const std::vector<std::array<float, 2>>& eps,
           const std::array<uint32_t, 3>& fp32_layers, const std::array<int, 12>& sizes,
           const std::array<uintptr_t, 5>& heads, const std::array<bool, 4>& fp32_heads, float end_eps,
           const std::array<uintptr_t, 11>& inputs, const std::array<uintptr_t, 9>& scratch, uintptr_t x,
           uintptr_t stream) {
            DenoisePersistent p{};
            for (size_t i = 0; i < layers.size() && i < kDenoiseLayers; ++i) {
                const auto a = [&](int which) { return at<void>(layers[i][which]); };
                p.layers[i] = {a(0), a(1), a(2), a(3), a(4),     a(5),        a(6),
                               a(7), a(8), a(9), a(10), eps[i][0], eps[i][1]};
            }
            p.norm1_fp32 = fp32_layers[0], p.norm2_fp32 = fp32_layers[1], p.cache_fp32 = fp32_layers[2];
            p.sizes = denoise_sizes(sizes);
            p.mlp_out = at<void>(heads[0]), p.mlp_out_bias = at<void>(heads[1]), p.end_norm = at<void>(heads[2]);
            p.action_out = at<void>(heads[3]), p.action_out_bias = at<void>(heads[4]);
            p.mlp_out_bias_fp32 = fp32_heads[0], p.end_norm_fp32 = fp32_heads[1];
            p.action_out_fp32 = fp32_heads[2], p.action_out_bias_fp32 = fp32_heads[3];
            p.end_eps = end_eps;
            p.fold_weight = at<float>(inputs[0]), p.fold_bias = at<float>(inputs[1]), p.noise = at<float>(inputs[2]);
            p.seen = at<bool>(inputs[3]);
            p.self_sin = at<float>(inputs[4]), p.self_cos = at<float>(inputs[5]);
            p.cross_sin = at<float>(inputs[6]), p.cross_cos = at<float>(inputs[7]);
            p.previous = at<float>(inputs[8]), p.weights = at<float>(inputs[9]), p.strengths = at<float>(inputs[10]);
            p.q = at<void>(scratch[0]), p.attended = at<void>(scratch[1]), p.inner = at<void>(scratch[2]);
            p.h = at<void>(scratch[3]), p.hidden_high = at<void>(scratch[4]), p.hidden_low = at<void>(scratch[5]);
            p.last_h = at<float>(scratch[6]), p.squares = at<float>(scratch[7]);
            p.counter = at<uint32_t>(scratch[8]), p.x = at<float>(x);
            denoise_persistent(p, at<void>(stream));
        },
        py::arg("layers"), py::arg("eps"), py::arg("fp32_layers"), py::arg("sizes"), py::arg("heads"),
        py::arg("fp32_heads"), py::arg("end_eps"), py::arg("inputs"), py::arg("scratch"), py::arg("x"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#if defined(SMOLVLA_SIMT)
    simt::bind(m);
#endif
}
