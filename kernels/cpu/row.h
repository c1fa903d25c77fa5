// One row of logits l [V], or one thread's part of it; x is what the softmax is of (numerics.h).
//   sum_exp:        l -> max x and sum exp(x - shift), the exponentials kept: one read from memory
//   write_softmax:  exponentials -> scale softmax(x) - mean: one write
// Both passes of a row meet in the caches: memory sees one read and one write.
#pragma once
#include <math.h>

#include <limits>

#include "numerics.h"
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

// What is asked of a row, besides the plain sum of exponentials of the logits as they are.
// kMasked: some x are -inf, whose 0 log 0 is 0.
enum Wanted : int { kCapped = 1, kMean = 2, kMetrics = 4, kScaled = 8, kMasked = 16 };

// sum = sum exp(x - shift), max - kSlack <= shift <= max. Special: max is infinite, or sum NaN.
template <class T> struct PartialSum {
  T max, shift, sum;
  T total;   // kMean: sum x
  T moment;  // kMetrics: sum (x - shift) exp(x - shift), and
  T most;    // the largest logit, which first stands at
  int64_t argmax;  // not before this column
};

// e [V] = exp(x - shift) dx / dl over the steepest of these, each block with its own shift. Null e: not kept.
template <class T> struct Exponentials { T *e, *shifts; };

