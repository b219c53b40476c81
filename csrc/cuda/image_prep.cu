// A camera frame to what the vision tower reads: resize, padding and 2x - 1 in one pass over the output.
//
// A thread makes four neighbouring columns of one row in all three colours: it finds the source rows and columns once,
// blends twelve values in registers and stores four at a time. Source pixels are read where they lie, bytes or floats,
// pixel by pixel or plane by plane, and neighbours find them in the L1 cache. Bound by memory: the frame is read once
// and the result written once.
#include "cuda/image_prep.h"

#include "cuda/ptx.cuh"

namespace smolvla::cuda {
namespace {

// 16 bytes of fp32, 8 of the others, in one store; a warp writes 128 neighbouring columns.
constexpr int kColumns = 4;
constexpr int kLanes = 32;
// 512 x 512 pixels are 512 blocks, enough for every multiprocessor with one camera.
constexpr int kRows = 4;

struct Source {
    int low, high;
    float weight;  // of high
};

// align_corners=False. Fused, as torch's own kernel is compiled: the blending weights have the bits of F.interpolate.
__device__ __forceinline__ Source source(int target, int size, float scale) {
    const float place = fmaxf(fmaf(scale, static_cast<float>(target) + 0.5f, -0.5f), 0.0f);
    const int whole = static_cast<int>(place);
    const int low = whole < size - 1 ? whole : size - 1;
    return {low, low + 1 < size ? low + 1 : low, place - static_cast<float>(low)};
}

__device__ __forceinline__ float pixel(float x) { return x; }
__device__ __forceinline__ float pixel(bf16 x) { return to_float(x); }
__device__ __forceinline__ float pixel(fp16 x) { return to_float(x); }
// x / 255 in three instructions: the reciprocal's error is taken back once, and every byte gets the quotient's bits.
__device__ __forceinline__ float pixel(uint8_t x) {
    const float value = x, quotient = value * (1.0f / 255.0f);
    return fmaf(fmaf(-255.0f, quotient, value), 1.0f / 255.0f, quotient);
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(bf16* to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void store(fp16* to, float x) { *to = to_fp16(x); }
__device__ __forceinline__ void store_all(float* to, const float (&x)[kColumns]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store_all(bf16* to, const float (&x)[kColumns]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}
__device__ __forceinline__ void store_all(fp16* to, const float (&x)[kColumns]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_fp16(x[0], x[1]), pack_fp16(x[2], x[3]));
}

// wide: four columns at a time are aligned in every row
template <class In, class Out>
__global__ void __launch_bounds__(kLanes* kRows) image_prep_fwd_kernel(const ImagePrep p, const bool wide) {
    const int row = blockIdx.y * kRows + threadIdx.y;
    const int first = (blockIdx.x * kLanes + threadIdx.x) * kColumns;
    if (row >= p.height || first >= p.width) return;

    const Source y = source(row - p.top, p.frame_height, p.row_scale);
    int64_t low[kColumns], high[kColumns];
    float right[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const Source x = source(first + i - p.left, p.frame_width, p.col_scale);
        low[i] = x.low * p.col_stride;
        high[i] = x.high * p.col_stride;
        right[i] = x.weight;
    }

#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
        const In* plane = static_cast<const In*>(p.frames) + blockIdx.z * p.batch_stride + channel * p.channel_stride;
        const In *upper = plane + y.low * p.row_stride, *lower = plane + y.high * p.row_stride;
        float value[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            value[i] = -1.0f;
            if (row < p.top || first + i < p.left || first + i >= p.width) continue;
            const float above = (1.0f - right[i]) * pixel(upper[low[i]]) + right[i] * pixel(upper[high[i]]);
            const float below = (1.0f - right[i]) * pixel(lower[low[i]]) + right[i] * pixel(lower[high[i]]);
            value[i] = ((1.0f - y.weight) * above + y.weight * below) * 2.0f - 1.0f;
        }
        const int64_t out_row = (static_cast<int64_t>(blockIdx.z) * 3 + channel) * p.height + row;
        Out* out = static_cast<Out*>(p.out) + out_row * p.width + first;
        if (wide) {
            store_all(out, value);
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                if (first + i < p.width) store(out + i, value[i]);
        }
    }
}

template <class In, class Out>
void start(const ImagePrep& p, void* stream) {
    const bool wide = p.width % kColumns == 0 && reinterpret_cast<uintptr_t>(p.out) % (kColumns * sizeof(Out)) == 0;
    Grid grid;
    grid.blocks = dim3((p.width + kLanes * kColumns - 1) / (kLanes * kColumns), (p.height + kRows - 1) / kRows, p.batch);
    grid.threads = dim3(kLanes, kRows);
    launch("image_prep", image_prep_fwd_kernel<In, Out>, grid, static_cast<cudaStream_t>(stream), p, wide);
}

template <class In>
void start(const ImagePrep& p, void* stream) {
    switch (p.out_dtype) {
        case DType::float32: return start<In, float>(p, stream);
        case DType::bfloat16: return start<In, bf16>(p, stream);
        case DType::float16: return start<In, fp16>(p, stream);
        default: throw std::invalid_argument("image_prep: the result is no float");
    }
}

}  // namespace

void image_prep(const ImagePrep& p, void* stream) {
    switch (p.frames_dtype) {
        case DType::float32: return start<float>(p, stream);
        case DType::bfloat16: return start<bf16>(p, stream);
        case DType::float16: return start<fp16>(p, stream);
        case DType::uint8: return start<uint8_t>(p, stream);
    }
    throw std::invalid_argument("image_prep: unknown dtype");
}

}  // namespace smolvla::cuda
