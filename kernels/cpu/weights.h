// Targets and weights of a token, and what they sum to.
#pragma once
#include "row.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

struct Token {
  int64_t index, b, t;   // index = b S + t
  const int64_t* ahead;  // head k predicts ahead[k],
  int64_t count;         // if k < count
};

inline Token token_at(const Rows& r, int64_t index) {
  const int64_t b = index / r.S, t = index - b * r.S;
  return {index, b, t, r.target_ids + b * r.T + t + 1, r.T - 1 - t};
}

inline int64_t target_of(const Rows& r, const Token& token, int64_t k) {  // -1: no valid target
  return k < token.count && token.ahead[k] != r.ignore_index ? token.ahead[k] : -1;
}

inline bool has_target(const Rows& r, const Token& token) {
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) return true;
  return false;
}

// w_k where it does not depend on the cross entropies.
template <class T>
T known_weight(const Rows& r, const Weighting& how, const Token& token, int64_t k) {
  if (target_of(r, token, k) < 0) return 0;
  return how.head_weights ? static_cast<const T*>(how.head_weights)[token.index * r.H + k] : T(1);
}

// w_k = softmax over valid k of excess_k / temperature, ref_ce [H] being the token's first.
template <class T>
void excess_weights(const Rows& r, const Weighting& how, const Token& token, const T* ce, T* w) {
  const T* ref_ce = static_cast<const T*>(how.ref_ce) + token.b * (r.T - 1) + token.t;
  T max = -kInfinity<T>, sum = 0;
  for (int64_t k = 0; k < r.H; ++k) {
    w[k] = 0;
    if (target_of(r, token, k) < 0) continue;
    const T excess = ce[k] - ref_ce[k];
    w[k] = how.is_signed || excess >= 0 ? excess : -excess;
    if (w[k] > max) max = w[k];
  }
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) sum += w[k] = exp_one((w[k] - max) / T(how.temperature));
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) w[k] /= sum;
}

template <class T> T sum_of(const T* w, int64_t H) {
  T sum = 0;
  for (int64_t k = 0; k < H; ++k) sum += w[k];
  return sum;
}

template <class T> bool counts(T weight_sum) { return !(weight_sum <= T(1e-8)); }  // so does NaN

// w -> d token_loss / d ce. In double there is no sum of float weights that is out of range.
template <class T>
void to_row_scalars(const Weighting& how, double weight_sum, int64_t H, T* w) {
  if (how.reduction != kTokenMean) return;
  for (int64_t k = 0; k < H; ++k) w[k] = counts(T(weight_sum)) ? T(w[k] / weight_sum) : T(0);
}

// Known before the first logit is read, since excess weights sum to 1.
struct Totals {
  int64_t live;         // tokens with a target
  double denominator;   // what divides the sum of the token losses
  double largest;       // no d token_loss / d ce is larger
};

template <class T> Totals find_totals(const Rows& r, const Weighting& how) {
  int64_t live = 0, counted = 0;
  double total = 0, largest = 0;
  for (int64_t i = 0; i < r.B * r.S; ++i) {
    const Token token = token_at(r, i);
    const bool lives = has_target(r, token);
    double weight_sum = 0;
    for (int64_t k = 0; k < r.H && !how.ref_ce; ++k) {
      const T w = known_weight<T>(r, how, token, k);
      weight_sum += w;
      largest = w > largest ? w : largest;
    }
    if (how.ref_ce) weight_sum = lives;
    live += lives;
    counted += counts(T(weight_sum));
    total += weight_sum;
  }
  if (how.reduction == kTokenMean || how.ref_ce) largest = 1;
  const bool by_token = how.reduction == kTokenMean;
  if (by_token ? !counted : total == 0) return {live, 1, largest};  // nothing weighs: 0 over whatever is 0
  if (how.has_normalizer) return {live, how.normalizer, largest};
  return {live, by_token ? double(counted) : how.reduction == kWeightMean ? total : 1, largest};
}

}  // namespace WMTP_ISA
}  // namespace wmtp
