// The loop over tokens, compiled once per instruction set. A token (b, t) has H rows of logits [V]:
//   ce_k       = logsumexp(x_k) - x_k[target_k]                              valid k, else 0; x: numerics.h
//   f_k        = ce_k | (1 - eps) ce_k + eps (logsumexp(x_k) - mean x_k) + z logsumexp(x_k)^2
//   w_k        = 1 | head_weights[b,t,k] | softmax over valid k of excess_k / temperature, times head_weights
//   row_scalar = w_k / sum_k w_k  (0 when the sum is <= 1e-8), or w_k;  times head_scale[k], over the denominator
//   loss       = sum row_scalar f
//   d loss / d row_k = row_scalar_k d f_k / d row_k;  d ce_k / d x_k = softmax(x_k) - onehot(target_k)
// The gradient is written while the row's exponentials are in the caches: row by row where the weights
// are known, token by token where they follow from all of the token's cross entropies.
// A row without a valid target is not read. Targets are checked before (dispatch.cpp).
#include <cmath>
#include <type_traits>

#include "row.h"
#include "threads.h"
#include "weights.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

template <class E> inline const E* row_of(const Inputs& in, const Token& token, int64_t k) {
  const int64_t head = in.head_offsets ? in.head_offsets[k] : k * in.stride_h;
  return static_cast<const E*>(in.logits) + token.b * in.stride_b + token.t * in.stride_s + head;
}

// The heads that a row of logits serves: all of them, or the one.
inline Heads heads_of(const Inputs& in, int64_t row) {
  return shared_heads(in) ? Heads{0, in.H} : Heads{row, row + 1};
}

inline bool row_has_target(const Inputs& in, const Token& token, int64_t row) {
  for (int64_t k = heads_of(in, row).first; k < heads_of(in, row).last; ++k)
    if (target_of(in, token, k) >= 0) return true;
  return false;
}

template <class E> E* gradient_row(const Inputs& in, const Outputs& out, const Token& token, int64_t row) {
  if (out.grad == in.logits) return const_cast<E*>(row_of<E>(in, token, row));
  return static_cast<E*>(out.grad) + (token.index * (shared_heads(in) ? 1 : in.H) + row) * out.grad_stride;
}

// The exponentials have the alignment of the gradient's row, which for an odd V starts anywhere: the loop that
// stores the gradient then loads and stores whole aligned vectors.
template <class E> Exponentials<Acc<E>> exponentials(const Team& team, int64_t slot, const E* grad_row) {
  using T = Acc<E>;
  T* const kept = reinterpret_cast<T*>(team.kept + slot * team.row_bytes);
  const int64_t lead = reinterpret_cast<uintptr_t>(grad_row) / sizeof(E) % kLanes<T>;
  return {kept + lead, kept + (team.end - team.begin) + 2 * kPadding};
}

// What is known of a token's rows once they are read: by row the statistics, by head the rest.
template <class T> struct TokenState {
  LogSumExp<T>* stats;
  Point<T>* target;  // its x
  T *ce, *f, *w, *c;
};
static_assert(sizeof(LogSumExp<double>) + sizeof(Point<double>) + 4 * sizeof(double) <= kHeadBytes);
static_assert(sizeof(PartialSum<double>) <= kPartialBytes);

// Whose dx / dl is wanted apart from their exponentials: these are not kept, but made of the logits once more.
inline bool keeps_exponentials(const Numerics& n) { return n.amplitude == 0 || n.label_smoothing == 0; }

template <class E>
PartialSum<Acc<E>> sum_exp(const Settings& set, const E* l, int64_t V, Exponentials<Acc<E>> keep) {
  const Numerics& n = set.numerics;
  const Transform<Acc<E>> f(n);
  const auto sum = [&](auto of_x) {
    constexpr int kOfX = decltype(of_x)::value;
    if (n.label_smoothing != 0 && set.metrics) return sum_exp<E, kOfX + kMean + kMetrics>(l, V, keep, f);
    if (n.label_smoothing != 0) return sum_exp<E, kOfX + kMean>(l, V, keep, f);
    if (set.metrics) return sum_exp<E, kOfX + kMetrics>(l, V, keep, f);
    return sum_exp<E, kOfX>(l, V, keep, f);
  };
  if (f.capped) return sum(std::integral_constant<int, kCapped>());
  if (f.slope != 1) return sum(std::integral_constant<int, kScaled>());
  return sum(std::integral_constant<int, 0>());
}

