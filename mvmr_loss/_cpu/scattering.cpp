// The scattering transform of float32 images on a CPU. Its plain definition is in scattering.py.
//
// Eight angles are worked on at once, one in each lane of a vector: an FFT of eight fields is that
// of one field with vectors for numbers, which needs no shuffling whatever its length. A column goes
// from its FFT through the modulus to the low-pass without leaving the cache.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

typedef std::int64_t Index;

constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

struct Complex {
    Lanes re, im;
};

inline Complex operator+(const Complex& a, const Complex& b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(const Complex& a, const Complex& b) { return {a.re - b.re, a.im - b.im}; }

// As in scattering.py: what is below this fraction of the peak is under float32's rounding error.
constexpr float kNegligible = 1e-9f;

// An FFT of one length by Stockham's method, which sorts itself, with radices 4, 2 and odd primes.
class Fft {
  public:
    explicit Fft(int length) : length_(length) {
        int rest = length;
        for (int radix = 4; rest > 1; radix = radix == 4 ? 2 : radix == 2 ? 3 : radix + 2) {
            for (; rest % radix == 0; rest /= radix) add_stage(radix, rest);
        }
    }

    // Transforms x with y as working space, both overwritten, and returns the one that holds the
    // result. The sign is the exponent's; nothing is divided by the length.
    template <int sign>
    Complex* run(Complex* x, Complex* y) const {
        int length = length_, stride = 1;
        for (const Stage& stage : stages_) {
            switch (stage.radix) {
                case 2: radix_2<sign>(stage, length, stride, x, y); break;
                case 3: radix_odd<sign, 3>(stage, length, stride, x, y); break;
                case 4: radix_4<sign>(stage, length, stride, x, y); break;
                case 5: radix_odd<sign, 5>(stage, length, stride, x, y); break;
                case 7: radix_odd<sign, 7>(stage, length, stride, x, y); break;
                case 11: radix_odd<sign, 11>(stage, length, stride, x, y); break;
                case 13: radix_odd<sign, 13>(stage, length, stride, x, y); break;
                default: radix_odd<sign, 0>(stage, length, stride, x, y);
            }
            length /= stage.radix;
            stride *= stage.radix;
            std::swap(x, y);
        }
        return x;
    }

  private:
    struct Stage {
        int radix;
        std::vector<float> twiddles;  // for each p < length / radix, radix - 1 pairs (cos, sin)
        std::vector<float> roots;     // of an odd radix, (radix / 2)^2 pairs
    };

    void add_stage(int radix, int length) {
        Stage stage{radix, {}, {}};
        for (int p = 0; p < length / radix; ++p)
            for (int k = 1; k < radix; ++k) append_root(stage.twiddles, Index(p) * k, length);
        if (radix % 2)
            for (int k = 1; k <= radix / 2; ++k)
                for (int j = 1; j <= radix / 2; ++j) append_root(stage.roots, j * k % radix, radix);
        stages_.push_back(stage);
    }

    static void append_root(std::vector<float>& roots, Index numerator, int denominator) {
        const double angle = 2 * 3.14159265358979323846 * numerator / denominator;
        roots.push_back(static_cast<float>(std::cos(angle)));
        roots.push_back(static_cast<float>(std::sin(angle)));
    }

    template <int sign>
    static Complex turned(const Complex& z, const float* root) {
        const float c = root[0], s = sign * root[1];
        return {z.re * c - z.im * s, z.re * s + z.im * c};
    }

    template <int sign>
    static void radix_2(const Stage& stage, int length, int stride, const Complex* x, Complex* y) {
        const int m = length / 2;
        for (int p = 0; p < m; ++p)
            for (int q = 0; q < stride; ++q) {
                const Complex a = x[q + stride * p], b = x[q + stride * (p + m)];
                Complex* out = y + q + stride * 2 * p;
                out[0] = a + b;
                out[stride] = turned<sign>(a - b, &stage.twiddles[2 * p]);
            }
    }

    template <int sign>
    static void radix_4(const Stage& stage, int length, int stride, const Complex* x, Complex* y) {
        const int m = length / 4;
        for (int p = 0; p < m; ++p) {
            const float* w = &stage.twiddles[6 * p];
            for (int q = 0; q < stride; ++q) {
                const Complex a = x[q + stride * p], b = x[q + stride * (p + m)];
                const Complex c = x[q + stride * (p + 2 * m)], d = x[q + stride * (p + 3 * m)];
                const Complex even = a + c, odd = a - c, sum = b + d, difference = b - d;
                const Complex turn = {difference.im * float(-sign), difference.re * float(sign)};
                Complex* out = y + q + stride * 4 * p;
                out[0] = even + sum;
                out[stride] = turned<sign>(odd + turn, w);
                out[2 * stride] = turned<sign>(even - sum, w + 2);
                out[3 * stride] = turned<sign>(odd - turn, w + 4);
            }
        }
    }

    // A radix that is known to the compiler is faster; 0 stands for any.
    template <int sign, int known_radix>
    static void radix_odd(const Stage& stage, int length, int stride, const Complex* x, Complex* y) {
        const int radix = known_radix ? known_radix : stage.radix, half = radix / 2;
        const int m = length / radix;
        Complex fixed[known_radix ? known_radix : 1];
        std::vector<Complex> grown(known_radix ? 0 : radix);
        Complex* sums = known_radix ? fixed : grown.data();
        Complex* differences = sums + half;
        for (int p = 0; p < m; ++p) {
            const float* w = stage.twiddles.data() + 2 * (radix - 1) * p;
            for (int q = 0; q < stride; ++q) {
                const Complex first = x[q + stride * p];
                Complex total = first;
                for (int j = 0; j < half; ++j) {
                    const Complex a = x[q + stride * (p + m * (j + 1))];
                    const Complex b = x[q + stride * (p + m * (radix - j - 1))];
                    sums[j] = a + b;
                    differences[j] = a - b;
                    total = total + sums[j];
                }
                Complex* out = y + q + stride * radix * p;
                out[0] = total;
                for (int k = 1; k <= half; ++k) {
                    const float* root = &stage.roots[2 * half * (k - 1)];
                    Complex even = first, odd = {};
                    for (int j = 0; j < half; ++j) {
                        const float c = root[2 * j], s = sign * root[2 * j + 1];
                        even.re += sums[j].re * c;
                        even.im += sums[j].im * c;
                        odd.re -= differences[j].im * s;
                        odd.im += differences[j].re * s;
                    }
                    out[stride * k] = turned<sign>(even + odd, w + 2 * (k - 1));
                    out[stride * (radix - k)] = turned<sign>(even - odd, w + 2 * (radix - k - 1));
                }
            }
        }
    }

    int length_;
    std::vector<Stage> stages_;
};

// The low-pass of one axis: a circular convolution of which every step-th sample is kept.
class LowPass {
  public:
    // kernel: one period, with its peak first; size: number of samples kept, the first at step.
    LowPass(const float* kernel, int length, int size, int step)
        : length_(length), size_(size), step_(step), reach_(length / 2) {
        while (reach_ > 1 && std::fabs(kernel[reach_ - 1]) <= kNegligible * kernel[0]) --reach_;
        for (int i = -reach_; i < reach_; ++i) taps_.push_back(kernel[i < 0 ? i + length : i]);
    }

    // Where the period begins in an array with room for what continues it on both sides.
    Lanes* period(Lanes* x) const { return x + reach_; }

    // Calls write(i, sample) for all samples of the array whose period is filled.
    template <typename Write>
    void run(Lanes* x, Write write) const {
        for (int i = 0; i < reach_; ++i) {
            x[i] = x[i + length_];
            x[i + reach_ + length_] = x[i + reach_];
        }
        int i = 0;
        for (; i + kBlock <= size_; i += kBlock) run_block<kBlock>(x, i, write);
        for (; i < size_; ++i) run_block<1>(x, i, write);
    }

  private:
    static constexpr int kBlock = 4;  // several sums at once keep the arithmetic units busy

    template <int block, typename Write>
    void run_block(const Lanes* x, int i, Write write) const {
        const Lanes* start = x + (i + 1) * step_;
        Lanes sums[block] = {};
        for (std::size_t t = 0; t < taps_.size(); ++t)
            for (int b = 0; b < block; ++b) sums[b] += start[b * step_ + t] * taps_[t];
        for (int b = 0; b < block; ++b) write(i + b, sums[b]);
    }

    int length_, size_, step_, reach_;
    std::vector<float> taps_;
};

struct Sizes {
    int height, width;          // of the padded image
    int out_height, out_width;  // of the coefficients
    int J, L, max_order;
};

class Scatterer {
  public:
    Scatterer(const Sizes& s, const float* const* image_wavelets,
              const float* const* field_wavelets, const float* const* row_kernels,
              const float* const* column_kernels)
        : s_(s), groups_((s.L + kLanes - 1) / kLanes) {
        for (int j = 0; j < s.J; ++j) {
            along_rows_.emplace_back(s.width >> j);
            along_columns_.emplace_back(s.height >> j);
            const int step = 1 << (s.J - j);
            low_rows_.emplace_back(row_kernels[j], s.width >> j, s.out_width, step);
            low_columns_.emplace_back(column_kernels[j], s.height >> j, s.out_height, step);
            of_image_.emplace_back(image_wavelets[j], 0, j, groups_ * kLanes, true, s);
            for (int j2 = 0; j2 < s.J; ++j2)
                of_fields_.emplace_back(j2 > j ? field_wavelets[j * s.J + j2] : nullptr, j, j2, s.L,
                                        false, s);
        }
        paths_ = 1 + s.J * s.L + (s.max_order == 2 ? s.J * (s.J - 1) / 2 * s.L * s.L : 0);
    }

    // Working space of one thread.
    class Space {
      public:
        explicit Space(const Sizes& s)
            : field(Index(s.height) * s.width),
              spectrum(s.max_order == 2 && s.J > 1 ? Index(s.height) * (s.width / 2 + 1) : 0),
              line(std::max(s.height, s.width)),
              other(line.size()),
              modulus(spectrum.empty() ? 0 : field.size()),
              blurred(Index(s.out_height) * s.width),
              extended(2 * line.size()) {}

        std::vector<Complex> field, spectrum, line, other;
        std::vector<Lanes> modulus, blurred, extended;
    };

    // spectra: (count, height, width, 2), of the padded images. out: (count, paths, out_height,
    // out_width), of which order 0 is left as it is.
    void run(const float* spectra, float* out, Index count, int threads) {
        std::vector<std::unique_ptr<Space>> spaces;
        while (Index(spaces.size()) < std::max<Index>(1, std::min<Index>(threads, count)))
            spaces.push_back(take_space());
#pragma omp parallel num_threads(int(spaces.size()))
        {
            Space& space = *spaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
            for (Index i = 0; i < count; ++i)
                run_one(spectra + i * 2 * s_.height * s_.width, out + i * paths_ * area(), space);
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto& space : spaces) idle_.push_back(std::move(space));
    }

  private:
    // The wavelets of scale j, for fields of resolution 2^-i.
    struct Wavelets {
        // weights: (L, height, width), or for the image (groups, height, width, lanes).
        Wavelets(const float* weights, int i, int j, int angles, bool in_lanes, const Sizes& s)
            : weights(weights), height(s.height >> j), width(s.width >> j), row(s.width >> i) {
            if (!weights) return;
            area = Index(s.height >> i) * row;
            const int step = 1 << (j - i);
            const int lanes = in_lanes ? kLanes : 1;
            std::vector<float> peaks;
            for (int a = 0; a < step * step; ++a) {
                float peak = 0;
                for (int angle = 0; angle < angles / lanes; ++angle)
                    for (int y = 0; y < height; ++y) {
                        const float* w = weights + lanes * (angle * area + start(a, step) + y * row);
                        for (int x = 0; x < lanes * width; ++x) peak = std::max(peak, std::fabs(w[x]));
                    }
                peaks.push_back(peak);
            }
            const float highest = *std::max_element(peaks.begin(), peaks.end());
            for (int a = 0; a < step * step; ++a)
                if (peaks[a] > kNegligible * highest) aliases.push_back(start(a, step));
        }

        Index start(int alias, int step) const {
            return Index(alias / step) * height * row + Index(alias % step) * width;
        }

        const float* weights;
        int height, width;           // of the subsampled field
        int row;                     // of the spectrum
        Index area = 0;              // of the spectrum
        std::vector<Index> aliases;  // where the blocks begin that fall on each other
    };

    // Space is kept from call to call: fresh memory would cost a good part of the work.
    std::unique_ptr<Space> take_space() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) return std::make_unique<Space>(s_);
        std::unique_ptr<Space> space = std::move(idle_.back());
        idle_.pop_back();
        return space;
    }

    Index area() const { return Index(s_.out_height) * s_.out_width; }

    void run_one(const float* spectrum, float* out, Space& t) const {
        Index second_order = 1 + s_.J * s_.L;
        for (int j1 = 0; j1 < s_.J; ++j1) {
            const int coarser = s_.J - 1 - j1;
            const bool more = s_.max_order == 2 && coarser > 0;
            const Index paths = Index(coarser) * s_.L;  // of order 2 for each first wavelet
            for (int group = 0; group < groups_; ++group) {
                const int theta_1 = group * kLanes, lanes = std::min(kLanes, s_.L - theta_1);
                multiply_image(spectrum, of_image_[j1], group, t.field.data());
                float* first = out + (1 + j1 * s_.L + theta_1) * area();
                finish(j1, t, more, first, area(), lanes);
                if (!more) continue;
                transform_modulus(j1, t);
                float* second = out + (second_order + theta_1 * paths) * area();
                for (int j2 = j1 + 1; j2 < s_.J; ++j2)
                    for (int theta_2 = 0; theta_2 < s_.L; ++theta_2, second += area()) {
                        multiply_fields(t.spectrum.data(), of_fields_[j1 * s_.J + j2], theta_2,
                                        t.field.data());
                        finish(j2, t, false, second, paths * area(), lanes);
                    }
            }
            if (more) second_order += s_.L * paths;
        }
    }

    // One spectrum by the wavelets of eight angles, folded.
    static void multiply_image(const float* spectrum, const Wavelets& v, int group, Complex* field) {
        const Lanes* weights = reinterpret_cast<const Lanes*>(v.weights) + group * v.area;
        for (int y = 0; y < v.height; ++y)
            for (int x = 0; x < v.width; ++x) {
                Complex sum = {};
                for (const Index alias : v.aliases) {
                    const Index i = alias + Index(y) * v.row + x;
                    sum.re += weights[i] * spectrum[2 * i];
                    sum.im += weights[i] * spectrum[2 * i + 1];
                }
                field[Index(y) * v.width + x] = sum;
            }
    }

    // Eight spectra, as transform_modulus leaves them, by the wavelet of one angle, folded.
    void multiply_fields(const Complex* spectrum, const Wavelets& v, int theta,
                         Complex* field) const {
        const int rows = int(v.area / v.row), half = v.row / 2 + 1;
        for (int y = 0; y < v.height; ++y) {
            Complex* out = field + Index(y) * v.width;
            std::fill(out, out + v.width, Complex{});
            for (const Index alias : v.aliases) {
                const int row = int(alias / v.row) + y, column = int(alias % v.row);
                const float* w = v.weights + theta * v.area + Index(row) * v.row + column;
                if (column < v.row / 2) {
                    const Complex* in = spectrum + Index(row) * half + column;
                    for (int x = 0; x < v.width; ++x) {
                        out[x].re += in[x].re * w[x];
                        out[x].im += in[x].im * w[x];
                    }
                } else {
                    const Complex* in = spectrum + Index(row ? rows - row : 0) * half + v.row - column;
                    for (int x = 0; x < v.width; ++x) {
                        out[x].re += in[-x].re * w[x];
                        out[x].im -= in[-x].im * w[x];
                    }
                }
            }
        }
    }

    // From the spectra in t.field, at resolution 2^-j, to the low-passed moduli, lane by lane to
    // out; the moduli stay in t.modulus if they are kept.
    void finish(int j, Space& t, bool keep, float* out, Index lane_step, int lanes) const {
        const int height = s_.height >> j, width = s_.width >> j;
        Complex *field = t.field.data(), *line = t.line.data(), *other = t.other.data();
        for (int y = 0; y < height; ++y) {
            Complex* row = field + Index(y) * width;
            const Complex* result = along_rows_[j].run<1>(row, other);
            if (result != row) std::copy(result, result + width, row);
        }
        Lanes* extended = t.extended.data();
        Lanes* moduli = low_columns_[j].period(extended);
        for (int x = 0; x < width; ++x) {
            for (int y = 0; y < height; ++y) line[y] = field[Index(y) * width + x];
            const Complex* z = along_columns_[j].run<1>(line, other);
            for (int y = 0; y < height; ++y) {
                Lanes modulus = z[y].re * z[y].re + z[y].im * z[y].im;
                for (int l = 0; l < kLanes; ++l) modulus[l] = std::sqrt(modulus[l]);
                moduli[y] = modulus;
                if (keep) t.modulus[Index(y) * width + x] = modulus;
            }
            low_columns_[j].run(extended, [&](int i, const Lanes& sample) {
                t.blurred[Index(i) * width + x] = sample;
            });
        }
        for (int i = 0; i < s_.out_height; ++i) {
            const Lanes* row = t.blurred.data() + Index(i) * width;
            std::copy(row, row + width, low_rows_[j].period(extended));
            low_rows_[j].run(extended, [&](int k, const Lanes& sample) {
                for (int l = 0; l < lanes; ++l)
                    out[l * lane_step + Index(i) * s_.out_width + k] = sample[l];
            });
        }
    }

    // The spectra of the real fields in t.modulus, at resolution 2^-j, into t.spectrum: the columns
    // 0 ... width / 2, of which the others are the mirror image.
    void transform_modulus(int j, Space& t) const {
        const int height = s_.height >> j, width = s_.width >> j;
        Complex *field = t.field.data(), *line = t.line.data(), *other = t.other.data();
        // Two real rows make one complex row, whose spectrum's even and odd parts are theirs.
        for (int y = 0; y < height; y += 2) {
            const Lanes* upper = t.modulus.data() + Index(y) * width;
            const Lanes* lower = upper + width;
            for (int x = 0; x < width; ++x) line[x] = {upper[x], lower[x]};
            const Complex* z = along_rows_[j].run<-1>(line, other);
            Complex* first = field + Index(y) * width;
            Complex* second = first + width;
            for (int k = 0; k <= width / 2; ++k) {
                const Complex a = z[k], b = z[k ? width - k : 0];
                first[k] = {(a.re + b.re) * 0.5f, (a.im - b.im) * 0.5f};
                second[k] = {(a.im + b.im) * 0.5f, (b.re - a.re) * 0.5f};
            }
        }
        for (int k = 0; k <= width / 2; ++k) {
            for (int y = 0; y < height; ++y) line[y] = field[Index(y) * width + k];
            const Complex* z = along_columns_[j].run<-1>(line, other);
            for (int y = 0; y < height; ++y) t.spectrum[Index(y) * (width / 2 + 1) + k] = z[y];
        }
    }

    Sizes s_;
    int groups_, paths_;
    std::vector<Fft> along_rows_, along_columns_;
    std::vector<LowPass> low_rows_, low_columns_;
    std::vector<Wavelets> of_image_, of_fields_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Space>> idle_;
};

}  // namespace

// The filters' memory is the caller's, and stays in use until the scatterer is deleted.
extern "C" void* scatterer_new(const int* sizes, const float* const* image_wavelets,
                               const float* const* field_wavelets,
                               const float* const* row_kernels,
                               const float* const* column_kernels) {
    try {
        const Sizes s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
        return new Scatterer(s, image_wavelets, field_wavelets, row_kernels, column_kernels);
    } catch (const std::exception&) {
        return nullptr;
    }
}

extern "C" void scatterer_delete(void* scatterer) { delete static_cast<Scatterer*>(scatterer); }

// Returns 0, or 1 where there is no memory for the work.
extern "C" int scatterer_run(void* scatterer, const float* spectra, float* out,
                             std::int64_t count, int threads) {
    try {
        static_cast<Scatterer*>(scatterer)->run(spectra, out, count, threads);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}
