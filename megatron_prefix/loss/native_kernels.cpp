// The elementwise passes of a chunk for the CPU, one row at a time so that it stays in cache.
//
// Same contract as torch_kernels.py: x, y are [rows, n] logits of student and teacher, updated in
// place; see divergence.py for the symbols. Plain C++ with vector extensions and no header of
// torch, so that it compiles in half a second. No -ffast-math: sums must keep their order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int64_t kTile = 2 * kLanes;  // two vectors hide the latency of an addition
constexpr int64_t kBlock = 1024;       // fp32 partial sums go to fp64 this often

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef double WideVec __attribute__((vector_size(8 * kLanes)));

enum Divergence { kReverse, kForward, kJsd };

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline void fetch_to_write(const float* place) { __builtin_prefetch(place, 1, 2); }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline IntVec bits_of(Vec value) {
  IntVec bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) for x <= 0, 0 below the normal range, NaN stays NaN: 2^k times Cephes expf's polynomial.
// Adding 1.5 * 2^23 rounds k to an integer and leaves it in the lowest bits, from where it moves
// into the exponent. ln 2 needs no second part: what its rounding costs grows with k, and an error
// of 1e-7 at x = -20 and 3e-7 at -87 is no more than the sums have.
inline Vec exp_nonpositive(Vec x) {
  const float kLowest = -87.3f, kRoundToInteger = 12582912.f;
  const Vec shifted = x * 1.44269504f + kRoundToInteger, k = shifted - kRoundToInteger;
  const Vec r = x - k * 0.693147181f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec scaled = bits_of(p) + (bits_of(shifted) << 23);
  std::memcpy(&p, &scaled, sizeof p);
  return x < splat(kLowest) ? splat(0.f) : p;
}

// log(1 + u) for 0 <= u <= 1 with full relative precision near 0: the series of 2 atanh(s),
// s = u / (2 + u) <= 1/3.
inline Vec log1p_unit(Vec u) {
  Vec s = u / (u + 2.f), z = s * s;
  Vec p = z * (1.f / 15) + 1.f / 13;
  p = p * z + 1.f / 11;
  p = p * z + 1.f / 9;
  p = p * z + 1.f / 7;
  p = p * z + 1.f / 5;
  p = p * z + 1.f / 3;
  return (p * z + 1.f) * (s + s);
}

// A sum over a row: fp32 within a block, fp64 over blocks.
class RowSum {
 public:
  void add(int which, Vec value) { part_[which] += value; }
  void end_block() {
    total_ += __builtin_convertvector(part_[0] + part_[1], WideVec);
    part_[0] = part_[1] = Vec{};
  }
  double total() const {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total_[lane];
    return sum;
  }

 private:
  Vec part_[2] = {};
  WideVec total_ = {};
};

// Calls pass(which, a, b) on every vector of two rows and writes both back; the last vectors are
// filled up with the given paddings. end_block() runs after each block. With kFetchNext the rows
// that follow these in memory are on their way into the second-level cache meanwhile: a first pass
// would wait for them longer than it computes. (Behind the last row that fetches nothing, in vain.)
template <bool kFetchNext, class Pass, class EndBlock>
inline void walk(float* x, float* y, int64_t n, float pad_x, float pad_y, Pass pass,
                 EndBlock end_block) {
  const int64_t whole = n / kTile * kTile;
  for (int64_t at = 0; at < whole; at += kBlock) {
    const int64_t end = std::min(whole, at + kBlock);
    for (int64_t j = at; j < end; j += kTile) {
      for (int which = 0; which < 2; ++which) {
        float *to_x = x + j + which * kLanes, *to_y = y + j + which * kLanes;
        if (kFetchNext) fetch_to_write(to_x + n), fetch_to_write(to_y + n);
        Vec a = load(to_x), b = load(to_y);
        pass(which, a, b);
        store(to_x, a);
        store(to_y, b);
      }
    }
    end_block();
  }
  for (int64_t j = whole; j < n; j += kLanes) {
    const size_t bytes = sizeof(float) * std::min<int64_t>(kLanes, n - j);
    Vec a = splat(pad_x), b = splat(pad_y);
    std::memcpy(&a, x + j, bytes);
    std::memcpy(&b, y + j, bytes);
    pass(0, a, b);
    std::memcpy(x + j, &a, bytes);
    std::memcpy(y + j, &b, bytes);
  }
  end_block();
}

