// Targets and weights of a token, and what they sum to.
#pragma once
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

// The rules, which wmtp/weightings knows by these names. To add one: a name here, in the enum, and a case of
// rule_weights.
enum Rule : int32_t { kUniform, kGiven, kAbsExcess, kSignedExcess };
constexpr const char* kRules[] = {"uniform", "given", "abs_excess", "signed_excess"};

inline int32_t rule_of(const char* name) {
  constexpr int32_t count = sizeof kRules / sizeof *kRules;
  for (int32_t rule = 0; rule < count; ++rule)
    if (!std::strcmp(kRules[rule], name)) return rule;
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
void softmax(const Inputs& in, const Token& token, T* w) {
  T max = -kInfinity<T>, sum = 0;
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0 && w[k] > max) max = w[k];
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0) sum += w[k] = exp_one((w[k] - max) / T(in.numbers[0]));
  for (int64_t k = 0; k < in.H; ++k)
    if (target_of(in, token, k) >= 0) w[k] /= sum;
}

// w_k of the heads whose cross entropies ce are there: all of the token's, or one row's.
template <class T>
void rule_weights(const Inputs& in, const Settings& set, const Token& token, Heads heads, const T* ce, T* w) {
  const T* const ref_ce = static_cast<const T*>(in.ref_ce) + token.b * in.ref_stride_b + token.t * in.ref_stride;
  for (int64_t k = heads.first; k < heads.last; ++k) {
    w[k] = 0;
    if (target_of(in, token, k) < 0) continue;
    switch (set.rule) {
      case kAbsExcess: w[k] = ce[k] >= ref_ce[k] ? ce[k] - ref_ce[k] : -(ce[k] - ref_ce[k]); break;
      case kSignedExcess: w[k] = ce[k] - ref_ce[k]; break;
    }
  }
  if (set.rule == kAbsExcess || set.rule == kSignedExcess) softmax(in, token, w);
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
