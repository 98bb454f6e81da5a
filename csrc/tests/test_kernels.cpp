// The C++ kernels on the host, against plain formulas in double and against the rule applied to one element at a time.
// `test_kernels [case...]` runs the named cases, or all.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>
#include "cpu.h"
#include "multi_tensor.h"

void update_baseline(const Bucket&, const Row&, const double* coefficients, int64_t begin, int64_t end);  // cpu_kernel.cpp

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
int failures = 0;
std::string context;

bool same(double a, double b) { return a == b ? std::signbit(a) == std::signbit(b) : std::isnan(a) && std::isnan(b); }

void check(bool good, int line, const char* what, double got, double expected) {
  if (!good && ++failures <= 20)
    std::printf("%s:%d: %s is %.17g, expected %.17g %s\n", __FILE__, line, what, got, expected, context.c_str());
}

#define CHECK(got, expected) check(same(got, expected), __LINE__, #got, got, expected)
#define CHECK_NEAR(got, expected) check(std::fabs((got) / (expected) - 1) <= 1e-13, __LINE__, #got, got, double(expected))

// --- Conversions ---

struct Format { int fraction, exponent; };  // stored bits

int bias(Format f) { return (1 << (f.exponent - 1)) - 1; }

double decode(Format f, uint32_t bits) {
  const int exponent = int(bits >> f.fraction) & ((1 << f.exponent) - 1), fraction = int(bits) & ((1 << f.fraction) - 1);
  double value = std::ldexp(exponent ? fraction + (1 << f.fraction) : fraction, std::max(exponent, 1) - bias(f) - f.fraction);
  if (exponent == (1 << f.exponent) - 1) value = fraction ? std::nan("") : kInf;
  return bits >> 15 ? -value : value;
}

// The format's value nearest to x, the even one of two.
double rounded(Format f, double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), 1 - bias(f)) - f.fraction);
  const double value = std::nearbyint(x / ulp) * ulp;
  return std::fabs(value) < std::ldexp(1.0, bias(f) + 1) ? std::copysign(value, x) : std::copysign(kInf, x);
}

template <class S>
void check_narrow(Format f, float x) {
  S stored;
  narrow(x, stored);
  CHECK(decode(f, stored.bits), rounded(f, x));
}

template <class S>
void check_conversions(Format f) {
  const float inf = float(kInf);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double value = decode(f, bits);
    CHECK(widen(S{uint16_t(bits)}), value);
    check_narrow<S>(f, float(value));
    if (!std::isfinite(value)) continue;
    const double above = decode(f, bits + 1), ulp = std::isfinite(above) ? above - value : value - decode(f, bits - 1);
    const float halfway = float(value + ulp / 2);
    for (float x : {std::nextafter(halfway, -inf), halfway, std::nextafter(halfway, inf)}) check_narrow<S>(f, x);
  }
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 997) {
    const uint32_t low = uint32_t(bits);
    float x;
    std::memcpy(&x, &low, 4);
    check_narrow<S>(f, x);
  }
}

void conversions() {
  check_conversions<half_t>({10, 5});
  check_conversions<bfloat16_t>({7, 8});
}

// --- Rules: in the paper's units, as the paper writes them ---

constexpr double kLr = 1e-2, kSgdLr = 0.5, kBatch = 20, kDecay = 0.1, kBeta1 = 0.9, kBeta2 = 0.99, kScale = 1024;
constexpr double kR = kSgdLr / kLr, kKappa = kLr * kBatch / kR, kUnit = kSgdLr / kBatch;

double gradient(int t) { return 0.3 + std::sin(1.7 * t); }