template <class T> T averaged(const Numerics& n, const LogSumExp<T>& stats, T ce) {
  T f = ce;
  if (n.label_smoothing != 0)
    f = T((1 - n.label_smoothing) * ce + n.label_smoothing * ((stats.max - stats.mean) + stats.log_sum));
  if (n.z_loss != 0) f += T(n.z_loss) * stats.lse() * stats.lse();
  return f;
}

// Rows [first, last) of a token -> statistics and cross entropies. All reading of x for them is done when
// this returns, by every thread: in place, it may be overwritten then.
template <class E>
void read_rows(const Inputs& in, const Settings& set, const Outputs& out, const Token& token, Heads rows,
               const Team& team, const TokenState<Acc<E>>& state) {
  using T = Acc<E>;
  const bool keeps = out.grad && keeps_exponentials(set.numerics);
  PartialSum<T>* const sums =
      reinterpret_cast<PartialSum<T>*>(team.partial_sums) + team.turn * in.H * team.size;
  bool live = false;
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const E* l = row_of<E>(in, token, row);
    T asked = -kInfinity<T>;  // the largest logit of a target
    live |= row_has_target(in, token, row);
    for (int64_t k = heads_of(in, row).first; k < heads_of(in, row).last; ++k) {
      const int64_t target = target_of(in, token, k);
      if (target < 0) continue;
      state.target[k] = transformed<E>(Transform<T>(set.numerics), value_at(l, target));
      if (value_at(l, target) > asked) asked = value_at(l, target);
    }
    if (!row_has_target(in, token, row)) continue;
    Exponentials<T> keep = {};
    if (keeps) keep = exponentials(team, row - rows.first, gradient_row<E>(in, out, token, row));
    PartialSum<T>& mine = sums[row * team.size + team.rank];
    mine = sum_exp<E>(set, l + team.begin, team.end - team.begin, keep);
    if (!set.metrics) continue;
    const bool hit = asked >= mine.most;  // or no target is where the largest stands
    mine.argmax = hit ? team.begin + first_most(l + team.begin, team.end - team.begin, mine) : -1;
  }
  if (live) team.barrier();
  for (int64_t row = rows.first; row < rows.last; ++row) {
    if (row_has_target(in, token, row)) state.stats[row] = combine(sums + row * team.size, team.size, in.V);
    for (int64_t k = heads_of(in, row).first; k < heads_of(in, row).last; ++k) {
      const bool valid = target_of(in, token, k) >= 0;
      state.ce[k] = valid ? state.stats[row].ce(state.target[k].x) : T(0);
      state.f[k] = valid ? averaged(set.numerics, state.stats[row], state.ce[k]) : T(0);
    }
  }
}

// A new gradient of this size is out of the caches before anybody reads it.
constexpr int64_t kPastCachesBytes = int64_t(32) << 20;