// Kept apart, so that ce = (max - x_target) + log_sum loses nothing to a large max.
template <class T> struct LogSumExp {
  T max, sum, log_sum;  // sum = sum exp(x - max)
  T mean, entropy;
  int64_t argmax;
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
template <class T> inline T largest_lane(const Vec<T> (&v)[2]) {
  return fold<T>(larger(v[0], v[1]), [](auto a, auto b) { return a > b ? a : b; });
}
template <class T> inline T largest_lane(const Vec<T> (&v)[4]) {
  const Vec<T> halves[] = {larger(v[0], v[1]), larger(v[2], v[3])};
  return largest_lane<T>(halves);
}
template <class T> inline T sum_of_lanes(const Vec<T> (&v)[2]) {
  return fold<T>(v[0] + v[1], [](auto a, auto b) { return a + b; });
}
template <class T> inline T sum_of_lanes(const Vec<T> (&v)[4]) {
  const Vec<T> halves[] = {v[0] + v[1], v[2] + v[3]};
  return sum_of_lanes<T>(halves);
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

// N vectors' worth, into L1 (3) or L2 (2). A prefetch never faults.
template <class E, int N, int kLocality> inline void fetch(const E* next) {
  for (unsigned line = 0; line < N * kLanes<Acc<E>> * sizeof(E); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(next) + line, 0, kLocality);
}

// Vectors that go step by step together, and into how many sums: of more, with what else is wanted of them, registers
// spill.
template <int kWanted> constexpr int kTogether = kWanted & (kCapped | kMasked) ? 2 : 4;
template <int kWanted> constexpr int kSums = kWanted & ~kScaled ? 2 : 4;

// The sums over a block's columns.
template <class T, int N> struct BlockSums { Vec<T> most[N], sums[N], totals[N], moments[N]; };

template <class T> inline Vec<T> first_lanes_of(Vec<T> v, int64_t count) {
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (lane >= count) v[lane] = 0;
  return v;
}

// Columns l .. l + N vectors, or the n of them that are there: exp(x - shift), which goes to e as well.
// Capped ones in base 2: for these f is so, and shift.
template <class E, int kWanted, bool kWhole>
WMTP_INLINE void add_columns(const E* l, int64_t n, const Transform<Acc<E>>& f, Acc<E> shift, Acc<E>* e,
                             BlockSums<Acc<E>, kSums<kWanted>>& so_far) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>, N = kTogether<kWanted>, M = kSums<kWanted>;
  constexpr bool kBase2 = kWanted & kCapped;
  Vec<T> x[N], rest[N], below[N];
  const auto there = [&](int j) { return n < j * L ? 0 : n - j * L < L ? n - j * L : L; };
  const auto real = [&](Vec<T> v, int j) { return kWhole ? v : first_lanes_of<T>(v, there(j)); };
  for (int j = 0; j < N; ++j) x[j] = kWhole ? load(l + j * L) : load_first(l + j * L, there(j));
  for (int j = 0; j < N; ++j) so_far.most[j % M] = larger(x[j], so_far.most[j % M]);
  if constexpr (kWanted & kCapped) {
    for (int j = 0; j < N; ++j) x[j] = x[j] * f.slope + f.offset;
    tanh_each<E>(x, rest);
  }
  if constexpr (kWanted & kMean)
    for (int j = 0; j < N; ++j) so_far.totals[j % M] += real(x[j], j);
  if constexpr (kWanted & kCapped)
    for (int j = 0; j < N; ++j) x[j] = x[j] * f.amplitude - shift;
  else
    for (int j = 0; j < N; ++j) x[j] = (kWanted & kScaled ? x[j] * f.slope : x[j]) - shift;
  if constexpr (kWanted & kMasked)
    for (int j = 0; j < N; ++j) x[j] = larger(broadcast(kLowest<T, kBase2>), x[j]);
  exp_each<E, kBase2>(x, kWanted & kMetrics ? below : nullptr);
  if constexpr (kWanted & kCapped && !kWhole)  // elsewhere it is exp(-inf)
    for (int j = 0; j < N; ++j) x[j] = real(x[j], j);
  for (int j = 0; j < N; ++j) so_far.sums[j % M] += x[j];
  if constexpr (kWanted & kMetrics)
    for (int j = 0; j < N; ++j) so_far.moments[j % M] += x[j] * below[j];
  if (!e) return;
  if constexpr (kWanted & kCapped)
    for (int j = 0; j < N; ++j) x[j] *= rest[j];
  for (int j = 0; j < N; ++j)
    if (kWhole || j * L < n) store(e + j * L, x[j]);  // the last is padded to a whole vector
}

// `total` is sum tanh where capped, else sum l.
template <class E, int kWanted>
inline PartialSum<Acc<E>> sum_block(const E* l, int64_t n, Transform<Acc<E>> f, Acc<E> shift, Acc<E>* e) {
  using T = Acc<E>;
  if (kWanted & kCapped) shift = (shift - f.center) * T(kLog2E), f.amplitude *= T(kLog2E);
  constexpr int N = kTogether<kWanted>, M = kSums<kWanted>, step = N * kLanes<T>;
  BlockSums<T, M> sums = {};
  for (int j = 0; j < M; ++j) sums.most[j] = broadcast(-kInfinity<T>);
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    fetch<E, N, 3>(l + i + kBlock);  // the exponentials keep the core busy meanwhile
    add_columns<E, kWanted, true>(l + i, step, f, shift, e ? e + i : nullptr, sums);
  }
  if (i < n) add_columns<E, kWanted, false>(l + i, n - i, f, shift, e ? e + i : nullptr, sums);
  PartialSum<T> found = {};
  found.sum = sum_of_lanes<T>(sums.sums), found.most = largest_lane<T>(sums.most);
  if (kWanted & kMean) found.total = sum_of_lanes<T>(sums.totals);
  if (kWanted & kMetrics) found.moment = sum_of_lanes<T>(sums.moments) / T(kLog2E);
  return found;
}

template <class E> inline bool has_nan(const E* x, int64_t V) {
  for (int64_t i = 0; i < V; ++i)
    if (const Acc<E> value = value_at(x, i); value != value) return true;
  return false;
}

// Where the largest of l [V] first stands, from argmax on; V if nowhere.
template <class E> inline int64_t first_most(const E* l, int64_t V, const PartialSum<Acc<E>>& sums) {
  constexpr int L = kLanes<Acc<E>>;
  int64_t i = sums.argmax;
  while (i + L <= V && !any(load(l + i) == sums.most)) i += L;
  while (i < V && value_at(l, i) != sums.most) ++i;
  return i;
}

// A row of which some x is infinite, or all are -inf; its sums one after the other, for it is rare. A part that is
// all -inf, of a row that is not, is 0 throughout; the others are written from l.
template <class E>
PartialSum<Acc<E>> special_sum(const E* l, int64_t V, Exponentials<Acc<E>> keep, const Transform<Acc<E>>& f,
                               Acc<E> max, Acc<E> most) {
  using T = Acc<E>;
  for (int64_t i = 0; keep.e && i < V; ++i) keep.e[i] = 0, keep.shifts[i / kBlock] = max;
  PartialSum<T> found = {max, max, has_nan(l, V) ? kInfinity<T> - kInfinity<T> : T(0), 0, 0, most, 0};
  for (int64_t i = 0; i < V; ++i) found.total += transformed<E>(f, value_at(l, i)).x;
  return found;
}

