// One row of logits x [V], or one thread's part of it.
//   sum_exp:        x -> max and sum exp(x - shift), the exponentials kept: one read from memory
//   write_softmax:  exponentials -> scale softmax(x): one write
// Both passes of a row meet in the caches: memory sees one read and one write.
#pragma once
#include <math.h>

#include <limits>

#include "simd.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

constexpr int64_t kProbe = 256;  // the first shift is the maximum of so many
constexpr int kSlack = 40;       // e^40 summed over 2^31 columns is far from overflow
template <class T> constexpr T kAllDigits = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();

inline float log(float x) { return ::logf(x); }
inline double log(double x) { return ::log(x); }

template <class T> inline T exp_one(T x) { return exp<T>(broadcast(x))[0]; }
template <class E> inline Acc<E> value_at(const E* x, int64_t i) { return load_first(x + i, 1)[0]; }
template <class T> inline bool finite(T x) { return x - x == 0; }

// sum = sum exp(x - shift), max - kSlack <= shift <= max. Special: max is infinite, or sum NaN.
template <class T> struct PartialSum { T max, shift, sum; };

// e [V] = exp(x - shift), each block with its own shift. Null e: not kept.
template <class T> struct Exponentials { T *e, *shifts; };

// Kept apart, so that ce = (max - x_target) + log_sum loses nothing to a large max.
template <class T> struct LogSumExp {
  T max, sum, log_sum;  // sum = sum exp(x - max)
  T lse() const { return max + log_sum; }
  T ce(T x_target) const { return (max - x_target) + log_sum; }
};

// The lanes of a vector, by halves: one after the other they would be most of a short row's time.
template <class T, class V, class F> inline T fold(V lanes, const F& both) {
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return both(lanes[0], lanes[1]);
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &lanes, sizeof lanes);
    return fold<T>(both(halves[0], halves[1]), both);
  }
}
template <class T> inline T largest_lane(const Vec4<T>& v) {
  return fold<T>(larger(larger(v[0], v[1]), larger(v[2], v[3])), [](auto a, auto b) { return a > b ? a : b; });
}
template <class T> inline T sum_of_lanes(const Vec4<T>& v) {
  return fold<T>((v[0] + v[1]) + (v[2] + v[3]), [](auto a, auto b) { return a + b; });
}

template <class E> inline Acc<E> block_max(const E* x, int64_t n) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  const Vec<T> lowest = broadcast(-kInfinity<T>);
  Vec4<T> most = {lowest, lowest, lowest, lowest};
  for (int64_t i = 0; i < n; i += L)
    most[0] = larger(i + L <= n ? load(x + i) : load_first(x + i, n - i), most[0]);
  return largest_lane<T>(most);
}

// Four vectors' worth, into L1 (3) or L2 (2). A prefetch never faults.
template <class E, int kLocality> inline void fetch4(const E* next) {
  for (unsigned line = 0; line < 4 * kLanes<Acc<E>> * sizeof(E); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(next) + line, 0, kLocality);
}

// sum exp(x - shift), which goes to e as well, and max x.
template <class E>
inline Acc<E> block_sum_exp(const E* x, int64_t n, Acc<E> shift, Acc<E>* e, Acc<E>* max) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  const Vec<T> lowest = broadcast(-kInfinity<T>);
  Vec4<T> most = {lowest, lowest, lowest, lowest}, sums = {}, terms;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    fetch4<E, 3>(x + i + kBlock);  // the exponentials keep the core busy meanwhile
    for (int j = 0; j < 4; ++j) terms[j] = load(x + i + j * L);
    for (int j = 0; j < 4; ++j) most[j] = larger(terms[j], most[j]);
    for (int j = 0; j < 4; ++j) terms[j] -= shift;
    exp4<E>(terms);
    for (int j = 0; j < 4; ++j) sums[j] += terms[j];
    if (e)
      for (int j = 0; j < 4; ++j) store(e + i + j * L, terms[j]);
  }
  for (; i < n; i += L) {
    const Vec<T> values = i + L <= n ? load(x + i) : load_first(x + i, n - i);
    const Vec<T> term = exp<E>(values - shift);
    most[0] = larger(values, most[0]);
    sums[0] += term;
    if (e) store(e + i, term);  // padded to a whole vector
  }
  *max = largest_lane<T>(most);
  return sum_of_lanes<T>(sums);
}

template <class E> inline bool has_nan(const E* x, int64_t V) {
  for (int64_t i = 0; i < V; ++i)
    if (const Acc<E> value = value_at(x, i); value != value) return true;
  return false;
}