float row_max(const float* x, int64_t n) {
  Vec top[4];
  for (Vec& each : top) each = splat(-INFINITY);
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
    for (int which = 0; which < 4; ++which)
      top[which] = larger(load(x + j + which * kLanes), top[which]);
  Vec all = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  float result = -INFINITY;
  for (int lane = 0; lane < kLanes; ++lane) result = std::max(result, float(all[lane]));
  for (; j < n; ++j) result = std::max(result, x[j]);
  return result;
}

void scale_row(float* x, int64_t n, float factor) {
  if (factor == 1.f) return;
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

template <int kDivergence>
void row_statistics(float* x, float* y, int64_t n, double* out) {
  const float max_s = row_max(x, n), max_t = row_max(y, n);
  RowSum sum_s, sum_t, cross;
  auto pass = [&](int which, Vec& a, Vec& b) {
    const Vec dx = a - max_s, dy = b - max_t, delta = dx - dy;
    const Vec exp_s = exp_nonpositive(dx), exp_t = exp_nonpositive(dy);
    sum_s.add(which, exp_s);
    sum_t.add(which, exp_t);
    if (kDivergence == kReverse) cross.add(which, exp_s * delta);
    if (kDivergence == kForward) cross.add(which, exp_t * -delta);
    a = kDivergence == kJsd ? dx : exp_s;
    b = kDivergence == kJsd ? dy : kDivergence == kReverse ? delta : exp_t;
  };
  // Far enough below both maxima to count for nothing, at equal distance: delta is 0.
  walk<true>(x, y, n, max_s - 1000.f, max_t - 1000.f, pass, [&] {
    sum_s.end_block();
    sum_t.end_block();
    cross.end_block();
  });
  out[0] = max_s;
  out[1] = sum_s.total();
  out[2] = max_t;
  out[3] = sum_t.total();
  out[4] = cross.total();
}

void row_mixture(float* x, float* y, int64_t n, float scale_s, float scale_t, float offset,
                 float beta, double* out) {
  const float log_beta = std::log(beta), log_rest = std::log1p(-beta);
  RowSum softplus_sum, from_student, from_teacher;
  auto pass = [&](int which, Vec& a, Vec& b) {
    const Vec log_odds = (b - a) + offset, zero = splat(0.f);
    const Vec exp_s = exp_nonpositive(a), p_s = exp_s * scale_s;
    const Vec p_t = exp_nonpositive(b) * scale_t;
    const Vec common = log1p_unit(exp_nonpositive(-larger(log_odds, -log_odds)));
    const Vec softplus = larger(zero, log_odds) + common;
    softplus_sum.add(which, p_s * softplus);
    from_student.add(which, p_s * (softplus + log_rest));
    from_teacher.add(which, p_t * (larger(zero, -log_odds) + common + log_beta));
    a = exp_s;
    b = softplus;
  };
  walk<false>(x, y, n, -1000.f, -1000.f, pass, [&] {
    softplus_sum.end_block();
    from_student.end_block();
    from_teacher.end_block();
  });
  out[0] = softplus_sum.total();
  out[1] = -(1.0 - beta) * from_student.total() - beta * from_teacher.total();
}

void row_gradient(float* x, const float* y, int64_t n, bool forward, float first, float second) {
  if (forward) {
    for (int64_t j = 0; j < n; ++j) x[j] = x[j] * first - y[j] * second;
  } else {
    for (int64_t j = 0; j < n; ++j) x[j] = x[j] * (y[j] + second) * first;
  }
}

// All passes over a row that holds the whole vocabulary; weight is null where no gradient is wanted.
template <int kDivergence>
void whole_row(float* x, float* y, int64_t n, float inverse_temperature, float beta,
               const float* weight, double* statistics, double* value) {
  row_statistics<kDivergence>(x, y, n, statistics);
  const double sum_s = statistics[1], sum_t = statistics[3], cross = statistics[4];
  const double log_ratio = std::log(sum_s) - std::log(sum_t);
  const double factor = weight ? double(*weight) * inverse_temperature : 0.0;
  double first = factor / sum_s, second = -cross / sum_s;
  *value = cross / sum_s - log_ratio;
  if (kDivergence == kForward) {
    second = factor / sum_t;
    *value = cross / sum_t + log_ratio;
  } else if (kDivergence == kJsd) {
    double mixture[2];
    const double log_odds = std::log(beta) - std::log1p(-beta);
    row_mixture(x, y, n, 1 / sum_s, 1 / sum_t, log_ratio + log_odds, beta, mixture);
    first = -(1.0 - beta) * factor / sum_s;
    second = -mixture[0];
    *value = mixture[1];
  }
  if (weight) row_gradient(x, y, n, kDivergence == kForward, first, second);
}

template <class RowPass>
void over_rows(int64_t rows, int threads, RowPass pass) {
  auto share = [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) pass(row);
  };
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<std::thread> others;
  for (int64_t each = 1; each < count; ++each)
    others.emplace_back(share, rows * each / count, rows * (each + 1) / count);
  share(0, rows / count);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

// out: [rows, 5] m_s, S, m_t, T, X of the logits divided by the temperature.
void statistics(float* x, float* y, int64_t rows, int64_t n, int threads, int divergence,
                float inverse_temperature, double* out) {
  over_rows(rows, threads, [=](int64_t row) {
    float *student = x + row * n, *teacher = y + row * n;
    scale_row(student, n, inverse_temperature);
    scale_row(teacher, n, inverse_temperature);
    auto pass = divergence == kReverse   ? row_statistics<kReverse>
                : divergence == kForward ? row_statistics<kForward>
                                         : row_statistics<kJsd>;
    pass(student, teacher, n, out + 5 * row);
  });
}

// out: [rows, 2] K and the value of each token, this shard's part.
void mixture(float* x, float* y, int64_t rows, int64_t n, int threads, int, const float* scale_s,
             const float* scale_t, const float* offset, float beta, double* out) {
  over_rows(rows, threads, [=](int64_t row) {
    row_mixture(x + row * n, y + row * n, n, scale_s[row], scale_t[row], offset[row], beta,
                out + 2 * row);
  });
}

void logit_gradient(float* x, float* y, int64_t rows, int64_t n, int threads, int divergence,
                    const float* first, const float* second) {
  over_rows(rows, threads, [=](int64_t row) {
    row_gradient(x + row * n, y + row * n, n, divergence == kForward, first[row], second[row]);
  });
}

// All passes, where one rank holds the whole vocabulary. weight: [rows] or null;
// out: [rows, 5] as of statistics(); values: [rows].
void one_rank(float* x, float* y, int64_t rows, int64_t n, int threads, int divergence,
              float inverse_temperature, float beta, const float* weight, double* out,
              double* values) {
  over_rows(rows, threads, [=](int64_t row) {
    float *student = x + row * n, *teacher = y + row * n;
    scale_row(student, n, inverse_temperature);
    scale_row(teacher, n, inverse_temperature);
    auto pass = divergence == kReverse   ? whole_row<kReverse>
                : divergence == kForward ? whole_row<kForward>
                                         : whole_row<kJsd>;
    pass(student, teacher, n, inverse_temperature, beta, weight ? weight + row : nullptr,
         out + 5 * row, values + row);
  });
}

}  // extern "C"
