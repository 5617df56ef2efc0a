// The Gram matrix of the rows of a float32 matrix about their mean, and products with those rows, on a
// CPU. What they are for is in matrices.py.
//
// Of the symmetric Gram matrix only the lower half is computed. The columns are read in slices that stay
// in the cache: their means and largest magnitude, then the rows about the mean, in panels of a few rows
// with the columns one after the other, then the products of the panels.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

namespace {

typedef std::int64_t Index;

constexpr int kLanes = 8;
constexpr int kVectors = 3;                // of columns of a tile of the result
constexpr int kPanel = kVectors * kLanes;  // rows of a panel
constexpr int kTile = 4;                   // rows of a tile of the result
constexpr int kColumns = 128;              // of a slice

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef std::int32_t Bits __attribute__((vector_size(4 * kLanes)));

inline Lanes load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }

inline Lanes in_register(Lanes x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#endif
    return x;
}

// Adds the products of `vectors` vectors with kTile numbers, over `count` steps, to sums.
template <int vectors>
inline void multiply(const float* a, Index a_step, const Lanes* b, Index b_step, Index count,
                     Lanes (&sums)[kTile][kVectors]) {
    for (Index k = 0; k < count; ++k, a += a_step, b += b_step) {
        // Compilers read them anew for each product otherwise, and reading is what is scarce.
        const Lanes b0 = in_register(b[0]);
        const Lanes b1 = vectors > 1 ? in_register(b[1]) : b0;
        const Lanes b2 = vectors > 2 ? in_register(b[2]) : b0;
        for (int i = 0; i < kTile; ++i) {
            sums[i][0] += b0 * a[i];
            if (vectors > 1) sums[i][1] += b1 * a[i];
            if (vectors > 2) sums[i][2] += b2 * a[i];
        }
    }
}

// Working space and sums of one thread.
class Worker {
  public:
    explicit Worker(Index rows)
        : rows_(rows),
          padded_((rows + kPanel - 1) / kPanel * kPanel),
          sums_(padded_ * padded_ / kLanes),
          packed_(padded_ * kColumns / kLanes) {}

    // x: the first of `columns` columns, at most kColumns, of rows `stride` apart.
    void add(const float* x, Index stride, int columns) {
        float mean[kColumns];
        look(x, stride, columns, mean);
        pack(x, stride, columns, mean);
        for (Index column = 0; column < rows_; column += kPanel) {
            for (Index row = column; row < rows_; row += kTile) {
                switch (std::min<Index>((row - column) / kLanes + 1, kVectors)) {
                    case 1: tile<1>(row, column, columns); break;
                    case 2: tile<2>(row, column, columns); break;
                    default: tile<kVectors>(row, column, columns);
                }
            }
        }
    }

    // Makes everything as it was at first.
    void reset() {
        std::fill(sums_.begin(), sums_.end(), Lanes{});
        peak_ = Bits{};
        peak_rest_ = 0;
    }

    // Adds what another worker has found.
    void merge(const Worker& other) {
        for (Index row = 0; row < rows_; ++row)
            for (Index i = row * padded_ / kLanes; i <= (row * padded_ + row) / kLanes; ++i)
                sums_[i] += other.sums_[i];
        peak_ = other.peak_ > peak_ ? other.peak_ : peak_;
        peak_rest_ = std::max(peak_rest_, other.peak_rest_);
    }

    // Writes the result with both of its halves.
    void write(float* out, int threads) const {
        const float* sums = reinterpret_cast<const float*>(sums_.data());
        constexpr Index block = 16;  // of columns, so that what is read stays in the cache
#pragma omp parallel for schedule(static) num_threads(threads)
        for (Index first = 0; first < rows_; first += block)
            for (Index i = 0; i < rows_; ++i)
                for (Index j = first; j < std::min(first + block, rows_); ++j)
                    out[i * rows_ + j] = sums[std::max(i, j) * padded_ + std::min(i, j)];
    }

    Index rows() const { return rows_; }

    std::int32_t peak() const {
        std::int32_t peak = peak_rest_;
        for (int l = 0; l < kLanes; ++l) peak = std::max(peak, peak_[l]);
        return peak;
    }