void adabayes_is_the_papers() {
  long double w = 3, m = 0, v = 0, s_post = 0, s_prior = kUnit;  // sigma^2
  const long double eta2 = (long double)kLr * kLr, sigma2 = kUnit;
  double param = 3, exp_avg = 0, prior_var = 1, exp_avg_sq = 0, post_var = 1;
  for (int t = 1; t <= 100; ++t) {
    const double row[] = {1 / kScale, 1 - kBeta1, 1 - kBeta2, 1 - kLr * kDecay, kUnit * kBatch / (1 - std::pow(kBeta1, t)),
                          kUnit * kBatch * kBatch, kKappa * (1 - kKappa / 4), kKappa};
    AdaBayes::update(coefficients<AdaBayes, double>(row), gradient(t) * kScale, param, exp_avg, prior_var, exp_avg_sq, post_var);
    const long double g = gradient(t), G = kBatch * g;
    m = kBeta1 * m + (1 - (long double)kBeta1) * G;
    v = kBeta2 * v + (1 - (long double)kBeta2) * G * G;
    s_post = 1 / (1 / s_prior + G * G);
    s_prior = (1 - eta2 / (2 * sigma2)) * (1 - eta2 / (2 * sigma2)) * s_post + eta2;
    w = (1 - (long double)kLr * kDecay) * w - s_post * m / (1 - std::pow((long double)kBeta1, t));
    context = "at step " + std::to_string(t);
    CHECK_NEAR(param, w);
    CHECK_NEAR(exp_avg * kBatch, m);
    CHECK_NEAR(exp_avg_sq * kBatch * kBatch, v);
    CHECK_NEAR(post_var * kUnit, s_post);
    CHECK_NEAR(prior_var * kUnit, s_prior);
  }
}

void adabayes_fp_is_the_papers() {
  long double w = 3, m = 0, v = 0;
  const long double eta2 = (long double)kLr * kLr, sigma2 = kUnit;
  double param = 3, exp_avg = 0, exp_avg_sq = 0, post_var = 1, unused = 0;
  for (int t = 1; t <= 100; ++t) {
    const double row[] = {1 / kScale, 1 - kBeta1, 1 - kBeta2, 1 - kLr * kDecay, kLr / (1 - std::pow(kBeta1, t)),
                          0.5 / kR, 1 / (1 - std::pow(kBeta2, t)), 0};
    AdaBayesFP::update(coefficients<AdaBayesFP, double>(row), gradient(t) * kScale, param, exp_avg, exp_avg_sq, post_var, unused);
    const long double g = gradient(t), G = kBatch * g;
    m = kBeta1 * m + (1 - (long double)kBeta1) * G;
    v = kBeta2 * v + (1 - (long double)kBeta2) * G * G;
    const long double v_hat = v / (1 - std::pow((long double)kBeta2, t));
    const long double s_post = 1 / (1 / (2 * sigma2) + std::sqrt(1 / (4 * sigma2 * sigma2) + v_hat / eta2));
    w = (1 - (long double)kLr * kDecay) * w - s_post * m / (1 - std::pow((long double)kBeta1, t));
    context = "at step " + std::to_string(t);
    CHECK_NEAR(param, w);
    CHECK_NEAR(exp_avg * kBatch, m);
    CHECK_NEAR(exp_avg_sq * kBatch * kBatch, v);
    CHECK_NEAR(post_var * kUnit, s_post);
  }
}

void rules() {
  adabayes_is_the_papers();
  adabayes_fp_is_the_papers();
}

// --- Drivers: the rule, one element at a time ---

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

// The memory of one tensor, beginning `shift` elements past a 64-byte boundary, in the midst of guard bytes.
struct Tensor {
  struct alignas(64) Line { unsigned char byte[64]; };
  DType dtype;
  int64_t numel, begin, size = 0;
  std::vector<Line> lines;

  Tensor(DType dtype, int64_t numel, int shift) : dtype(dtype), numel(numel) {
    with_dtype(dtype, [&](auto type) { size = sizeof(typename decltype(type)::type); });
    begin = 64 + shift * size;
    lines.resize((begin + numel * size) / 64 + 2);
    std::memset(lines.data(), 0xa5, lines.size() * 64);
  }
  const unsigned char* bytes() const { return lines.data()->byte; }
  int64_t address() const { return reinterpret_cast<int64_t>(bytes() + begin); }
  double get(int64_t i) const {
    double value = 0;
    with_dtype(dtype, [&](auto type) {
      value = widen(reinterpret_cast<const typename decltype(type)::type*>(address())[i]);
    });
    return value;
  }
  template <class T>
  void set(int64_t i, T value) {
    with_dtype(dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      narrow(typename Compute<S>::type(value), reinterpret_cast<S*>(address())[i]);
    });
  }
};

