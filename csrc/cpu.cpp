#include "cpu.h"
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include "dispatch.h"

#define DECLARE(isa)                                                                                          \
  void update_##isa(const Bucket&, const Row&, const double* coefficients, int64_t begin, int64_t end); \
  double sum_of_squares_##isa(DType, int64_t address, int64_t begin, int64_t end);
DECLARE(baseline)
#ifdef HAVE_X86_ISAS
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace {

struct Isa {
  const char* name;
  decltype(update_baseline)* update;
  decltype(sum_of_squares_baseline)* sum_of_squares;
};
#define ENTRY(isa) {#isa, update_##isa, sum_of_squares_##isa}

std::vector<Isa> find_isas() {
  std::vector<Isa> found;
#ifdef HAVE_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    found.push_back(ENTRY(avx512));
  if (__builtin_cpu_supports("avx2")) found.push_back(ENTRY(avx2));
#endif
  found.push_back(ENTRY(baseline));
  return found;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const Isa& named(const std::string& isa) {
  for (const Isa& candidate : isas())
    if (isa == candidate.name) return candidate;
  throw std::invalid_argument("instruction set '" + isa + "' is not one of this build and processor");
}

// The coefficients of one row after the other, most of which have them in common.
class Corrected {
 public:
  const double* of(const Bucket& bucket, const Row& row) {
    const double* numbers = bucket.numbers + row.group * kNumbers;
    const float step = *reinterpret_cast<const float*>(row.step);
    if (numbers != numbers_ || step != step_)
      for (int i = 0; i < kCoefficients; ++i) coefficients_[i] = coefficient(numbers, i, step, 1.0);
    numbers_ = numbers, step_ = step;
    return coefficients_;
  }

 private:
  const double* numbers_ = nullptr;
  float step_ = 0;
  double coefficients_[kCoefficients];
};

// Asks for the memory of a small tensor that comes soon: a thousand of them are a thousand cold places.
void fetch(const Row& row) {
  for (int64_t address : {row.param, row.grad, row.slot[0], row.slot[1], row.slot[2], row.slot[3], row.step})
    __builtin_prefetch(reinterpret_cast<const void*>(address), 1);
}

void fetch_grad(const Row& row) { __builtin_prefetch(reinterpret_cast<const void*>(row.grad)); }

constexpr int kAhead = 8;  // tensors

// Elements a thread takes at a time: long stretches keep the memory streaming, many of them keep all threads busy to the end.
constexpr int64_t kLongest = 131072, kShortest = 16384;

// The tensors of a bucket laid end to end, cut into units of equal length: neither one huge nor a thousand tiny ones leave a
// thread idle.
struct Units {
  const Bucket& bucket;
  std::vector<int64_t> ends;  // of each tensor
  int64_t total, length, count;

  Units(const Bucket& of, int threads) : bucket(of), ends(of.n_rows), total(0) {
    for (int64_t r = 0; r < bucket.n_rows; ++r) ends[r] = total += bucket.rows[r].numel;
    length = threads ? std::clamp(total / (16 * threads), kShortest, kLongest) : kLongest;
    count = (total + length - 1) / length;
  }

  // range(row, begin, end) for each stretch of a tensor that lies in the unit; ahead(row) for what comes soon
  template <class Ahead, class Range>
  void each(int64_t unit, Ahead ahead, Range range) const {
    int64_t at = unit * length;
    const int64_t stop = std::min(at + length, total);
    int64_t r = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
    for (; at < stop; ++r) {
      const Row& row = bucket.rows[r];
      if (r + kAhead < bucket.n_rows) ahead(bucket.rows[r + kAhead]);
      const int64_t begin = at - (ends[r] - row.numel), end = std::min(row.numel, begin + stop - at);
      if (end > begin) range(row, begin, end);
      at += end - begin;
    }
  }
};

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

void run_cpu(const std::vector<Bucket>& buckets, int threads, const std::string& isa) {
  const auto update = named(isa).update;
  std::vector<Units> all;
  all.reserve(buckets.size());
  for (const Bucket& bucket : buckets) all.emplace_back(bucket, threads);
  for (const Units& units : all) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && units.count > 1)
    for (int64_t unit = 0; unit < units.count; ++unit) {
      Corrected corrected;
      units.each(unit, fetch, [&](const Row& row, int64_t begin, int64_t end) { update(units.bucket, row, corrected.of(units.bucket, row), begin, end); });
    }
    for (int64_t r = 0; r < units.bucket.n_rows; ++r) *reinterpret_cast<float*>(units.bucket.rows[r].step) += 1;
  }
}

double sum_of_squares_cpu(const Bucket& bucket, int threads, const std::string& isa) {
  const auto sum_of_squares = named(isa).sum_of_squares;
  const Units units(bucket, 0);  // the same units, and so the same bits, for any number of threads
  std::vector<double> sums(units.count);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && units.count > 1)
  for (int64_t unit = 0; unit < units.count; ++unit)
    units.each(unit, fetch_grad, [&](const Row& row, int64_t begin, int64_t end) { sums[unit] += sum_of_squares(bucket.grad, row.grad, begin, end); });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}