  private:
    void look(const float* x, Index stride, int columns, float* mean) {
        std::fill(mean, mean + columns, 0.0f);
        const int whole = columns / kLanes * kLanes;
        for (Index i = 0; i < rows_; ++i, x += stride) {
            for (int k = 0; k < whole; k += kLanes) {
                const Lanes value = load(x + k);
                *reinterpret_cast<Unaligned*>(mean + k) += value;
                const Bits magnitude = reinterpret_cast<Bits>(value) & 0x7fffffff;
                peak_ = magnitude > peak_ ? magnitude : peak_;
            }
            for (int k = whole; k < columns; ++k) {
                mean[k] += x[k];
                std::int32_t bits;
                std::memcpy(&bits, x + k, sizeof bits);
                peak_rest_ = std::max(peak_rest_, bits & 0x7fffffff);
            }
        }
        for (int k = 0; k < columns; ++k) mean[k] /= float(rows_);
    }

    void pack(const float* x, Index stride, int columns, const float* mean) {
        float* panel = reinterpret_cast<float*>(packed_.data());
        for (Index start = 0; start < rows_; start += kPanel, panel += kPanel * kColumns)
            for (int group = 0; group < kPanel; group += kLanes)
                pack_rows(x + (start + group) * stride, stride,
                          std::max<Index>(0, std::min<Index>(kLanes, rows_ - start - group)),
                          columns, mean, panel + group);
    }

    static void pack_rows(const float* x, Index stride, Index rows, int columns, const float* mean,
                          float* out) {
        int k = 0;
        if (rows == kLanes) {
            for (; k + kLanes <= columns; k += kLanes) {
                Lanes v[kLanes];
                const Lanes m = load(mean + k);
                for (int i = 0; i < kLanes; ++i) v[i] = load(x + i * stride + k) - m;
                transpose(v);
                for (int i = 0; i < kLanes; ++i)
                    *reinterpret_cast<Lanes*>(out + (k + i) * kPanel) = v[i];
            }
        }
        for (; k < columns; ++k)
            for (int i = 0; i < kLanes; ++i)
                out[k * kPanel + i] = i < rows ? x[i * stride + k] - mean[k] : 0.0f;
    }