struct Job {
  int algorithm;
  DType param, grad;
  std::vector<std::vector<Tensor>> tensors;  // each parameter's: param, grad, four slots
  std::vector<float> steps;                  // and its step count
};

// Two groups. Powers of these decays are exact.
constexpr double kGroups[2][kNumbers] = {{0.5, 0.1, 0.01, 0.999, 0.07, 30, 0.2, 0.21, 0, 0, 0, 0, 0.5, 0, 0.25, 0},
                                         {-1, -0.2, -0.0, 0.99, 0.01, 3, 0.1, 0.11, 0, 0, 0, 0, 0, 0, 0, 0}};

std::vector<double> corrected(size_t k, float step) {
  const double* numbers = kGroups[k % 2];
  std::vector<double> c(numbers, numbers + kCoefficients);
  for (int i = 0; i < kCoefficients; ++i) c[i] /= 1 - std::pow(numbers[kCoefficients + i], step + 1);
  return c;
}

// `shift(k, s)`: by how many elements stream s of tensor k is off its alignment
template <class F>
Job make_job(int algorithm, DType param, DType grad, const std::vector<int64_t>& sizes, F shift) {
  const double odd[] = {0.0, -0.0, kInf, -kInf, std::nan(""), 1e30, 1e-40, 7e-6};
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  Job job{algorithm, param, grad, {}, {}};
  for (size_t k = 0; k < sizes.size(); ++k) {
    std::vector<Tensor> streams;
    for (int s = 0; s < 6; ++s)
      streams.emplace_back(s == 0 ? param : s == 1 ? grad : param == DType::f64 ? DType::f64 : DType::f32, sizes[k], shift(k, s));
    for (int64_t i = 0; i < sizes[k]; ++i) {
      const double gauss = normal(random);
      for (int s = 0; s < 6; ++s) streams[s].set(i, s < 3 ? gauss * (s + 1) : std::fabs(gauss) / s);
      streams[0].set(i, normal(random));
      if (i % 97 == 5) streams[1].set(i, odd[i / 97 % 8]);
    }
    job.tensors.push_back(streams);
    job.steps.push_back(float(k % 3));
  }
  return job;
}

int slots_of(const Job& job, bool full) {
  int slots = 0;
  with_rule(job.algorithm, [&](auto rule) { slots = full ? decltype(rule)::type::slots : decltype(rule)::type::lean; });
  return slots;
}

std::vector<Row> rows_of(const Job& job, bool full) {
  std::vector<Row> rows;
  for (const auto& streams : job.tensors) {
    Row row{streams[0].address(), streams[1].address(), {}, streams[0].numel, int64_t(rows.size() % 2),
            reinterpret_cast<int64_t>(&job.steps[rows.size()])};
    for (int s = 0; s < slots_of(job, full); ++s) row.slot[s] = streams[2 + s].address();
    rows.push_back(row);
  }
  return rows;
}

Bucket bucket_of(const Job& job, bool full, const std::vector<Row>& rows) {
  return {job.algorithm, full, State::wide, Weight::nearest, job.param, job.grad, rows.data(), int64_t(rows.size()), kGroups[0]};
}

template <class Rule, class T>
void update_each(Job& job) {
  for (size_t k = 0; k < job.tensors.size(); ++k) {
    auto& streams = job.tensors[k];
    const auto c = coefficients<Rule, T>(corrected(k, job.steps[k]++).data());
    for (int64_t i = 0; i < streams[0].numel; ++i) {
      T x[6];
      for (int s = 0; s < 6; ++s) x[s] = T(streams[s].get(i));
      Rule::update(c, x[1], x[0], x[2], x[3], x[4], x[5]);
      for (int s : {0, 2, 3, 4, 5}) streams[s].set(i, x[s]);
    }
  }
}

