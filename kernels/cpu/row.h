// One row of logits x [V].
//   log_sum_exp:  max_i x_i  and  log sum_i exp(x_i - max): one read from memory
//   gradient:     out_i = scale * exp(x_i - lse): one read, one write
#pragma once
#include <math.h>

#include "simd.h"

namespace wmtp {
namespace WMTP_ISA {

// A block stays in L1 between its maximum and its exponentials.
constexpr int64_t kBlock = 4096;

inline float log(float x) { return ::logf(x); }
inline double log(double x) { return ::log(x); }

template <class T> inline T exp_one(T x) { return exp<T>(broadcast(x))[0]; }
template <class E> inline Acc<E> value_at(const E* x, int64_t i) { return load_first(x + i, 1)[0]; }

// Kept apart, so that ce = (max - x_target) + log_sum loses nothing to a large max.
template <class T> struct LogSumExp {
  T max, log_sum;
  T lse() const { return max + log_sum; }
  T ce(T x_target) const { return (max - x_target) + log_sum; }
};

template <class E> inline Acc<E> block_max(const E* x, int64_t n) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  const Vec<T> lowest = broadcast(-kInfinity<T>);
  Vec4<T> most = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int j = 0; j < 4; ++j) most[j] = larger(load(x + i + j * L), most[j]);
  for (; i + L <= n; i += L) most[0] = larger(load(x + i), most[0]);
  if (i < n) most[1] = larger(load_first(x + i, n - i), most[1]);
  most[0] = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  T max = most[0][0];
  for (int lane = 1; lane < L; ++lane) max = most[0][lane] > max ? most[0][lane] : max;
  return max;
}

template <class E> inline Acc<E> block_sum_exp(const E* x, int64_t n, Acc<E> max) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  Vec4<T> sums = {}, terms;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    // The exponentials keep the core busy: fetch the next block meanwhile. A prefetch never faults.
    for (unsigned line = 0; line < 4 * L * sizeof(E); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + kBlock) + line);
    for (int j = 0; j < 4; ++j) terms[j] = load(x + i + j * L) - max;
    exp4<T>(terms);
    for (int j = 0; j < 4; ++j) sums[j] += terms[j];
  }
  for (; i + L <= n; i += L) sums[0] += exp<T>(load(x + i) - max);
  if (i < n) sums[1] += exp<T>(load_first(x + i, n - i) - max);
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int lane = 0; lane < L; ++lane) sum += sums[0][lane];
  return sum;
}

template <class E> inline bool has_nan(const E* x, int64_t V) {
  for (int64_t i = 0; i < V; ++i)
    if (const Acc<E> value = value_at(x, i); value != value) return true;
  return false;
}

// x [V] -> (max, log sum exp(x - max)). A NaN gives NaN, +inf gives (+inf, 0), all -inf gives NaN.
template <class E> LogSumExp<Acc<E>> log_sum_exp(const E* x, int64_t V) {
  using T = Acc<E>;
  T max = -kInfinity<T>, sum = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    const T here = block_max(x + begin, n);
    if (here > max) {
      sum *= exp_one(max - here);
      max = here;
    }
    if (max == kInfinity<T>) break;
    // Nothing but -inf (and NaN) so far: subtract 0, since -inf - -inf would be NaN.
    sum += block_sum_exp(x + begin, n, max == -kInfinity<T> ? T(0) : max);
  }
  const T nan = kInfinity<T> - kInfinity<T>;
  if (max == kInfinity<T>) return has_nan(x, V) ? LogSumExp<T>{nan, nan} : LogSumExp<T>{max, T(0)};
  if (max == -kInfinity<T>) return {nan, nan};
  return {max, log(sum)};
}

// x [V], lse, scale -> out [V] = scale * exp(x - lse); the target's -1 is the caller's. out may be x.
template <class E> void scaled_softmax(const E* x, int64_t V, Acc<E> lse, Acc<E> scale, E* out) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  Vec4<T> p;
  int64_t i = 0;
  for (; i + 4 * L <= V; i += 4 * L) {
    for (int j = 0; j < 4; ++j) p[j] = load(x + i + j * L) - lse;
    exp4<T>(p);
    for (int j = 0; j < 4; ++j) store(out + i + j * L, p[j] * scale);
  }
  for (; i + L <= V; i += L) store(out + i, exp<T>(load(x + i) - lse) * scale);
  if (i < V) store_first(out + i, exp<T>(load_first(x + i, V - i) - lse) * scale, V - i);
}

}  // namespace WMTP_ISA
}  // namespace wmtp
