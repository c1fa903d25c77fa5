// The loop over tokens, compiled once per instruction set. A token (b, t) has H rows of logits [V]:
//   ce_k       = logsumexp(row_k) - row_k[target_k]                          valid k, else 0
//   w_k        = 1 | head_weights[b,t,k] | softmax over valid k of excess_k / temperature, times head_weights
//   row_scalar = w_k / sum_k w_k  (0 when the sum is <= 1e-8), or w_k;  times head_scale[k], over the denominator
//   loss       = sum row_scalar ce
//   d loss / d row_k = row_scalar_k (softmax(row_k) - onehot(target_k))
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
  return static_cast<E*>(out.grad) + (token.index * (shared_heads(in) ? 1 : in.H) + row) * in.V;
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
template <class T> struct TokenState { LogSumExp<T>* stats; T *x_target, *ce, *w, *c; };

// Rows [first, last) of a token -> statistics and cross entropies. All reading of x for them is done when
// this returns, by every thread: in place, it may be overwritten then.
template <class E>
void read_rows(const Inputs& in, const Outputs& out, const Token& token, Heads rows, const Team& team,
               const TokenState<Acc<E>>& state) {
  using T = Acc<E>;
  PartialSum<T>* const sums =
      reinterpret_cast<PartialSum<T>*>(team.partial_sums) + team.turn * in.H * team.size;
  bool live = false;
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const E* x = row_of<E>(in, token, row);
    live |= row_has_target(in, token, row);
    for (int64_t k = heads_of(in, row).first; k < heads_of(in, row).last; ++k)
      if (const int64_t target = target_of(in, token, k); target >= 0)
        state.x_target[k] = value_at(x, target);
    if (!row_has_target(in, token, row)) continue;
    Exponentials<T> keep = {};
    if (out.grad) keep = exponentials(team, row - rows.first, gradient_row<E>(in, out, token, row));
    sums[row * team.size + team.rank] = sum_exp(x + team.begin, team.end - team.begin, keep);
  }
  if (live) team.barrier();
  for (int64_t row = rows.first; row < rows.last; ++row) {
    if (row_has_target(in, token, row)) state.stats[row] = combine(sums + row * team.size, team.size);
    for (int64_t k = heads_of(in, row).first; k < heads_of(in, row).last; ++k) {
      state.ce[k] = target_of(in, token, k) >= 0 ? state.stats[row].ce(state.x_target[k]) : T(0);
    }
  }
}

// A new gradient of this size is out of the caches before anybody reads it.
constexpr int64_t kPastCachesBytes = int64_t(32) << 20;

// out [V] = (sum_k c_k) softmax - sum_k c_k onehot(target_k) over the row's heads k: this thread's
// columns. A row of which every c is 0 gives exactly 0, NaN and infinities too. The row that is mostly read
// next, `next_row` elements further, is prefetched meanwhile.
template <class E>
void write_gradient(const Inputs& in, const Token& token, int64_t row, const Team& team,
                    Exponentials<Acc<E>> kept, const TokenState<Acc<E>>& state, int64_t next_row, E* out) {
  using T = Acc<E>;
  const int64_t rows = in.B * in.S * (shared_heads(in) ? 1 : in.H);
  const bool past_caches = out != row_of<E>(in, token, row) &&
                           rows * in.V * int64_t(sizeof(E)) >= kPastCachesBytes;
  const LogSumExp<T>& stats = state.stats[row];
  const int64_t columns = team.end - team.begin;
  const Heads heads = heads_of(in, row);
  double c = 0;
  bool weighs = false;
  for (int64_t k = heads.first; k < heads.last; ++k) {
    if (target_of(in, token, k) < 0) continue;
    c += state.c[k];
    weighs |= state.c[k] != 0;
  }
  const E* x = row_of<E>(in, token, row) + team.begin;
  if (weighs && !finite(stats.lse()))
    write_exp(x, columns, stats.lse(), T(c), out + team.begin);
  else if (c != 0)
    write_softmax(kept, columns, stats, c, past_caches, x, next_row, out + team.begin);
  else
    std::memset(out + team.begin, 0, columns * sizeof(E));
  if (!weighs) return;
  for (int64_t k = heads.first; k < heads.last; ++k) {
    const int64_t target = target_of(in, token, k);
    if (target < team.begin || target >= team.end) continue;
    const T p = finite(stats.lse()) ? exp_one(state.x_target[k] - stats.max) / stats.sum
                                    : exp_one(state.x_target[k] - stats.lse());
    double own = 0;
    for (int64_t j = heads.first; j < heads.last; ++j)  // heads may predict the same id
      if (target_of(in, token, j) == target) own += state.c[j];
    const double column = own * (p - 1) + (c - own) * p;  // exactly 0 where p is 1
    store_first(out + target, broadcast(T(column)), 1);
  }
}

