#include "cpu.h"
#include <algorithm>
#include <stdexcept>

using Update = void (*)(const Bucket&, const Row&, int64_t begin, int64_t end);
void update_baseline(const Bucket&, const Row&, int64_t, int64_t);
#ifdef HAVE_X86_ISAS
void update_avx2(const Bucket&, const Row&, int64_t, int64_t);
void update_avx512(const Bucket&, const Row&, int64_t, int64_t);
#endif

namespace {

struct Isa { const char* name; Update update; };

std::vector<Isa> find_isas() {
  std::vector<Isa> found;
#ifdef HAVE_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", update_avx512});
  if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", update_avx2});
#endif
  found.push_back({"baseline", update_baseline});
  return found;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

Update update_for(const std::string& isa) {
  for (const Isa& candidate : isas())
    if (isa == candidate.name) return candidate.update;
  throw std::invalid_argument("instruction set '" + isa + "' is not one of this build and processor");
}

// Asks for the memory of a small tensor that comes soon: a thousand of them are a thousand cold places.
void fetch(const Row& row) {
  for (int64_t address : {row.param, row.grad, row.slot[0], row.slot[1], row.slot[2], row.slot[3]})
    __builtin_prefetch(reinterpret_cast<const void*>(address), 1);
}

constexpr int kAhead = 8;  // tensors

// Elements a thread takes at a time: long stretches keep the memory streaming, many of them keep all threads busy to the end.
constexpr int64_t kLongest = 131072, kShortest = 16384;
int64_t unit_for(int64_t total, int threads) { return std::clamp(total / (16 * threads), kShortest, kLongest); }

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

void run_cpu(const Bucket& bucket, int threads, const std::string& isa) {
  const Update update = update_for(isa);
  // The tensors laid end to end are cut into equal units, so neither one huge nor a thousand tiny ones leave a thread idle.
  std::vector<int64_t> ends(bucket.n_rows);
  int64_t total = 0;
  for (int64_t r = 0; r < bucket.n_rows; ++r) ends[r] = total += bucket.rows[r].numel;
  const int64_t length = unit_for(total, threads), units = (total + length - 1) / length;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && units > 1)
  for (int64_t unit = 0; unit < units; ++unit) {
    int64_t at = unit * length;
    const int64_t stop = std::min(at + length, total);
    int64_t r = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
    for (; at < stop; ++r) {
      const Row& row = bucket.rows[r];
      if (r + kAhead < bucket.n_rows) fetch(bucket.rows[r + kAhead]);
      const int64_t begin = at - (ends[r] - row.numel), end = std::min(row.numel, begin + stop - at);
      if (end > begin) update(bucket, row, begin, end);
      at += end - begin;
    }
  }
}
