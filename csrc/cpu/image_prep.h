#pragma once

#include <cstdint>

namespace smolvla::cpu {

// y = 2·pad(resize(x)) - 1: bilinear (align_corners = false), resized to [new_height, new_width] at the right and bottom
// edges of [height, width], -1 elsewhere
//   x  [batch, 3, frame_height, frame_width]  X: uint8_t, read as x / 255, or float
//   y  [batch, 3, height, width]  Y: float or bfloat16, contiguous, overlapping nothing
// Of a row of x either the columns of a channel or the channels of a column lie side by side: col_stride is 1, or it is 3
// and channel_stride 1.
// All in fp32, y rounded once; bytes and blending weights have the bits of F.interpolate, values are blended between rows
// before columns. A frame of the result's own size is not blended. Equal bits at every level.
struct ImagePrep {
    const void* x;
    void* y;
    int64_t batch, frame_height, frame_width, height, width, new_height, new_width;
    int64_t batch_stride, channel_stride, row_stride, col_stride;
};

template <class X, class Y>
void image_prep(const ImagePrep& a, int num_threads);

}  // namespace smolvla::cpu
