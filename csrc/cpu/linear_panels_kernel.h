// The linear kernel of many rows for one instruction level with 16 registers. No include guard: see each_level.h.
//
// Weights of a group of outputs are packed into panels, once for all the rows that a thread meets. A block of rows and
// inputs of x stays in L2 while panels pass by.

namespace SMOLVLA_LEVEL_NAMESPACE {

// h as the kernel of many rows reads it: rows [begin, end), rounded to T, in fp32.
template <class X, class T>
SMOLVLA_TARGET void widen_rows(const Linear& a, int64_t begin, int64_t end, float* h) {
    T* const rounded = reinterpret_cast<T*>(Scratch::reserve(a.inputs));
    for (int64_t row = begin; row < end; ++row) {
        prepare_rows(static_cast<const X*>(a.x) + row * a.inputs, static_cast<const float*>(a.norm_weight), a.eps, 1,
                     a.inputs, a.inputs, rounded);
        for (int64_t i = 0; i < a.inputs; ++i) h[row * a.inputs + i] = load(rounded + i);
    }
}

// Ranges of the flat list (group of outputs, block of rows); h is x in fp32, normalised.
template <class T, class Out>
SMOLVLA_TARGET void run_panels(const Linear& a, const float* h, Ranges& ranges) {
    int64_t begin, end;
    if (!ranges.next(begin, end)) return;
    const int64_t block = block_rows(a), blocks = ceil_div(a.rows, block), group = group_outputs(a);
    const int64_t packed_words = group * a.inputs, sum_words = block * group, products = a.up_weight ? 2 : 1;
    float* const packed = Scratch::reserve(products * (packed_words + sum_words));
    float* const c = packed + products * packed_words;
    const T* const weights[] = {static_cast<const T*>(a.weight), static_cast<const T*>(a.up_weight)};
    int64_t packed_out = -1;
    do for (; begin < end; ++begin) {
        const int64_t out = begin / blocks * group, outs = std::min(group, a.outputs - out);
        const int64_t row = begin % blocks * block, rows = std::min(block, a.rows - row);
        if (out != packed_out)
            for (int64_t p = 0; p < products; ++p)
                for (int64_t at = 0; at < outs; at += kPanel)
                    pack_panel<false>(weights[p] + (out + at) * a.inputs, a.inputs, outs - at, a.inputs,
                                      packed + p * packed_words + at * a.inputs);
        packed_out = out;
        for (int64_t i = 0; i < a.inputs; i += kBlockInputs)
            for (int64_t p = 0; p < products; ++p)
                for (int64_t at = 0; at < outs; at += kPanel)
                    product<false>(h + row * a.inputs + i, a.inputs, rows,
                                   packed + p * packed_words + at * a.inputs + i * kPanel, kPanel,
                                   std::min(a.inputs - i, kBlockInputs), kSumInputs, c + p * sum_words + at, group,
                                   ceil_div(outs - at, kWidth), i > 0);
        for (int64_t r = 0; r < rows; ++r)
            finish_row<T, Out>(a, row + r, out, outs, c + r * group, c + sum_words + r * group);
    }
    while (ranges.next(begin, end));
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
