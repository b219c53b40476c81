// How Python names element types to this library: the place in smolvla_fast.ops.cuda.library.DTYPES, bytes last.
#pragma once

namespace smolvla::cuda {

enum class DType : int { float32, bfloat16, float16, uint8 };

}  // namespace smolvla::cuda
