// The linear kernel of many rows for one instruction level. No include guard: see each_level.h.
//
// Weights of a group of outputs are packed into panels, once for all the rows that a thread meets. A block of rows and words
// of x stays in L2 while panels pass by.

namespace SMOLVLA_LEVEL_NAMESPACE {

// Rows of x as words of fp32 or of pairs of T, normalised where there is a weight for that.
template <bool kPairs, class X, class T>
SMOLVLA_TARGET void prepare_words(const X* x, const float* norm_weight, float eps, int64_t rows, int64_t inputs,
                                  int64_t words, T* row, float* to) {
    for (int64_t r = 0; r < rows; ++r, x += inputs, to += words) {
        prepare_rows(x, norm_weight, eps, 1, inputs, row);
        if constexpr (kPairs) {
            to[words - 1] = 0.0f;
            std::memcpy(to, row, inputs * sizeof(T));
        } else {
            for (int64_t i = 0; i < inputs; ++i) to[i] = load(row + i);
        }
    }
}

// Ranges of the flat list (group of outputs, block of rows).
template <bool kPairs, class X, class T, class Out>
SMOLVLA_TARGET void run_panels(const Linear& a, Ranges& ranges) {
    int64_t begin, end;
    if (!ranges.next(begin, end)) return;
    const int64_t words = ceil_div(a.inputs, kPairs ? 2 : 1), block = block_rows(a), blocks = ceil_div(a.rows, block);
    const int64_t group = group_outputs(a), packed_words = group * words, products = a.up_weight ? 2 : 1;
    const bool prepared = a.norm_weight || sizeof(X) != sizeof(float) || sizeof(T) != sizeof(float);
    float* const packed = Scratch::reserve(products * (packed_words + block * group) +
                                           (prepared ? block * words + a.inputs : 0));
    float* const c = packed + products * packed_words;
    float* const h = c + products * block * group;
    const T* const weights[] = {static_cast<const T*>(a.weight), static_cast<const T*>(a.up_weight)};
    int64_t packed_out = -1;
    do for (; begin < end; ++begin) {
        const int64_t out = begin / blocks * group, outs = std::min(group, a.outputs - out);
        const int64_t row = begin % blocks * block, rows = std::min(block, a.rows - row);
        if (out != packed_out)
            for (int64_t p = 0; p < products; ++p)
                for (int64_t at = 0; at < outs; at += kPanel)
                    pack_panel<kPairs>(weights[p] + (out + at) * a.inputs, a.inputs, std::min<int64_t>(outs - at, kPanel),
                                       a.inputs, packed + p * packed_words + at * words);
        packed_out = out;
        const X* const from = static_cast<const X*>(a.x) + row * a.inputs;
        const float* x = h;
        if (prepared)
            prepare_words<kPairs>(from, static_cast<const float*>(a.norm_weight), a.eps, rows, a.inputs, words,
                                  reinterpret_cast<T*>(h + block * words), h);
        else x = reinterpret_cast<const float*>(from);
        for (int64_t w = 0; w < words; w += kBlockWords)
            for (int64_t p = 0; p < products; ++p)
                for (int64_t at = 0; at < outs; at += kPanel)
                    product<kPairs>(x + w, words, rows, packed + p * packed_words + at * words + w * kPanel, kPanel,
                                    std::min(words - w, kBlockWords), kSumWords, c + p * block * group + at, group,
                                    ceil_div(outs - at, kWidth), w > 0);
        for (int64_t r = 0; r < rows; ++r)
            finish_row<T, Out>(a, row + r, out, outs, c + r * group, c + (block + r) * group);
    }
    while (ranges.next(begin, end));
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
