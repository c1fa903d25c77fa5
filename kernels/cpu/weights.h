// Targets and weights of a token, and what they sum to.
#pragma once
#include "row.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

inline int64_t target_of(const Rows& r, int64_t token, int64_t k) {  // -1: no valid target
  if (token % r.S + k + 1 >= r.S) return -1;
  const int64_t id = r.target_ids[token + k + 1];
  return id == r.ignore_index ? -1 : id;
}

inline bool has_target(const Rows& r, int64_t token) {
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) return true;
  return false;
}

// w [H] where they do not depend on the cross entropies.
template <class T>
void known_weights(const Rows& r, const Weighting& how, int64_t token, T* w) {
  const T* given = static_cast<const T*>(how.head_weights);
  for (int64_t k = 0; k < r.H; ++k)
    w[k] = target_of(r, token, k) < 0 ? T(0) : given ? given[token * r.H + k] : T(1);
}

// w_k = softmax over valid k of excess_k / temperature, ref_ce [H] being the token's first.
template <class T>
void excess_weights(const Rows& r, const Weighting& how, int64_t token, const T* ce, T* w) {
  const T* ref_ce = static_cast<const T*>(how.ref_ce) + token - token / r.S;  // [B, S - 1]
  T max = -kInfinity<T>, sum = 0;
  for (int64_t k = 0; k < r.H; ++k) {
    w[k] = 0;
    if (target_of(r, token, k) < 0) continue;
    const T excess = ce[k] - ref_ce[k];
    w[k] = (how.is_signed || excess >= 0 ? excess : -excess) / T(how.temperature);
    if (w[k] > max) max = w[k];
  }
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) sum += w[k] = exp_one(w[k] - max);
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) w[k] /= sum;
}

template <class T> T sum_of(const T* w, int64_t H) {
  T sum = 0;
  for (int64_t k = 0; k < H; ++k) sum += w[k];
  return sum;
}

template <class T> bool counts(T weight_sum) { return !(weight_sum <= T(1e-8)); }  // so does NaN

// w -> d token_loss / d ce.
template <class T>
void to_row_scalars(const Weighting& how, T weight_sum, int64_t H, T* w) {
  if (how.reduction != kTokenMean) return;
  for (int64_t k = 0; k < H; ++k) w[k] = counts(weight_sum) ? w[k] / weight_sum : T(0);
}

// Known before the first logit is read, since excess weights sum to 1.
struct Totals {
  int64_t live;         // tokens with a target
  double denominator;   // what divides the sum of the token losses
  double largest;       // no d token_loss / d ce is larger
};

template <class T> Totals find_totals(const Rows& r, const Weighting& how) {
  T* w = static_cast<T*>(__builtin_alloca(r.H * sizeof(T)));
  int64_t live = 0, counted = 0;
  double total = 0, largest = 0;
  for (int64_t token = 0; token < r.B * r.S; ++token) {
    known_weights(r, how, token, w);
    const bool lives = has_target(r, token);
    const T weight_sum = how.ref_ce ? T(lives) : sum_of(w, r.H);
    live += lives;
    counted += counts(weight_sum);
    total += weight_sum;
    for (int64_t k = 0; k < r.H; ++k) largest = w[k] > largest ? w[k] : largest;
  }
  if (how.reduction == kTokenMean || how.ref_ce) largest = 1;
  if (how.has_normalizer) return {live, how.normalizer, largest};
  if (how.reduction == kTokenMean) return {live, counted ? double(counted) : 1, largest};
  return {live, how.reduction == kWeightMean && total != 0 ? total : 1, largest};
}

}  // namespace WMTP_ISA
}  // namespace wmtp
