// csrc/cpu/int8_attention.cpp, and its kernel at a level by number: which level the processor has decides there. Built by
// emulated.py with the other sources; in no wheel.
#include "cpu/int8_attention.cpp"

// Addresses of q, k, v, mask, out, error, spread; sizes and strides as in bindings.cpp.
extern "C" __attribute__((visibility("default"))) void attend_at(int level, const uintptr_t* at, const int64_t* sizes,
                                                                 const int64_t* strides, float scale, float limit,
                                                                 int num_threads) {
    using namespace smolvla::cpu;
    const auto floats = [at](int i) { return reinterpret_cast<float*>(at[i]); };
    Attention a{floats(0), floats(1), floats(2), reinterpret_cast<const uint8_t*>(at[3]), floats(4), sizes[0], sizes[1],
                sizes[2], sizes[3], sizes[4], sizes[5], {}, {}, {}, {}, scale};
    int64_t* const to[] = {a.q_strides, a.k_strides, a.v_strides, a.mask_strides};
    for (int i = 0; i < 4; ++i) std::copy_n(strides + 3 * i, 3, to[i]);
    attend(a, kernel(static_cast<Int8Level>(level)), limit, floats(5), floats(6), num_threads);
}