template <class T>
void write_token(const Inputs& in, const Outputs& out, const Token& token, double weight_sum, double inverse,
                 const TokenState<T>& state, double* loss_of_token) {
  double loss = 0;
  for (int64_t k = 0; k < in.H; ++k) {
    const bool valid = target_of(in, token, k) >= 0;
    const LogSumExp<T>& stats = state.stats[shared_heads(in) ? 0 : k];
    if (state.w[k] != 0) loss += double(state.w[k]) * state.ce[k];
    static_cast<T*>(out.ce)[token.index * in.H + k] = state.ce[k];
    static_cast<T*>(out.row_max)[token.index * in.H + k] = valid ? stats.max : T(0);
    static_cast<T*>(out.log_sum)[token.index * in.H + k] = valid ? stats.log_sum : T(0);
    static_cast<T*>(out.row_scalar)[token.index * in.H + k] = times(state.w[k], inverse);
  }
  loss_of_token[token.index] = loss;
  static_cast<T*>(out.token_loss)[token.index] = T(loss);
  static_cast<T*>(out.weight_sum)[token.index] = T(weight_sum);
  out.valid_mask[token.index] = counts(T(weight_sum));
}

// state.w: weights, and then d token_loss / d ce; state.c: d loss / d ce, as the gradient is written.
template <class E>
void token_pass(const Inputs& in, const Settings& set, const Outputs& out, const Token& token, const Team& team,
                double inverse, double scale, double* loss_of_token) {
  using T = Acc<E>;
  const int64_t rows = shared_heads(in) ? 1 : in.H, step = waiting_rows(in, set);
  const int64_t next_row = step == rows ? in.stride_s : in.stride_h;
  T* const numbers = reinterpret_cast<T*>(team.numbers);  // seven for each head
  const TokenState<T> state = {reinterpret_cast<LogSumExp<T>*>(numbers), numbers + 3 * in.H,
                               numbers + 4 * in.H, numbers + 5 * in.H, numbers + 6 * in.H};
  double weight_sum = 0;
  if (set.known) {
    for (int64_t k = 0; k < in.H; ++k) state.w[k] = known_weight<T>(in, token, k);
    weight_sum = sum_of(state.w, Heads{0, in.H});
    to_row_scalars(set, weight_sum, in.H, state.w);
  }
  for (int64_t first = 0; first < rows; first += step) {
    const Heads heads = rows == 1 ? Heads{0, in.H} : Heads{first, first + step};
    read_rows<E>(in, out, token, Heads{first, first + step}, team, state);
    if (!set.known) {
      rule_weights(in, set, token, heads, state.ce, state.w);
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
      write_gradient<E>(in, token, row, team, exponentials(team, row - first, grad_row), state, next_row, grad_row);
    }
  }
  if (team.rank == 0) write_token(in, out, token, weight_sum, inverse, state, loss_of_token);
}

// What the gradient is written times, instead of 1 / denominator, which would carry most of an fp16
// gradient below the smallest number before it meets the loss scale in backward: the power of two that puts
// the largest possible entry at 2^14 .. 2^15.
inline double fp16_scale(const Totals& totals) {
  return totals.largest > 0 ? std::ldexp(1.0, 14 - std::ilogb(totals.largest)) : 1;
}

template <class E> void weighted_loss(const Inputs& in, const Settings& set, const Outputs& out) {
  using T = Acc<E>;
  const Totals totals = find_totals<T>(in, set);
  const double inverse = 1 / totals.denominator;
  const bool scaled = std::is_same<E, Fp16>::value && set.rule != kRowScalar && finite(inverse);
  const double scale = scaled ? fp16_scale(totals) : inverse;
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
