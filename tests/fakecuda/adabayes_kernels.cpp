// The kernels of adabayes_fused on the host, from its own csrc/multi_tensor.h: what fakecuda runs at their launches.
#include <algorithm>
#include <cstring>
#include <string>
#include <typeinfo>
#include <vector>
#include "fakecuda.h"
#include "multi_tensor.h"

namespace {

template <class T> T at(void* arg) { T value; memcpy(&value, arg, sizeof value); return value; }
template <class T> T* host(void* arg) {  // null stays null
  void* address = at<void*>(arg);
  return static_cast<T*>(address ? fakecuda_host(address) : nullptr);
}

// The table of a launch, with addresses that the host may touch; `rows` holds those of its chunks.
Table host_table(void* arg, unsigned blocks, std::vector<Row>& rows) {
  const auto host = [](auto* p) { return static_cast<decltype(p)>(p ? fakecuda_host(const_cast<void*>(static_cast<const void*>(p))) : nullptr); };
  const auto translate = [](int64_t& address) { address = reinterpret_cast<int64_t>(fakecuda_host(reinterpret_cast<void*>(address))); };
  Table table = at<Table>(arg);
  table.chunks = host(table.chunks), table.tickets = host(table.tickets), table.numbers = host(table.numbers), table.decision = host(table.decision);
  int64_t n = 0;
  for (unsigned b = 0; b < blocks; ++b) n = std::max(n, row_of(table.chunks[b]) + 1);
  rows.assign(host(table.rows), host(table.rows) + n);
  for (Row& row : rows) {
    for (int64_t* address : {&row.param, &row.grad, &row.step, &row.correction, &row.seed}) translate(*address);
    for (int64_t& slot : row.slot) translate(slot);
  }
  table.rows = rows.data();
  return table;
}

template <class K>
void update(void** args, const unsigned* grid, const unsigned* block) {
  using T = typename K::T;
  std::vector<Row> rows;
  const Table table = host_table(args[0], grid[0], rows);
  if (table.skipped()) return;
  for (unsigned b = 0; b < grid[0]; ++b) {
    T c[kCoefficients];
    for (int i = 0; i < kCoefficients; ++i) c[i] = T(coefficient(table, b, i));
    const uint32_t random = key(table, b);
    count_step(table, b);
    for (unsigned t = 0; t < block[0]; ++t) update_chunk<K>(table, coefficients<typename K::Rule, T>(c), random, at<DType>(args[1]), b, t, block[0]);
  }
}

// The sum of a block's values, halved over and over as the kernels do.
double sum_of(std::vector<double> part) {
  for (size_t half = part.size() / 2; half > 0; half /= 2)
    for (size_t t = 0; t < half; ++t) part[t] += part[t + half];
  return part[0];
}

template <class G>
void sum_squares(void** args, const unsigned* grid, const unsigned* block) {
  std::vector<Row> rows;
  const Table table = host_table(args[0], grid[0], rows);
  std::vector<double> part(block[0]);
  for (unsigned b = 0; b < grid[0]; ++b) {
    for (unsigned t = 0; t < block[0]; ++t) part[t] = sum_of_squares<G>(table, b, t, block[0]);
    host<double>(args[1])[b] = sum_of(part);
  }
}

void make_decision(void** args, const unsigned*, const unsigned* block) {
  const double* sums = host<const double>(args[0]);
  const float *grad_scale = host<const float>(args[2]), *found_inf = host<const float>(args[4]);
  std::vector<double> part(block[0]);
  for (int64_t i = 0; i < at<int64_t>(args[1]); ++i) part[i % block[0]] += sums[i];
  Decision* decision = host<Decision>(args[7]);
  *decision = decide(sum_of(part), grad_scale ? *grad_scale : at<double>(args[3]), found_inf && *found_inf != 0, at<double>(args[5]), at<bool>(args[6]));
  if (decision->skip != 0) ++*host<int64_t>(args[8]);
}

const size_t kUpdate[] = {sizeof(Table), sizeof(DType)}, kSum[] = {sizeof(Table), 8}, kDecision[] = {8, 8, 8, 8, 8, 8, 1, 8, 8};

template <class Rule, class P, class G, bool full, State state = State::wide, Weight weight = Weight::nearest> void implement_update() {
  const std::string p = typeid(P).name();
  const std::string g = std::is_same_v<P, G> ? (p.size() == 1 ? p : "S3_") : typeid(G).name();
  const std::string flags = std::string("Lb") + "01"[full] + "EL5State" + "012"[int(state)] + "EL6Weight" + "0123"[int(weight)] + "EEE";
  const std::string name = std::string("6updateI4KindI") + typeid(Rule).name() + p + g + flags;
  fakecuda_implement(name.c_str(), &update<Kind<Rule, P, G, full, state, weight>>, kUpdate, 2);
}
template <class Rule, class P, Weight weight> void implement_coded() {
  implement_update<Rule, P, AnyGrad, false, State::bfloat16, weight>(), implement_update<Rule, P, AnyGrad, true, State::bfloat16, weight>();
  implement_update<Rule, P, AnyGrad, false, State::small, weight>();
  if constexpr (weight != Weight::nearest) implement_update<Rule, P, AnyGrad, false, State::wide, weight>(), implement_update<Rule, P, AnyGrad, true, State::wide, weight>();
}
template <class Rule, class P> void implement_updates() {
  implement_update<Rule, P, P, false>(), implement_update<Rule, P, P, true>();
  implement_update<Rule, P, AnyGrad, false>(), implement_update<Rule, P, AnyGrad, true>();
  if constexpr (!std::is_same_v<P, double>) implement_coded<Rule, P, Weight::nearest>();
  if constexpr (std::is_same_v<P, bfloat16_t>)
    implement_coded<Rule, P, Weight::stochastic>(), implement_coded<Rule, P, Weight::plus8>(), implement_coded<Rule, P, Weight::plus16>();
}
template <class P> void implement() {
  implement_updates<AdaBayes, P>(), implement_updates<AdaBayesFP, P>();
  fakecuda_implement((std::string("11sum_squaresI") + typeid(P).name() + "EE").c_str(), &sum_squares<P>, kSum, 2);
}
[[gnu::constructor]] void load() {
  implement<float>(), implement<double>(), implement<half_t>(), implement<bfloat16_t>();
  fakecuda_implement("13make_decisionE", &make_decision, kDecision, 9);
}

}  // namespace