Job updated(Job job) {
  with_rule(job.algorithm, [&](auto rule) {
    using Rule = typename decltype(rule)::type;
    job.param == DType::f64 ? update_each<Rule, double>(job) : update_each<Rule, float>(job);
  });
  return job;
}

// Compares the values of what a full or lean step has, and the guards around them, and step counts. Of a NaN, not which one.
void check_equal(const Job& got, const Job& expected, bool full, const std::string& how) {
  context = how + ", step counts";
  for (size_t k = 0; k < got.steps.size(); ++k) CHECK(got.steps[k], expected.steps[k]);
  for (size_t k = 0; k < got.tensors.size(); ++k)
    for (int s = 0; s < 2 + slots_of(got, full); ++s) {
      const Tensor &a = got.tensors[k][s], &b = expected.tensors[k][s];
      const int64_t end = a.begin + a.numel * a.size, all = int64_t(a.lines.size()) * 64;
      if (std::memcmp(a.bytes(), b.bytes(), all) == 0) continue;
      context = how + ", algorithm " + std::to_string(got.algorithm) + (full ? " full" : " lean") + ", param dtype " +
                std::to_string(int(got.param)) + ", grad dtype " + std::to_string(int(got.grad)) + ", numel " +
                std::to_string(a.numel) + ", stream " + std::to_string(s);
      const std::string where = context;
      for (int64_t i = 0; i < a.numel; ++i) context = where + ", element " + std::to_string(i), CHECK(a.get(i), b.get(i));
      context = where + ", guard";
      for (int64_t i = 0; i < all; ++i)
        if (i < a.begin || i >= end) CHECK(a.bytes()[i], 0xa5);
    }
}

template <class F>
void for_each_job(const std::vector<int64_t>& sizes, int (*shift)(size_t k, int s), F f) {
  for (int algorithm : {0, 1})
    for (DType param : kDTypes)
      for (DType grad : kDTypes) {
        const Job job = make_job(algorithm, param, grad, sizes, shift), expected = updated(job);
        for (bool full : {true, false}) f(job, expected, full);
      }
}

void cpu() {
  const std::vector<int64_t> sizes = {0, 1, 3, 31, 32, 33, 0, 511, 512, 513, 1000, 32767, 32768, 32769, 100003, 2, 0};
  const auto shift = [](size_t k, int s) { return int(k * 5 + s * 3) % 7; };
  for_each_job(sizes, shift, [&](const Job& job, const Job& expected, bool full) {
    for (const std::string& isa : cpu_isas())
      for (int threads : {1, 2}) {
        Job got = job;
        run_cpu({bucket_of(got, full, rows_of(got, full))}, threads, isa);
        check_equal(got, expected, full, isa + ", threads " + std::to_string(threads));
      }
  });
}

// Long enough for ranges whose last slot is written past the caches, at addresses where that can be and where it cannot.
void long_ranges() {
  for (int algorithm : {0, 1})
    for (DType dtype : {DType::f32, DType::f64})
      for (const auto shift : {+[](size_t, int) { return 0; }, +[](size_t, int s) { return s % 3; }}) {
        const Job job = make_job(algorithm, dtype, dtype, {1200003}, shift), expected = updated(job);
        for (const std::string& isa : cpu_isas()) {
          Job got = job;
          run_cpu({bucket_of(got, true, rows_of(got, true))}, 1, isa);
          check_equal(got, expected, true, isa);
        }
      }
}