    // Interleaving the two halves of the rows three times turns row i into column i.
    static void transpose(Lanes* v) {
        for (int pass = 0; pass < 3; ++pass) {
            Lanes t[kLanes];
            for (int i = 0; i < 4; ++i) {
                t[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
                t[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
            }
            std::copy(t, t + kLanes, v);
        }
    }

    template <int vectors>
    void tile(Index row, Index column, int columns) {
        const float* packed = reinterpret_cast<const float*>(packed_.data());
        Lanes sums[kTile][kVectors] = {};
        multiply<vectors>(packed + row / kPanel * kPanel * kColumns + row % kPanel, kPanel,
                          packed_.data() + column * kColumns / kLanes, kVectors, columns, sums);
        for (int i = 0; i < kTile; ++i) {
            Lanes* out = sums_.data() + ((row + i) * padded_ + column) / kLanes;
            for (int v = 0; v < vectors; ++v) out[v] += sums[i][v];
        }
    }

    Index rows_, padded_;
    std::vector<Lanes> sums_, packed_;
    Bits peak_ = {};
    std::int32_t peak_rest_ = 0;
};

// Writes `width` columns about their means, at most kPanel, one panel a row; what is missing is 0.
void center(const float* x, Index rows, Index stride, int width, Lanes* out) {
    Lanes sums[kVectors] = {};
    for (Index i = 0; i < rows; ++i) {
        Lanes* row = out + i * kVectors;
        if (width < kPanel) std::fill(row, row + kVectors, Lanes{});
        std::memcpy(row, x + i * stride, width * sizeof(float));
        for (int v = 0; v < kVectors; ++v) sums[v] += row[v];
    }
    for (int v = 0; v < kVectors; ++v) sums[v] /= float(rows);
    for (Index i = 0; i < rows; ++i)
        for (int v = 0; v < kVectors; ++v) out[i * kVectors + v] -= sums[v];
}

// Workers are kept from call to call: fresh memory would cost a good part of a small product.
constexpr std::size_t kIdle = 16;
constexpr Index kIdleRows = 1024;
std::mutex idle_mutex;
std::vector<std::unique_ptr<Worker>> idle;

std::unique_ptr<Worker> take_worker(Index rows) {
    std::unique_ptr<Worker> worker;
    {
        const std::lock_guard<std::mutex> lock(idle_mutex);
        while (!idle.empty() && !(worker && worker->rows() == rows)) {
            worker = std::move(idle.back());
            idle.pop_back();
        }
    }
    if (!worker || worker->rows() != rows) return std::make_unique<Worker>(rows);
    worker->reset();
    return worker;
}

// Writes the Gram matrix of the rows about their mean, rows x rows, and returns the bits of the largest
// magnitude of x; infinity and NaN have bits above those of any number. The sums depend on the number of
// threads, and on nothing else.
std::int32_t gram(const float* x, Index rows, Index columns, Index stride, float* out, int threads) {
    const Index slices = (columns + kColumns - 1) / kColumns;
    const Index shares = std::max<Index>(1, std::min<Index>(threads, slices));
    std::vector<std::unique_ptr<Worker>> workers;
    while (Index(workers.size()) < shares) workers.push_back(take_worker(rows));
#pragma omp parallel for schedule(static, 1) num_threads(int(shares))
    for (Index share = 0; share < shares; ++share)
        for (Index i = share * slices / shares; i < (share + 1) * slices / shares; ++i)
            workers[share]->add(x + i * kColumns, stride,
                                int(std::min<Index>(kColumns, columns - i * kColumns)));
    for (Index share = 1; share < shares; ++share) workers[0]->merge(*workers[share]);
    workers[0]->write(out, int(shares));
    const std::int32_t peak = workers[0]->peak();
    const std::lock_guard<std::mutex> lock(idle_mutex);
    for (auto& worker : workers)
        if (idle.size() < kIdle && rows <= kIdleRows) idle.push_back(std::move(worker));
    return peak;
}

}  // namespace

// All return 0, or 1 where there is no memory for the work.

extern "C" int centered_gram(const float* x, Index rows, Index columns, Index stride, float* out,
                             std::int32_t* peak, int threads) {
    try {
        *peak = gram(x, rows, columns, stride, out, threads);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// out = weight (x - mean over the rows of x). weight: rows x rows; out: rows x columns.
extern "C" int product_about_mean(const float* weight, const float* x, Index rows, Index columns,
                                  Index stride, float* out, int threads) {
    try {
        const Index tiles = (rows + kTile - 1) / kTile, panels = (columns + kPanel - 1) / kPanel;
        // kTile rows of the weight together, column after column.
        std::vector<float> weights(tiles * kTile * rows);
        for (Index i = 0; i < rows; ++i)
            for (Index k = 0; k < rows; ++k)
                weights[(i / kTile * rows + k) * kTile + i % kTile] = weight[i * rows + k];
        std::vector<std::vector<Lanes>> spaces(std::max<Index>(1, std::min<Index>(threads, panels)),
                                               std::vector<Lanes>(rows * kVectors));
#pragma omp parallel num_threads(int(spaces.size()))
        {
            Lanes* centered = spaces[omp_get_thread_num()].data();
#pragma omp for schedule(static)
            for (Index panel = 0; panel < panels; ++panel) {
                const Index first = panel * kPanel;
                const int width = int(std::min<Index>(kPanel, columns - first));
                center(x + first, rows, stride, width, centered);
                for (Index tile = 0; tile < tiles; ++tile) {
                    Lanes sums[kTile][kVectors] = {};
                    multiply<kVectors>(weights.data() + tile * kTile * rows, kTile, centered,
                                       kVectors, rows, sums);
                    for (Index i = 0; i < std::min<Index>(kTile, rows - tile * kTile); ++i)
                        std::memcpy(out + (tile * kTile + i) * columns + first, sums[i],
                                    width * sizeof(float));
                }
            }
        }
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}