// out [V] = sum_k c_k d f_k / d l over the row's heads k: this thread's columns. A row of which every c is 0 gives
// exactly 0, NaN and infinities too. The row that is mostly read next, `next_row` elements further, is prefetched
// meanwhile.
template <class E>
void write_gradient(const Inputs& in, const Settings& set, const Token& token, int64_t row, const Team& team,
                    Exponentials<Acc<E>> kept, const TokenState<Acc<E>>& state, int64_t next_row, E* out) {
  using T = Acc<E>;
  const int64_t rows = in.B * in.S * (shared_heads(in) ? 1 : in.H);
  const bool past_caches = out != row_of<E>(in, token, row) &&
                           rows * in.V * int64_t(sizeof(E)) >= kPastCachesBytes;
  const LogSumExp<T>& stats = state.stats[row];
  const Transform<T> f(set.numerics);
  const int64_t columns = team.end - team.begin;
  const Heads heads = heads_of(in, row);
  const auto scalars = [&](int64_t k) { return row_scalars(set.numerics, state.c[k], stats.lse(), in.V); };
  RowScalars all;
  bool weighs = false;
  for (int64_t k = heads.first; k < heads.last; ++k) {
    if (target_of(in, token, k) < 0 || state.c[k] == 0) continue;
    all += scalars(k);
    weighs = true;
  }
  const E* l = row_of<E>(in, token, row) + team.begin;
  if (weighs && !finite(stats.lse()))
    write_exp(l, columns, f, stats.lse(), T(all.softmax), T(all.mean), out + team.begin);
  else if (all.softmax != 0 || all.mean != 0)
    write_softmax(kept, columns, f, stats, all, past_caches, l, next_row, out + team.begin);
  else
    std::memset(out + team.begin, 0, columns * sizeof(E));
  if (!weighs) return;
  for (int64_t k = heads.first; k < heads.last; ++k) {
    const int64_t target = target_of(in, token, k);
    if (target < team.begin || target >= team.end) continue;
    const Point<T> point = state.target[k];
    const T p = finite(stats.lse()) ? exp_one(point.x - stats.max) / stats.sum : exp_one(point.x - stats.lse());
    RowScalars own;
    for (int64_t j = heads.first; j < heads.last; ++j)  // heads may predict the same id
      if (target_of(in, token, j) == target && state.c[j] != 0) own += scalars(j);
    // Where f is ce: exactly 0 where p is 1.
    const double column = own.softmax * (p - 1) + (own.softmax - own.target) + (all.softmax - own.softmax) * p - all.mean;
    store_first(out + target, broadcast(T(column * point.steep)), 1);
  }
}

template <class T>
void write_token(const Inputs& in, const Outputs& out, const Token& token, double weight_sum, double inverse,
                 const TokenState<T>& state, double* loss_of_token) {
  double loss = 0;
  for (int64_t k = 0; k < in.H; ++k) {
    const bool valid = target_of(in, token, k) >= 0;
    const LogSumExp<T>& stats = state.stats[shared_heads(in) ? 0 : k];
    const int64_t head = token.index * in.H + k;
    if (state.w[k] != 0) loss += double(state.w[k]) * state.f[k];
    static_cast<T*>(out.ce)[head] = state.ce[k];
    static_cast<T*>(out.row_max)[head] = valid ? stats.max : T(0);
    static_cast<T*>(out.log_sum)[head] = valid ? stats.log_sum : T(0);
    static_cast<T*>(out.row_scalar)[head] = times(state.w[k], inverse);
    if (out.row_loss) static_cast<T*>(out.row_loss)[head] = state.f[k];
    if (!out.entropy) continue;
    static_cast<T*>(out.entropy)[head] = valid ? stats.entropy : T(0);
    out.correct[head] = valid && stats.argmax == target_of(in, token, k);
  }
  loss_of_token[token.index] = loss;
  static_cast<T*>(out.token_loss)[token.index] = T(loss);
  static_cast<T*>(out.weight_sum)[token.index] = T(weight_sum);
  out.valid_mask[token.index] = counts(T(weight_sum));
}