// Every thread of every block, last to first: none may depend on another. `together`: all blocks have begun before the first
// counts, else each ends before the next begins.
void run_chunks(const Job& job, bool full, const std::vector<Row>& rows, const std::vector<int64_t>& chunks, bool together = false,
                const Decision* decision = nullptr) {
  std::vector<unsigned long long> tickets(rows.size());
  const Table table{rows.data(), chunks.data(), tickets.data(), kGroups[0], decision};
  const int64_t blocks = int64_t(chunks.size());
  const auto run = [&](auto rule, auto param, auto grad, auto is_full) {
    using Rule = typename decltype(rule)::type;
    using P = typename decltype(param)::type;
    using G = typename decltype(grad)::type;
    std::vector<std::vector<double>> c(blocks, std::vector<double>(kCoefficients));
    const auto begin = [&](int64_t block) { for (int i = 0; i < kCoefficients; ++i) c[block][i] = coefficient(table, block, i); };
    for (int64_t block = 0; together && block < blocks; ++block) begin(block);
    for (int64_t block = blocks - 1; block >= 0; --block) {
      if (!together) begin(block);
      count_step(table, block);
      for (int thread = kThreads - 1; thread >= 0; --thread)
        update_chunk<Kind<Rule, P, G, decltype(is_full)::value, State::wide, Weight::nearest>>(
            table, coefficients<Rule, typename Compute<P>::type>(c[block].data()), 0, job.grad, block, thread, kThreads);
    }
  };
  if (table.skipped()) return;
  with_rule(job.algorithm, [&](auto rule) {
    with_dtype(job.param, [&](auto param) {
      const auto with_grad = [&](auto grad) {
        full ? run(rule, param, grad, std::true_type{}) : run(rule, param, grad, std::false_type{});
      };
      job.param == job.grad ? with_grad(param) : with_grad(Type<AnyGrad>{});
    });
  });
}

std::vector<int64_t> chunk_map(const std::vector<Row>& rows) {
  std::vector<int64_t> chunks;
  for (size_t r = 0; r < rows.size(); ++r)
    for (int64_t chunk = 0; chunk == 0 || chunk * kChunk < rows[r].numel; ++chunk) chunks.push_back(int64_t(r) << 32 | chunk);
  return chunks;
}

void chunks() {
  // One stream after the other begins off its alignment, then none does.
  std::vector<int64_t> sizes(7, 1037);
  for (int64_t n : {int64_t(0), int64_t(1), int64_t(7), kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 5}) sizes.push_back(n);
  const auto shift = [](size_t k, int s) { return int(k) == s ? 1 : 0; };
  for_each_job(sizes, shift, [&](const Job& job, const Job& expected, bool full) {
    for (bool together : {false, true}) {
      Job got = job;
      const std::vector<Row> rows = rows_of(got, full);
      run_chunks(got, full, rows, chunk_map(rows), together);
      check_equal(got, expected, full, "update_chunk");
    }
    Job got = job;
    const std::vector<Row> rows = rows_of(got, full);
    const Decision skip{1, 0, 1};
    run_chunks(got, full, rows, chunk_map(rows), false, &skip);
    check_equal(got, job, full, "a skipped step");
  });
}

// --- Codes: the CPU's kernels against the thread function, for every way of storing, shard and instruction set ---

// A parameter stored in codes, and a second copy of it; a shard's rows lie apart in the whole tensor.
struct Coded {
  std::vector<uint16_t> weights;
  std::vector<float> wide_weights, grads;
  std::vector<uint8_t> slots[kMaxSlots], correction;
  int64_t seed;
  float step = 4;
  Row row{};

  Coded(int64_t numel, int64_t run, bool bf16, std::mt19937 random) : weights(numel), wide_weights(numel), grads(numel), correction(2 * numel) {
    std::normal_distribution<float> normal;
    seed = -3 * (int64_t(1) << 32) | 0x9e3779b9;
    for (int64_t i = 0; i < numel; ++i) {
      wide_weights[i] = normal(random), grads[i] = 0.1f * normal(random);
      bfloat16_t stored;
      narrow(wide_weights[i], stored), weights[i] = stored.bits;
    }
    for (auto& slot : slots) {
      slot.resize(4 * numel);
      for (auto& byte : slot) byte = uint8_t(random() % 64);  // of floats and bfloat16s too: small positive numbers
    }
    for (auto& byte : correction) byte = uint8_t(random());
    row = {bf16 ? address(weights) : address(wide_weights), address(grads), {}, numel, 0, reinterpret_cast<int64_t>(&step)};
    for (int s = 0; s < kMaxSlots; ++s) row.slot[s] = address(slots[s]);
    row.correction = address(correction), row.seed = reinterpret_cast<int64_t>(&seed);
    row.first = 1000, row.run = run, row.stride = 3 * run;
  }
  Coded(const Coded&) = delete;

