// Targets and weights of a token, and what they sum to.
#pragma once
#include <cmath>

#include "row.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

struct Token { int64_t index, b, t; };  // index = b S + t

inline Token token_at(const Inputs& in, int64_t index) { return {index, index / in.S, index % in.S}; }

inline int64_t target_of(const Inputs& in, const Token& token, int64_t k) {
  return target_of(in, token.b, token.t, k);
}

inline bool has_target(const Inputs& in, const Token& token) {
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0) return true;
  return false;
}

// The rules, which wmtp/weightings knows by these names, and how many numbers each has. To add one: a name here, in
// the enum, and a case of weights_of.
enum Rule : int32_t { kUniform, kGiven, kAbsExcess, kSignedExcess, kDft, kFocal, kEntropyGate, kDPace, kRules };
struct NamedRule { const char* name; int numbers; };
constexpr NamedRule kNamedRules[kRules] = {{"uniform", 0}, {"given", 0}, {"abs_excess", 1},   {"signed_excess", 1},
                                           {"dft", 0},     {"focal", 1}, {"entropy_gate", 1}, {"dpace", 2}};

// A product of two rules, "a*b", is a + kRules (b + 1).
inline int32_t rule_of(const char* name) {
  const char* const star = std::strchr(name, '*');
  const size_t length = star ? size_t(star - name) : std::strlen(name);
  for (int32_t rule = 0; rule < kRules; ++rule) {
    const char* const known = kNamedRules[rule].name;
    if (std::strlen(known) != length || std::strncmp(known, name, length)) continue;
    const int32_t second = star ? rule_of(star + 1) : -1;
    return second == -2 || second >= kRules ? -2 : rule + kRules * (second + 1);
  }
  return -2;
}

// w_k of a known rule, or what that of another is multiplied by.
template <class T>
T known_weight(const Inputs& in, const Token& token, int64_t k) {
  if (target_of(in, token, k) < 0) return 0;
  return in.head_weights ? static_cast<const T*>(in.head_weights)[token.index * in.H + k] : T(1);
}

template <class T> T head_scale(const Inputs& in, int64_t k) {
  return in.head_scale ? static_cast<const T*>(in.head_scale)[k] : T(1);
}

template <class T> inline T size(T w) { return w < 0 ? -w : w; }

// w times a factor that may be infinite.
template <class T> inline T times(T w, double factor) { return w != 0 ? T(w * factor) : T(0); }

// A token's heads [first, last).
struct Heads { int64_t first, last; };

// w_k = softmax over valid k of score_k / temperature, score being w as it comes.
template <class T>
void softmax(const Inputs& in, const Token& token, T temperature, T* w) {
  T max = -kInfinity<T>, sum = 0;
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0 && w[k] > max) max = w[k];
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0) sum += w[k] = exp_one((w[k] - max) / temperature);
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0) w[k] /= sum;
}

// w_k = sum over valid j >= k of the products of (1 - alpha) p_i + alpha over valid i <= j, from `first` on, before it
// 1; p being w as it comes.
template <class T>
void sums_of_products(const Inputs& in, const Token& token, const double* numbers, T* w) {
  const T alpha = T(numbers[0]);
  const int64_t first = int64_t(numbers[1]);
  T reached = 1, later = 0;
  for (int64_t k = 0; k < in.H; ++k) {
    if (target_of(in, token, k) < 0) continue;
    if (k >= first) reached *= (1 - alpha) * w[k] + alpha;
    w[k] = k >= first ? reached : T(1);
  }
  for (int64_t k = in.H - 1; k >= first && k >= 0; --k)
    if (target_of(in, token, k) >= 0) w[k] = later += w[k];
}

// What the weight of a pair follows from.
template <class T> struct Pair { T ce, ref_ce, entropy; };

// Of a rule whose scope is a token: what its weights are made of then.
template <class T> T weight_of(int32_t rule, const double* numbers, const Pair<T>& pair) {
  const T ce = pair.ce < 0 ? T(0) : pair.ce, excess = pair.ce - pair.ref_ce;
  switch (rule) {
    case kAbsExcess: return pair.ce >= pair.ref_ce ? excess : -excess;
    case kSignedExcess: return excess;
    case kDft: case kDPace: return std::exp(-ce);
    case kFocal: return T(std::pow(-std::expm1(-double(ce)), numbers[0]));
    case kEntropyGate: {
      const double gate = pair.entropy / 2.995732273553991;  // ln 20
      return T(std::pow(gate > 1 ? 1 : gate < 0 ? 0 : gate, numbers[0]));
    }
    default: return 1;
  }
}

