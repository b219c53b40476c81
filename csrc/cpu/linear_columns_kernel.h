// The linear kernel that packs x and no weights, fp32 with 16 registers, for one instruction level: made for an action chunk's
// rows; and the run that packs no weights, by it and by lanes. No include guard: see each_level.h.
//
// Rows of x are the columns of panels, and weights are broadcast as they lie: a tile is a sum of outer products, with no
// lanes to be added up. A thread packs x once a call. Weights of a chunk of outputs and a block of inputs stay in L2 while
// panels pass by.

namespace SMOLVLA_LEVEL_NAMESPACE {

static_assert(!kFewRegisters || (kSplit<true> % kTileRows == 0 && kChunk % kTileRows == 0 && kChunk % kWidth == 0),
              "a chunk is whole tiles and whole vectors");

// How many of the first rows are columns: whole panels, and what is left if it is more than a tile of lanes.
constexpr int64_t column_rows(int64_t rows) {
    const int64_t left = rows % kPanel;
    return rows - (left > kRows ? 0 : left);
}

// c[row, 0:outs] = x · wᵀ for a chunk of outputs; `after` is where as many weights begin that are wanted next. `sums` are
// [panel, kChunk, kPanel].
template <class T>
SMOLVLA_TARGET void column_products(const float* panels, int64_t rows, const T* w, int64_t outs, int64_t inputs,
                                    const T* after, float* sums, float* c) {
    const int64_t panels_here = ceil_div(rows, kPanel);
    const char* ahead = reinterpret_cast<const char*>(after);
    for (int64_t i = 0; i < inputs; i += kBlockInputs) {
        // Sums are those of the kernel that packs weights: a row has the same bits by both.
        const int64_t last = std::min(i + kBlockInputs, inputs), in_one_go = sum_inputs(last - i);
        for (int64_t row = 0; row < rows; row += kPanel) {
            const float* const panel = panels + row * inputs;
            const int vectors = static_cast<int>(ceil_div(std::min<int64_t>(rows - row, kPanel), kWidth));
            for (int64_t begin = i; begin < last; begin += in_one_go) {
                const auto some = begin == 0 ? tiles<false, false, true> : tiles<false, true, true>;
                const int64_t here = std::min(in_one_go, last - begin);
                some(w + begin, inputs, outs, panel + begin * kPanel, kPanel, here, sums + row * kChunk, kPanel, vectors, ahead,
                     panels_here);
                ahead += outs * here * static_cast<int64_t>(sizeof(T)) / panels_here;
            }
        }
    }
    for (int64_t row = 0; row < rows; row += kWidth)
        for (int64_t out = 0; out < outs; out += kWidth) {
            V square[kWidth];
            const float* const from = sums + row / kPanel * kPanel * kChunk + out * kPanel + row % kPanel;
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) square[i] = S::load(from + i * kPanel);
            S::transpose(square);
            const int64_t here = std::min<int64_t>(rows - row, kWidth);
            for (int64_t i = 0; i < here; ++i) S::store(c + (row + i) * kChunkStride + out, square[i]);
        }
}

// A range counts splits of the outputs, and is of all rows.
template <bool kPairs, class X, class T, class Out>
SMOLVLA_TARGET void run_unpacked(const Linear& a, Ranges& ranges) {
    int64_t first, last;
    if (!ranges.next(first, last)) return;
    constexpr bool kColumns = kFewRegisters && sizeof(T) == sizeof(float);
    const T *weight = static_cast<const T*>(a.weight), *up_weight = static_cast<const T*>(a.up_weight);
    const float* const norm_weight = static_cast<const float*>(a.norm_weight);
    const int64_t fitting = std::max<int64_t>(kBlockBytes / (a.inputs * static_cast<int64_t>(sizeof(T))), kLeastRows);
    const int64_t block = std::min(fitting / kRows, ceil_div(a.rows, kRows)) * kRows;
    const int64_t parts = ceil_div(a.inputs, kPart), part = ceil_div(ceil_div(a.inputs, parts), 32) * 32;
    const bool prepared = a.norm_weight || sizeof(X) != sizeof(T);
    const bool copied = prepared || parts > 1;
    const bool by_columns = kColumns && a.outputs >= kLeastOutputs && a.rows >= kLeastColumns;
    const int64_t in_panels = by_columns ? ceil_div(block, kPanel) * kPanel : 0;
    float* const c = Scratch::reserve(2 * block * kChunkStride + in_panels * (kChunk + a.inputs) +
                                      (copied ? block * a.inputs : 0));
    float *const up = c + block * kChunkStride, *const sums = up + block * kChunkStride;
    float* const panels = sums + in_panels * kChunk;
    T* const h = reinterpret_cast<T*>(panels + in_panels * a.inputs);
    // Tiles may leave outputs unwritten that whole vectors then read.
    std::fill(c, panels, 0.0f);
    int64_t prepared_row = -1;
    do for (int64_t row = 0; row < a.rows; row += block) {
        const int64_t begin = first * kSplit<kFewRegisters>, end = std::min(last * kSplit<kFewRegisters>, a.outputs);
        const int64_t rows = std::min(a.rows - row, block), columns = by_columns ? column_rows(rows) : 0, left = rows - columns;
        // Every thread prepares all rows for itself: microseconds, where a barrier would cost as much.
        const X* from = static_cast<const X*>(a.x) + row * a.inputs;
        if constexpr (kColumns) {
            const T* x = reinterpret_cast<const T*>(from);
            if (row != prepared_row && prepared) prepare_rows(from, norm_weight, a.eps, columns, a.inputs, a.inputs, h), x = h;
            if (row != prepared_row)
                for (int64_t at = 0; at < columns; at += kPanel)
                    pack_panel<false>(x + at * a.inputs, a.inputs, columns - at, a.inputs, panels + at * a.inputs);
        }
        from += columns * a.inputs;
        const T* x = h;
        if (!copied) x = reinterpret_cast<const T*>(from);
        else if (row != prepared_row) prepare_rows(from, norm_weight, a.eps, left, a.inputs, part, h);
        prepared_row = row;
        const auto products = [&](const T* w, int64_t outs, const T* after, float* c) {
            if constexpr (kColumns)
                if (columns) column_products(panels, columns, w, outs, a.inputs, after, sums, c);
            if (left) lane_products<kPairs>(x, part, left, w, outs, a.inputs, after, c + columns * kChunkStride);
        };
        for (int64_t out = begin; out < end; out += kChunk) {
            const int64_t outs = std::min<int64_t>(end - out, kChunk);
            // The weights to fetch meanwhile: the range's next, else its first for the next block of rows, else those of the
            // next range. Never past the last output.
            int64_t next = out + outs < end ? out + outs : begin;
            if (next == begin && row + block >= a.rows) next = ranges.upcoming() * kSplit<kFewRegisters>;
            const T* const w = weight + out * a.inputs;
            const T* const next_w = weight + std::max<int64_t>(std::min(next, a.outputs - outs), 0) * a.inputs;
            const T* const up_w = up_weight ? up_weight + out * a.inputs : nullptr;
            products(w, outs, up_w ? up_w : next_w, c);
            if (up_w) products(up_w, outs, next_w, up);
            for (int64_t r = 0; r < rows; ++r)
                finish_row<T, Out>(a, row + r, out, outs, c + r * kChunkStride, up + r * kChunkStride);
        }
    } while (ranges.next(first, last));
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
