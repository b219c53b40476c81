#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace smolvla::cuda {

struct ImagePrep {
    const void* frames;  // [batch, 3, frame_height, frame_width]; the strides are in elements, of any order
    DType frames_dtype;  // bytes are read as x / 255
    void* out;           // [batch, 3, height, width], contiguous
    DType out_dtype;     // not uint8
    int batch, frame_height, frame_width;
    int height, width;
    int left, top;               // of the padding
    float row_scale, col_scale;  // source pixels a target pixel
    int64_t batch_stride, channel_stride, row_stride, col_stride;
};

// out = 2 * pad(resize(frames)) - 1: bilinear, -1 left of column `left` and above row `top`; fp32, rounded once.
void image_prep(const ImagePrep& p, void* stream);

}  // namespace smolvla::cuda