  template <class V>
  static int64_t address(V& v) { return reinterpret_cast<int64_t>(v.data()); }
};

template <class Rule, class P, bool full, State state, Weight weight>
void check_coded(int algorithm, int64_t numel, int64_t run) {
  constexpr bool bf16 = std::is_same_v<P, bfloat16_t>;
  const int64_t chunks = std::max<int64_t>((numel + kChunk - 1) / kChunk, 1);
  for (const std::string& isa : cpu_isas()) {
    Coded expected(numel, run, bf16, std::mt19937(3)), got(numel, run, bf16, std::mt19937(3));
    run_cpu({{algorithm, full, state, weight, bf16 ? DType::bf16 : DType::f32, DType::f32, &got.row, 1, kGroups[0]}}, 2, isa);
    std::vector<int64_t> map;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) map.push_back(chunk);
    std::vector<unsigned long long> tickets(1);
    const Table table{&expected.row, map.data(), tickets.data(), kGroups[0], nullptr};
    double c[kCoefficients];
    for (int i = 0; i < kCoefficients; ++i) c[i] = coefficient(table, 0, i);
    const uint32_t random = key(table, 0);
    for (int64_t block = 0; block < chunks; ++block) {
      count_step(table, block);
      for (int thread = 0; thread < kThreads; ++thread)
        update_chunk<Kind<Rule, P, AnyGrad, full, state, weight>>(table, coefficients<Rule, float>(c), random, DType::f32, block, thread, kThreads);
    }
    context = isa + ", algorithm " + std::to_string(algorithm) + ", state " + std::to_string(int(state)) + ", weights " +
              std::to_string(int(weight)) + ", numel " + std::to_string(numel) + ", run " + std::to_string(run);
    const auto same_bytes = [](const auto& a, const auto& b) { return double(a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0); };
    CHECK(same_bytes(got.weights, expected.weights), 1), CHECK(same_bytes(got.wide_weights, expected.wide_weights), 1);
    for (int s = 0; s < kMaxSlots; ++s) CHECK(same_bytes(got.slots[s], expected.slots[s]), 1);
    CHECK(same_bytes(got.correction, expected.correction), 1), CHECK(got.step, expected.step);
  }
}

template <class Rule, class P, Weight weight>
void check_states(int algorithm, int64_t numel, int64_t run) {
  check_coded<Rule, P, false, State::small, weight>(algorithm, numel, run);
  check_coded<Rule, P, false, State::bfloat16, weight>(algorithm, numel, run);
  check_coded<Rule, P, true, State::bfloat16, weight>(algorithm, numel, run);
  if constexpr (weight != Weight::nearest) check_coded<Rule, P, true, State::wide, weight>(algorithm, numel, run);
}

// u8 and m8 give back what they hold, and the mean over all random numbers is the value.
void check_small_codes() {
  for (int bits = 0; bits < 255; ++bits)
    for (uint32_t random : {0u, ~0u, 0x12345678u}) {
      u8_t u;
      encode(widen(u8_t{uint8_t(bits)}), random, u);
      CHECK(u.bits, bits);
      if ((bits & 127) == 127) continue;
      m8_t m;
      encode(widen(m8_t{uint8_t(bits)}, -5), random, -5, m);
      CHECK(m.bits, bits);
    }
  CHECK(widen(u8_t{0}), std::ldexp(1.0, -30)), CHECK(widen(u8_t{254}), 3.5), CHECK(widen(m8_t{126}, 0), 56 - std::ldexp(1.0, -10));
  double mean_u = 0, mean_m = 0;
  constexpr int kDraws = 1 << 20;
  for (uint32_t draw = 0; draw < kDraws; ++draw) {
    u8_t u;
    m8_t m;
    encode(0.7f, draw << 12, u), encode(-0.3f, draw << 12, 2, m);
    mean_u += widen(u) / double(kDraws), mean_m += widen(m, 2) / double(kDraws);
  }
  context = "the mean over all draws";
  CHECK(double(std::fabs(mean_u - 0.7f) < 1e-7), 1), CHECK(double(std::fabs(mean_m + 0.3f) < 1e-7), 1);
}