template <class E>
PartialSum<Acc<E>> sum_exp(const E* x, int64_t V, Exponentials<Acc<E>> keep) {
  using T = Acc<E>;
  const auto special = [&](T max) {
    // A part that is all -inf, of a row that is not, is 0 throughout; the others are written from x.
    for (int64_t i = 0; keep.e && i < V; ++i) keep.e[i] = 0, keep.shifts[i / kBlock] = max;
    return PartialSum<T>{max, max, has_nan(x, V) ? kInfinity<T> - kInfinity<T> : T(0)};
  };
  T shift = block_max(x, V < kProbe ? V : kProbe);
  if (!finite(shift)) shift = block_max(x, V);  // a masked beginning
  if (!finite(shift)) return special(shift);
  T max = shift, sum = 0;
  for (int64_t begin = 0, block = 0; begin < V; begin += kBlock, ++block) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    T* const e = keep.e ? keep.e + begin : nullptr;
    T here, part = block_sum_exp(x + begin, n, shift, e, &here);
    if (here > shift + kSlack) {
      if (!finite(here)) return special(here);
      sum *= exp_one(shift - here);
      shift = here;
      part = block_sum_exp(x + begin, n, shift, e, &here);
    }
    sum += part;
    max = here > max ? here : max;
    if (e) keep.shifts[block] = shift;
  }
  return {max, shift, sum};
}

// The parts of one row -> the whole. A NaN gives NaN, +inf gives (+inf, 0), all -inf gives NaN.
template <class T> LogSumExp<T> combine(const PartialSum<T>* parts, int count) {
  T max = -kInfinity<T>, sum = 0;
  for (int i = 0; i < count; ++i) max = parts[i].max > max ? parts[i].max : max;
  for (int i = 0; i < count; ++i)
    sum += parts[i].sum * (parts[i].shift == max ? T(1) : exp_one(parts[i].shift - max));
  const T nan = kInfinity<T> - kInfinity<T>;
  if (sum != sum || max == -kInfinity<T>) return {nan, nan, nan};
  if (max == kInfinity<T>) return {max, T(0), T(0)};
  if (sum < 1) sum = 1;  // the largest term is 1: below it there is only rounding
  return {max, sum, log(sum)};
}

// out [n] = e scale, while next [n] is prefetched into L2. past_caches: non-temporal stores, for a gradient too
// large to stay in the caches; its lines are then not read before they are overwritten.
template <class E>
void write_scaled(const Acc<E>* e, int64_t n, Acc<E> scale, bool past_caches, const E* next,
                  E* out) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  const int64_t lead = int64_t(-reinterpret_cast<uintptr_t>(out) % 64 / sizeof(E));
  int64_t i = 0;
  for (; i + L <= lead && i + L <= n; i += L) store(out + i, load(e + i) * scale);
  if (i < lead && lead < n) store_first(out + i, load(e + i) * scale, lead - i), i = lead;
  for (; past_caches && i + 4 * L <= n; i += 4 * L) {
    fetch4<E, 2>(next + i);
    for (int j = 0; j < 4; ++j) store_past_caches(out + i + j * L, load(e + i + j * L) * scale);
  }
  if (past_caches) fence();
  for (; i + 4 * L <= n; i += 4 * L) {
    fetch4<E, 2>(next + i);
    for (int j = 0; j < 4; ++j) store(out + i + j * L, load(e + i + j * L) * scale);
  }
  for (; i + L <= n; i += L) store(out + i, load(e + i) * scale);
  if (i < n) store_first(out + i, load(e + i) * scale, n - i);
}

// out [n] = exp(x - shift) scale, from x itself. out may be x.
template <class E> void write_exp(const E* x, int64_t n, Acc<E> shift, Acc<E> scale, E* out) {
  constexpr int L = kLanes<Acc<E>>;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    store_first(out + i, exp<E>(load_first(x + i, count) - shift) * scale, count);
  }
}

// out [V] = c exp(x - max) / sum, from the kept exponentials, of which some are as large as e^kSlack: where
// their factor is too small to have all its digits, from x. x [V] + next_row is what will be read next.
template <class E>
void write_softmax(Exponentials<Acc<E>> kept, int64_t V, LogSumExp<Acc<E>> of, double c, bool past_caches,
                   const E* x, int64_t next_row, E* out) {
  using T = Acc<E>;
  for (int64_t begin = 0, end; begin < V; begin = end) {  // runs of blocks with one shift
    const T shift = kept.shifts[begin / kBlock];
    for (end = begin + kBlock; end < V && kept.shifts[end / kBlock] == shift;) end += kBlock;
    if (end > V) end = V;
    const T scale = T(c / of.sum * exp_one(shift - of.max));
    if (scale < kAllDigits<T> && -scale < kAllDigits<T>)
      write_exp(x + begin, end - begin, of.max, T(c / of.sum), out + begin);
    else
      write_scaled(kept.e + begin, end - begin, scale, past_caches, x + next_row + begin, out + begin);
  }
}

}  // namespace WMTP_ISA
}  // namespace wmtp
