// The floor of a step on the CPU: one sweep over as many streams of memory as an optimizer has, with an addition each.
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kUnit = 131072;  // elements a thread takes at a time

// Streams: one that is read, `changed` that are read and written, `written` that are only written.
template <int changed, int written>
void sweep(float* const* streams, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float x = streams[0][i];
    for (int k = 1; k <= changed; ++k) streams[k][i] += x;
    for (int k = 1; k <= written; ++k) streams[changed + k][i] = x;
  }
}

using Sweep = void (*)(float* const*, int64_t, int64_t);
constexpr Sweep kSweeps[5][2] = {{}, {sweep<1, 0>, sweep<1, 1>}, {sweep<2, 0>, sweep<2, 1>}, {sweep<3, 0>, sweep<3, 1>}, {sweep<4, 0>, sweep<4, 1>}};

}  // namespace

extern "C" void run(float* const* streams, int changed, int written, int64_t n, int threads) {
  const Sweep chosen = kSweeps[changed][written];
  const int64_t units = (n + kUnit - 1) / kUnit;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (units > 1)
  for (int64_t unit = 0; unit < units; ++unit) chosen(streams, unit * kUnit, std::min(n, (unit + 1) * kUnit));
}