// w_k of the heads whose statistics are there: all of the token's, or one row's.
template <class T>
void weights_of(int32_t rule, const double* numbers, const Inputs& in, const Token& token, Heads heads, const T* ce,
                const LogSumExp<T>* stats, T* w) {
  const T* const ref_ce = static_cast<const T*>(in.ref_ce) + token.b * in.ref_stride_b + token.t * in.ref_stride;
  for (int64_t k = heads.first; k < heads.last; ++k) {
    w[k] = 0;
    if (target_of(in, token, k) < 0) continue;
    w[k] = weight_of(rule, numbers, Pair<T>{ce[k], in.ref_ce ? ref_ce[k] : T(0), stats[shared_heads(in) ? 0 : k].entropy});
  }
  if (rule == kAbsExcess || rule == kSignedExcess) softmax(in, token, T(numbers[0]), w);
  if (rule == kDPace) sums_of_products(in, token, numbers, w);
}

// w_k of a rule or a product of two, times head_weights; `other` [H] is used.
template <class T>
void rule_weights(const Inputs& in, const Settings& set, const Token& token, Heads heads, const T* ce,
                  const LogSumExp<T>* stats, T* other, T* w) {
  const int32_t first = set.rule % kRules, second = set.rule / kRules - 1;
  weights_of(first, in.numbers, in, token, heads, ce, stats, w);
  if (second >= 0) {
    weights_of(second, in.numbers + kNamedRules[first].numbers, in, token, heads, ce, stats, other);
    for (int64_t k = heads.first; k < heads.last; ++k) w[k] = w[k] != 0 && other[k] != 0 ? w[k] * other[k] : T(0);
  }
  for (int64_t k = heads.first; k < heads.last && in.head_weights; ++k) {
    const T factor = known_weight<T>(in, token, k);
    w[k] = factor != 0 ? w[k] * factor : T(0);
  }
}

// Of their sizes: weights may be negative.
template <class T> double sum_of(const T* w, Heads heads) {
  double sum = 0;
  for (int64_t k = heads.first; k < heads.last; ++k) sum += size(w[k]);
  return sum;
}

template <class T> bool counts(T weight_sum) { return !(weight_sum <= T(1e-8)); }  // so does NaN

// w -> d token_loss / d ce, 0 for 0 whatever their sum. In double there is no sum of float weights that is out
// of range.
template <class T>
void to_row_scalars(const Settings& set, double weight_sum, int64_t H, T* w) {
  if (set.reduction != kTokenMean) return;
  for (int64_t k = 0; k < H; ++k) w[k] = counts(T(weight_sum)) && w[k] != 0 ? T(w[k] / weight_sum) : T(0);
}

// Known before the first logit is read: weights that follow from the cross entropies sum to 1 over a token,
// or divide nothing.
struct Totals {
  int64_t live;         // tokens with a target
  double denominator;   // what divides the sum of the token losses
  double largest;       // no d token_loss / d ce is larger
};

template <class T> Totals find_totals(const Inputs& in, const Settings& set) {
  int64_t live = 0, counted = 0;
  double total = 0, largest = 0, largest_scale = 0;
  for (int64_t i = 0; i < in.B * in.S; ++i) {
    const Token token = token_at(in, i);
    const bool lives = has_target(in, token);
    double weight_sum = 0;
    for (int64_t k = 0; k < in.H && set.known; ++k) {
      const T w = size(known_weight<T>(in, token, k));
      weight_sum += w;
      largest = w > largest && finite(w) ? w : largest;
    }
    if (!set.known) weight_sum = lives;
    live += lives;
    counted += counts(T(weight_sum));
    total += weight_sum;
  }
  if (set.reduction == kTokenMean || !set.known) largest = 1;
  for (int64_t k = 0; k < in.H; ++k) {
    const double scale = size(head_scale<T>(in, k));
    largest_scale = scale > largest_scale ? scale : largest_scale;
  }
  largest *= largest_scale;
  const bool by_token = set.reduction == kTokenMean;
  if (by_token ? !counted : total == 0) return {live, 1, largest};  // nothing weighs: 0 over whatever is 0
  if (in.has_normalizer) return {live, in.normalizer, largest};
  return {live, by_token ? double(counted) : set.reduction == kWeightMean ? total : 1, largest};
}

}  // namespace WMTP_ISA
}  // namespace wmtp