// state.w: weights, and then d token_loss / d f; state.c: d loss / d f, as the gradient is written.
template <class E>
void token_pass(const Inputs& in, const Settings& set, const Outputs& out, const Token& token, const Team& team,
                double inverse, double scale, double* loss_of_token) {
  using T = Acc<E>;
  const int64_t rows = shared_heads(in) ? 1 : in.H, step = waiting_rows(in, set);
  const int64_t next_row = step == rows ? in.stride_s : in.stride_h;
  LogSumExp<T>* const stats = reinterpret_cast<LogSumExp<T>*>(team.numbers);
  Point<T>* const targets = reinterpret_cast<Point<T>*>(stats + in.H);
  T* const numbers = reinterpret_cast<T*>(targets + in.H);
  const TokenState<T> state = {stats,   targets, numbers, numbers + in.H, numbers + 2 * in.H, numbers + 3 * in.H};
  double weight_sum = 0;
  if (set.known) {
    for (int64_t k = 0; k < in.H; ++k) state.w[k] = known_weight<T>(in, token, k);
    weight_sum = sum_of(state.w, Heads{0, in.H});
    to_row_scalars(set, weight_sum, in.H, state.w);
  }
  for (int64_t first = 0; first < rows; first += step) {
    const Heads heads = rows == 1 ? Heads{0, in.H} : Heads{first, first + step};
    read_rows<E>(in, set, out, token, Heads{first, first + step}, team, state);
    if (!set.known) {
      rule_weights(in, set, token, heads, state.ce, state.stats, state.c, state.w);
      weight_sum += sum_of(state.w, heads);
    }
    if (set.sums_to_one) {
      if (finite(weight_sum)) weight_sum = has_target(in, token);
      to_row_scalars(set, weight_sum, in.H, state.w);
    }
    for (int64_t k = heads.first; k < heads.last; ++k) {
      if (in.head_scale) state.w[k] = times(state.w[k], double(head_scale<T>(in, k)));
      state.c[k] = times(state.w[k], scale);
    }
    for (int64_t row = first; row < first + step && out.grad; ++row) {
      E* const grad_row = gradient_row<E>(in, out, token, row);
      Exponentials<T> kept = {};
      if (keeps_exponentials(set.numerics)) kept = exponentials(team, row - first, grad_row);
      write_gradient<E>(in, set, token, row, team, kept, state, next_row, grad_row);
    }
  }
  if (team.rank == 0) write_token(in, out, token, weight_sum, inverse, state, loss_of_token);
}

// What the gradient is written times, instead of 1 / denominator, which would carry most of an fp16
// gradient below the smallest number before it meets the loss scale in backward: the power of two that puts
// the largest possible entry at 2^14 .. 2^15.
inline double fp16_scale(double largest) {
  return largest > 0 ? std::ldexp(1.0, 14 - std::ilogb(largest)) : 1;
}

template <class E> void weighted_loss(const Inputs& in, const Settings& set, const Outputs& out) {
  using T = Acc<E>;
  const Totals totals = find_totals<T>(in, set);
  const double inverse = 1 / totals.denominator;
  const bool scaled = std::is_same<E, Fp16>::value && set.rule != kRowScalar && finite(inverse);
  const double scale = scaled ? fp16_scale(totals.largest * set.numerics.largest_gradient) : inverse;
  const int64_t of_threads = useful_threads(in) * scratch_of_thread(in, set, out.grad).all;
  double* const losses = reinterpret_cast<double*>(static_cast<char*>(out.scratch) + of_threads);
  for_each_token(in, set, out, totals.live, [&](const Token& token, const Team& team) {
    token_pass<E>(in, set, out, token, team, inverse, out.grad_scale * scale, losses);
  });
  double sum = 0;
  for (int64_t token = 0; token < in.B * in.S; ++token) sum += losses[token];
  *static_cast<T*>(out.loss) = T(sum / totals.denominator);
  static_cast<T*>(out.factors)[0] = T(inverse);
  static_cast<T*>(out.factors)[1] = scaled ? T(inverse / scale) : T(1);
}

void weighted_loss_of_dtype(const Inputs& in, const Settings& set, const Outputs& out) {
  switch (in.dtype) {
    case kFloat32: return weighted_loss<float>(in, set, out);
    case kBFloat16: return weighted_loss<Bf16>(in, set, out);
    case kFloat16: return weighted_loss<Fp16>(in, set, out);
    case kFloat64: return weighted_loss<double>(in, set, out);
  }
}

const Kernels kernels = {weighted_loss_of_dtype, rule_of};

}  // namespace WMTP_ISA
}  // namespace wmtp