template <class E, int kWanted>
PartialSum<Acc<E>> sum_exp(const E* l, int64_t V, Exponentials<Acc<E>> keep, const Transform<Acc<E>>& f) {
  using T = Acc<E>;
  T most = block_max(l, V < kProbe ? V : kProbe);
  if (!finite(transformed<E>(f, most).x)) most = block_max(l, V);  // a masked beginning
  const T first = transformed<E>(f, most).x;
  if (!finite(first)) return special_sum(l, V, keep, f, first, most);
  PartialSum<T> sums = {first, first, 0, 0, 0, -kInfinity<T>, 0};
  bool masked = false;
  const auto sum = [&](const E* part, int64_t n, T shift, T* e) {
    if constexpr (kWanted & kMetrics) {
      const PartialSum<T> found = masked ? PartialSum<T>{} : sum_block<E, kWanted>(part, n, f, shift, e);
      masked = masked || (found.moment != found.moment && found.sum == found.sum);
      return masked ? sum_block<E, kWanted | kMasked>(part, n, f, shift, e) : found;
    }
    return sum_block<E, kWanted>(part, n, f, shift, e);
  };
  for (int64_t begin = 0, block = 0; begin < V; begin += kBlock, ++block) {
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    T* const e = keep.e ? keep.e + begin : nullptr;
    PartialSum<T> here = sum(l + begin, n, sums.shift, e);
    const T max = here.most > sums.most ? transformed<E>(f, here.most).x : sums.max;
    if (max > sums.shift + kSlack) {
      if (!finite(max)) return special_sum(l, V, keep, f, max, here.most);
      const T by = sums.shift - max, factor = exp_one(by);
      sums.moment = factor * (sums.moment + by * sums.sum), sums.sum *= factor, sums.shift = max;
      here = sum(l + begin, n, max, e);
    }
    sums.sum += here.sum, sums.total += here.total, sums.moment += here.moment;
    if (here.most > sums.most) sums.most = here.most, sums.argmax = begin;
    sums.max = max > sums.max ? max : sums.max;
    if (e) keep.shifts[block] = sums.shift;
  }
  if (kWanted & kMean) sums.total = f.capped ? f.amplitude * sums.total + T(V) * f.center : f.slope * sums.total;
  return sums;
}

// The parts of one row of V columns -> the whole. A NaN gives NaN, +inf gives (+inf, 0), all -inf gives NaN.
template <class T> LogSumExp<T> combine(const PartialSum<T>* parts, int count, int64_t V) {
  T max = -kInfinity<T>, most = max, sum = 0, moment = 0, total = 0;
  int64_t argmax = 0;
  for (int i = 0; i < count; ++i) max = parts[i].max > max ? parts[i].max : max;
  for (int i = 0; i < count; ++i) {
    const PartialSum<T>& part = parts[i];
    const T factor = part.shift == max ? T(1) : exp_one(part.shift - max);
    sum += part.sum * factor, total += part.total;
    if (part.sum != 0) moment += factor * (part.moment + (part.shift - max) * part.sum);
    if (part.most > most) most = part.most, argmax = part.argmax;
  }
  const T nan = kInfinity<T> - kInfinity<T>, mean = total / T(V);
  if (sum != sum || max == -kInfinity<T>) return {nan, nan, nan, nan, nan, -1};
  if (max == kInfinity<T>) return {max, T(0), T(0), mean, nan, argmax};
  const T entropy = log(sum) - moment / sum;
  if (sum < 1) sum = 1;  // the largest term is 1: below it there is only rounding
  return {max, sum, log(sum), mean, entropy > 0 ? entropy : T(0), argmax};
}

