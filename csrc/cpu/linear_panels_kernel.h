// The linear kernel that packs its weights, fp32, for one instruction level: made for many rows. No include guard: see
// each_level.h.
//
// Weights of a group of outputs are packed into panels, which a thread does once for consecutive blocks of rows. A block of
// rows and inputs of x stays in L2 while panels pass by.

namespace SMOLVLA_LEVEL_NAMESPACE {

// Ranges of the flat list (group of outputs, block of rows); h is x, normalised where there is a weight for that.
template <class T>
SMOLVLA_TARGET void run_panels(const Linear& a, const T* h, Ranges& ranges) {
    static_assert(sizeof(T) == sizeof(float) && kLargeGroup % kPanel == 0 && kGroup % kPanel == 0, "fp32, whole panels");
    int64_t begin, end;
    if (!ranges.next(begin, end)) return;
    const int64_t block = block_rows(a), blocks = ceil_div(a.rows, block), group = group_outputs(a);
    const int64_t packed_words = group * a.inputs, sum_words = block * group, matrices = a.up_weight ? 2 : 1;
    float* const packed = Scratch::reserve(matrices * (packed_words + sum_words));
    float* const c = packed + matrices * packed_words;
    const T* const weights[] = {static_cast<const T*>(a.weight), static_cast<const T*>(a.up_weight)};
    int64_t packed_out = -1;
    do for (; begin < end; ++begin) {
        const int64_t out = begin / blocks * group, outs = std::min(group, a.outputs - out);
        const int64_t row = begin % blocks * block, rows = std::min(block, a.rows - row);
        if (out != packed_out)
            for (int64_t m = 0; m < matrices; ++m)
                for (int64_t at = 0; at < outs; at += kPanel)
                    pack_panel<false>(weights[m] + (out + at) * a.inputs, a.inputs, outs - at, a.inputs,
                                      packed + m * packed_words + at * a.inputs);
        packed_out = out;
        for (int64_t i = 0; i < a.inputs; i += kBlockInputs) {
            const int64_t inputs = std::min(a.inputs - i, kBlockInputs);
            const int64_t in_one_go = sum_inputs(inputs);
            for (int64_t m = 0; m < matrices; ++m)
                for (int64_t at = 0; at < outs; at += kPanel) {
                    // The lines of y, which are written next, while the last products run.
                    if (i + inputs == a.inputs && m + 1 == matrices)
                        for (int64_t r = row; r < row + rows; ++r) {
                            const int64_t to = r * a.outputs + out + at;
                            __builtin_prefetch(static_cast<T*>(a.y) + to, 1, 2);
                            if (a.residual) __builtin_prefetch(static_cast<const T*>(a.residual) + to, 0, 2);
                        }
                    product<false>(h + row * a.inputs + i, a.inputs, rows,
                                   packed + m * packed_words + at * a.inputs + i * kPanel, kPanel,
                                   inputs, in_one_go, c + m * sum_words + at, group, ceil_div(outs - at, kWidth), i > 0);
                }
        }
        for (int64_t r = 0; r < rows; ++r)
            finish_row<T, T>(a, row + r, out, outs, c + r * group, c + sum_words + r * group);
    }
    while (ranges.next(begin, end));
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
