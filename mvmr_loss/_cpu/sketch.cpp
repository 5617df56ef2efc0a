// The folded sign sketch of float32 features on a CPU. Its plain definition is in sketch.py.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace {

typedef std::int64_t Index;

constexpr Index kRows = 4;  // that meet a slice of the signs while it is in the cache

}  // namespace

// x: rows `stride` apart, each of `width` features. out: (rows, dim). Every column is summed in the order
// of the slices. Returns 0, or 1 where there is no memory for the work.
extern "C" int folded_sign_sketch(const float* x, Index rows, Index width, Index stride,
                                  const float* signs, const Index* rotations, Index dim, float* out,
                                  int threads) {
    try {
        const Index groups = (rows + kRows - 1) / kRows;
        // Twice as wide as the sketch, so that a rotated slice is added in one piece.
        std::vector<float> space(groups * kRows * 2 * dim);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (Index group = 0; group < groups; ++group) {
            const Index first = group * kRows, last = std::min(first + kRows, rows);
            for (Index start = 0; start < width; start += dim) {
                const Index length = std::min(dim, width - start);
                const float* sign = signs + start;
                for (Index i = first; i < last; ++i) {
                    const float* in = x + i * stride + start;
                    float* sums = space.data() + i * 2 * dim + rotations[start / dim];
                    for (Index j = 0; j < length; ++j) sums[j] += in[j] * sign[j];
                }
            }
            for (Index i = first; i < last; ++i) {
                const float* sums = space.data() + i * 2 * dim;
                for (Index j = 0; j < dim; ++j) out[i * dim + j] = sums[j] + sums[j + dim];
            }
        }
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}