void codes() {
  context = "";
  check_small_codes();
  for (int64_t numel : {int64_t(0), int64_t(1), int64_t(1037), 2 * kChunk + 5})
    for (int64_t run : {std::max<int64_t>(numel, 1), int64_t(8), int64_t(7)}) {
      check_states<AdaBayes, float, Weight::nearest>(0, numel, run);
      check_states<AdaBayesFP, float, Weight::nearest>(1, numel, run);
      check_states<AdaBayes, bfloat16_t, Weight::nearest>(0, numel, run);
      check_states<AdaBayes, bfloat16_t, Weight::stochastic>(0, numel, run);
      check_states<AdaBayesFP, bfloat16_t, Weight::plus8>(1, numel, run);
      check_states<AdaBayes, bfloat16_t, Weight::plus16>(0, numel, run);
    }
}

// --- Numbers of a step: against long double ---

void numbers() {
  for (double decay : {0.9, 0.999, 1 - 1e-9})
    for (int64_t t : {1, 2, 3, 10, 1000, 16777217}) {
      context = "decay " + std::to_string(decay) + ", step " + std::to_string(t);
      const double exact = double(std::pow((long double)decay, t));
      CHECK(double(std::fabs(power(decay, t) - exact) <= exact * std::ldexp(double(t), -52)), 1);  // half an ulp a multiplication
      const double row[kNumbers] = {3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, decay, 0, 0, 0};
      CHECK(coefficient(row, 0, float(t - 1), 0.5), 1.5), CHECK(coefficient(row, 1, float(t - 1), 0.5), 0);
      if (t < 16777217) CHECK(coefficient(row, 4, float(t - 1), 0.5), 5 / (1 - power(decay, t)));
    }
  CHECK(power(0.0, 0), 1);
}

void decisions() {
  context = "";
  const Decision within = decide(16, 8, false, 1, true), clipped = decide(16, 2, false, 0.5, true);
  CHECK(within.factor, 0.125), CHECK(within.norm, 0.5), CHECK(within.skip, 0);
  CHECK_NEAR(clipped.factor, 0.5 / (2 + 1e-6) / 2), CHECK(clipped.norm, 2);
  for (double max_norm : {1.0, kInf})
    for (double bad : {kInf, std::nan("")}) {
      CHECK(decide(bad, 2, false, max_norm, true).skip, 1), CHECK(decide(bad, 2, false, max_norm, false).skip, 0);
      CHECK(decide(bad, 2, false, max_norm, true).norm, bad);
    }
  CHECK(decide(kInf, 2, false, 1, false).factor, 0), CHECK(decide(std::nan(""), 2, false, 1, false).factor, std::nan(""));
  CHECK(decide(kInf, 2, false, kInf, false).factor, 0.5), CHECK(decide(std::nan(""), 2, false, kInf, false).factor, 0.5);
  CHECK(decide(0, 1, true, kInf, false).skip, 1), CHECK(decide(0, 1, false, 1, false).factor, 1);
}

// --- Sums of squares: against long double, the same bits for every instruction set and number of threads ---

double by_threads(const Job& job, const std::vector<Row>& rows) {
  double sum = 0;
  const std::vector<int64_t> blocks = chunk_map(rows);
  with_dtype(job.grad, [&](auto grad) {
    for (size_t block = 0; block < blocks.size(); ++block)
      for (int thread = 0; thread < kThreads; ++thread)
        sum += sum_of_squares<typename decltype(grad)::type>(Table{rows.data(), blocks.data(), nullptr, nullptr, nullptr}, int64_t(block), thread, kThreads);
  });
  return sum;
}

