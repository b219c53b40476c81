// Rotary position embedding: the angle of a position, as ops/reference/rope.py has it, with its sine and cosine.
#pragma once

#include "cuda/ptx.cuh"

namespace smolvla::cuda {

// sin and cos of x by Cody and Waite's reduction to [-pi/4, pi/4] and Cephes' polynomials. Within 1e-7 for |x| < 1e4,
// where positions end long before; CUDA's own sinf keeps a local array for angles that never come.
__device__ __forceinline__ void sin_cos(float x, float& sin, float& cos) {
    const float turns = rintf(x * 0.636619772f);  // quarter turns
    // pi / 2 in two parts; the first difference is exact but for one rounding, since fma keeps the product whole.
    float r = fmaf(-turns, 1.57079637f, x);
    r = fmaf(-turns, -4.37113883e-8f, r);
    const float z = r * r;
    const float s = fmaf(r * z, fmaf(z, fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
    const float c = fmaf(z * z, fmaf(z, fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
                         fmaf(z, -0.5f, 1.0f));
    const int quarter = static_cast<int>(turns) & 3;
    sin = quarter & 1 ? c : s;
    cos = quarter & 1 ? s : c;
    if (quarter & 2) sin = -sin;
    if (quarter == 1 || quarter == 2) cos = -cos;
}

// The angle of dimensions i and i + head_dim / 2 at a position: position / 10000^(2i / head_dim).
__device__ __forceinline__ float rope_angle(int position, int i, int head_dim) {
    constexpr float kLog2Wavelength = 13.2877124f;  // LeRobot's 10 000, whatever a config's rope_theta says
    const float exponent = 2.0f / static_cast<float>(head_dim) * static_cast<float>(i);
    return static_cast<float>(position) / exp2f(exponent * kLog2Wavelength);
}

}  // namespace smolvla::cuda