// out [n] = e scale - less, while next [n] is prefetched into L2. past_caches: non-temporal stores, for a gradient too
// large to stay in the caches; its lines are then not read before they are overwritten.
template <class E>
void write_scaled(const Acc<E>* e, int64_t n, Acc<E> scale, Acc<E> less, bool past_caches, const E* next,
                  E* out) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>;
  const int64_t lead = int64_t(-reinterpret_cast<uintptr_t>(out) % 64 / sizeof(E));
  int64_t i = 0;
  for (; i + L <= lead && i + L <= n; i += L) store(out + i, load(e + i) * scale - less);
  if (i < lead && lead < n) store_first(out + i, load(e + i) * scale - less, lead - i), i = lead;
  for (; past_caches && i + 4 * L <= n; i += 4 * L) {
    fetch<E, 4, 2>(next + i);
    for (int j = 0; j < 4; ++j) store_past_caches(out + i + j * L, load(e + i + j * L) * scale - less);
  }
  if (past_caches) fence();
  for (; i + 4 * L <= n; i += 4 * L) {
    fetch<E, 4, 2>(next + i);
    for (int j = 0; j < 4; ++j) store(out + i + j * L, load(e + i + j * L) * scale - less);
  }
  for (; i + L <= n; i += L) store(out + i, load(e + i) * scale - less);
  if (i < n) store_first(out + i, load(e + i) * scale - less, n - i);
}

// out [n] = (exp(x - shift) scale - less) dx / dl, from the logits themselves. out may be l.
template <class E>
void write_exp(const E* l, int64_t n, const Transform<Acc<E>> f, Acc<E> shift, Acc<E> scale, Acc<E> less, E* out) {
  using T = Acc<E>;
  constexpr int L = kLanes<T>, N = 2;
  const T steepest = f.capped ? f.slope * f.amplitude : f.slope;
  for (int64_t i = 0; i < n; i += N * L) {
    const bool whole = i + N * L <= n;
    const auto there = [&](int j) { return n - i < j * L ? 0 : n - i - j * L < L ? n - i - j * L : L; };
    Vec<T> x[N], rest[N];
    for (int j = 0; j < N; ++j) x[j] = whole ? load(l + i + j * L) : load_first(l + i + j * L, there(j));
    for (int j = 0; j < N; ++j) x[j] = x[j] * f.slope + f.offset, rest[j] = broadcast(T(1));
    if (f.capped) {
      tanh_each<E>(x, rest);
      for (int j = 0; j < N; ++j) x[j] = x[j] * f.amplitude + f.center;
    }
    for (int j = 0; j < N; ++j) x[j] -= shift;
    exp_each<E>(x);
    for (int j = 0; j < N; ++j) x[j] = (x[j] * scale - less) * (rest[j] * steepest);
    for (int j = 0; j < N; ++j)
      if (whole)
        store(out + i + j * L, x[j]);
      else
        store_first(out + i + j * L, x[j], there(j));
  }
}

// out [V] = (of_row.softmax exp(x - max) / sum - of_row.mean) dx / dl, from the kept exponentials, of which some are
// as large as e^kSlack: where their factor is too small to have all its digits, or dx / dl is wanted by itself,
// from the logits. l [V] + next_row is what will be read next.
template <class E>
void write_softmax(Exponentials<Acc<E>> kept, int64_t V, const Transform<Acc<E>>& f, LogSumExp<Acc<E>> of,
                   RowScalars of_row, bool past_caches, const E* l, int64_t next_row, E* out) {
  using T = Acc<E>;
  const double steepest = f.capped ? double(f.slope) * f.amplitude : f.slope;
  const T from_logits = T(of_row.softmax / of.sum), less = T(of_row.mean);
  if (!kept.e) return write_exp(l, V, f, of.max, from_logits, less, out);
  for (int64_t begin = 0, end; begin < V; begin = end) {  // runs of blocks with one shift
    const T shift = kept.shifts[begin / kBlock];
    for (end = begin + kBlock; end < V && kept.shifts[end / kBlock] == shift;) end += kBlock;
    if (end > V) end = V;
    const T scale = T(of_row.softmax * steepest / of.sum * exp_one(shift - of.max));
    if (scale < kAllDigits<T> && -scale < kAllDigits<T>)
      write_exp(l + begin, end - begin, f, of.max, from_logits, less, out + begin);
    else
      write_scaled(kept.e + begin, end - begin, scale, T(of_row.mean * steepest), past_caches, l + next_row + begin,
                   out + begin);
  }
}

}  // namespace WMTP_ISA
}  // namespace wmtp