void squares() {
  const std::vector<int64_t> sizes = {0, 1, 15, 16, 17, 0, 511, 512, 513, 131071, 131073, 40001, 2 * kChunk + 5, 3};
  const auto shift = [](size_t k, int) { return int(k) % 3; };
  for (DType grad : kDTypes) {
    Job job = make_job(0, DType::f32, grad, sizes, shift);
    long double expected = 0;
    for (auto& streams : job.tensors)
      for (int64_t i = 0; i < streams[1].numel; ++i) {
        if (!std::isfinite(streams[1].get(i))) streams[1].set(i, grad == DType::f16 ? 6e4 : 1e30);
        expected += (long double)streams[1].get(i) * streams[1].get(i);
      }
    const std::vector<Row> rows = rows_of(job, true);
    const Bucket bucket = bucket_of(job, true, rows);
    const double first = sum_of_squares_cpu(bucket, 1, cpu_isas()[0]);
    context = "grad dtype " + std::to_string(int(grad));
    CHECK_NEAR(first, double(expected));
    CHECK_NEAR(by_threads(job, rows), double(expected));
    for (const std::string& isa : cpu_isas())
      for (int threads : {1, 2, 3}) CHECK(sum_of_squares_cpu(bucket, threads, isa), first);
    for (double bad : {kInf, -kInf, std::nan("")})
      for (size_t k : {1, 4, 8, 10}) {
        Tensor& tensor = job.tensors[k][1];
        const double good = tensor.get(tensor.numel - 1);
        tensor.set(tensor.numel - 1, bad);
        CHECK(double(std::isfinite(sum_of_squares_cpu(bucket, 2, cpu_isas()[0]))), 0);
        CHECK(double(std::isfinite(by_threads(job, rows))), 0);
        tensor.set(tensor.numel - 1, good);
      }
  }
}

// --- The last elements of tensors of 2^33: their addresses are real, those of the rest never used ---

void large() {
  constexpr int64_t before = int64_t(1) << 33, row_number = (1 << 20) + 3;
  const auto shift = [](size_t, int) { return 0; };
  std::vector<Row> rows(row_number + 1);
  for_each_job({37}, shift, [&](const Job& job, const Job& expected, bool full) {
    const std::vector<int64_t> chunks = {row_number << 32 | before / kChunk};
    CHECK(double(row_of(chunks[0])), double(row_number));
    CHECK(double(chunk_of(chunks[0])), double(before / kChunk));
    for (bool cpu : {true, false}) {
      Job got = job;
      Row& row = rows.back() = rows_of(got, full)[0];
      const std::vector<Tensor>& streams = got.tensors[0];
      row.numel += before, row.param -= before * streams[0].size, row.grad -= before * streams[1].size;
      for (int s = 0; s < slots_of(got, full); ++s) row.slot[s] -= before * streams[2].size;
      if (cpu) update_baseline(bucket_of(got, full, rows), row, corrected(0, 0).data(), before, row.numel);
      else run_chunks(got, full, rows, chunks);
      got.steps[0] = 1;  // nobody counts for a range; of the chunks one is not the last
      check_equal(got, expected, full, cpu ? "update_baseline beyond 2^33" : "update_chunk beyond 2^33");
    }
  });
}

struct Case { const char* name; void (*run)(); };
constexpr Case kCases[] = {{"conversions", conversions}, {"rules", rules}, {"cpu", cpu}, {"long_ranges", long_ranges}, {"chunks", chunks}, {"numbers", numbers}, {"decisions", decisions}, {"codes", codes}, {"squares", squares},
                           {"large", large}};

}  // namespace

int main(int argc, char** argv) {
  int ran = 0;
  for (const Case& c : kCases)
    if (argc == 1 || std::find(argv + 1, argv + argc, std::string(c.name)) != argv + argc) {
      context.clear();
      std::printf("%s\n", c.name), std::fflush(stdout);  // before a trap
      c.run();
      ++ran;
    }
  std::printf("%d cases, %d failures\n", ran, failures);
  return failures || ran < std::max(argc - 1, 1);
}
