// The loops over tokens, compiled once per instruction set. A token (b, t) has H rows of logits [V]:
//   ce_k       = logsumexp(row_k) - row_k[target_k]                          valid k, else 0
//   w_k        = 1 | head_weights[b,t,k] | softmax over valid k of excess_k / temperature
//   row_scalar = w_k / sum_k w_k  (0 when the sum is <= 1e-8), or w_k
//   token_loss = sum_k row_scalar_k ce_k
//   d/d row_k  = row_scalar_k (softmax(row_k) - onehot(target_k))
// A row without a valid target is not read. Targets are checked before (dispatch.cpp).
#include "row.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

inline int64_t target_of(const Rows& r, int64_t token, int64_t k) {  // -1: no valid target
  if (token % r.S + k + 1 >= r.S) return -1;
  const int64_t id = r.target_ids[token + k + 1];
  return id == r.ignore_index ? -1 : id;
}

template <class E> inline const E* row_of(const Rows& r, int64_t token, int64_t k) {
  const int64_t b = token / r.S, t = token % r.S;
  return static_cast<const E*>(r.logits) + b * r.stride_b + t * r.stride_s + k * r.stride_h;
}

inline bool shared_heads(const Rows& r) { return r.H > 1 && r.stride_h == 0; }

// Calls body(token) for every token, on r.threads threads where the work is worth it. One thread opens
// no parallel region: a forked child of a threaded parent must not.
template <class Body> void for_each_token(const Rows& r, const Body& body) {
  const int64_t tokens = r.B * r.S, work = r.H * r.V, worth = 1 << 15;
  const int64_t most = 1 + tokens * work / worth;
  const int threads = int(most < r.threads ? most : r.threads);
  if (threads <= 1) {
    for (int64_t token = 0; token < tokens; ++token) body(token);
    return;
  }
  // Dynamic, since ignored tokens cost nothing; in runs long enough that two threads seldom fault in
  // the same page of the gradient.
  [[maybe_unused]] const int64_t chunk = tokens / (threads * 8) + 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t token = 0; token < tokens; ++token) body(token);
}

// The H rows of a token -> ce [H], lse [H]. Shared heads read their one row once.
template <class E>
void token_ce(const Rows& r, int64_t token, Acc<E>* ce, Acc<E>* lse) {
  LogSumExp<Acc<E>> stats{};
  bool known = false;
  for (int64_t k = 0; k < r.H; ++k) {
    ce[k] = lse[k] = 0;
    const int64_t target = target_of(r, token, k);
    if (target < 0) continue;
    const E* row = row_of<E>(r, token, k);
    if (!known) stats = log_sum_exp(row, r.V);
    known = shared_heads(r);
    ce[k] = stats.ce(value_at(row, target));
    lse[k] = stats.lse();
  }
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

template <class T>
void token_weights(const Rows& r, const Weighting& how, int64_t token, const T* ce, T* w) {
  if (how.ref_ce) return excess_weights(r, how, token, ce, w);
  const T* given = static_cast<const T*>(how.head_weights);
  for (int64_t k = 0; k < r.H; ++k)
    w[k] = target_of(r, token, k) < 0 ? T(0) : given ? given[token * r.H + k] : T(1);
}

template <class E>
void token_loss(const Rows& r, const Weighting& how, const TokenLoss& out) {
  using T = Acc<E>;
  for_each_token(r, [&](int64_t token) {
    T* ce = static_cast<T*>(out.ce) + token * r.H;
    T* w = static_cast<T*>(out.row_scalar) + token * r.H;
    token_ce<E>(r, token, ce, static_cast<T*>(out.lse) + token * r.H);
    token_weights(r, how, token, ce, w);
    T weight_sum = 0, loss = 0;
    for (int64_t k = 0; k < r.H; ++k) weight_sum += w[k];
    for (int64_t k = 0; k < r.H; ++k) {
      if (how.normalize) w[k] = weight_sum <= T(1e-8) ? T(0) : w[k] / weight_sum;
      loss += w[k] * ce[k];
    }
    static_cast<T*>(out.weight_sum)[token] = weight_sum;
    static_cast<T*>(out.token_loss)[token] = loss;
  });
}

// out [V] = c (softmax - onehot(target)). A finite lse says that the row is free of NaN and +inf, so
// that c = 0 gives exactly 0 and the row need not be read.
template <class E>
void gradient_row(const E* x, int64_t V, Acc<E> lse, Acc<E> c, int64_t target, E* out) {
  using T = Acc<E>;
  if (target < 0 || (c == 0 && lse - lse == 0)) {
    std::memset(out, 0, V * sizeof(E));
    return;
  }
  const T column = c * (exp_one(value_at(x, target) - lse) - 1);
  scaled_softmax(x, V, lse, c, out);
  store_first(out + target, broadcast(column), 1);
}

// Shared heads: out [V] = (sum_k c_k) softmax - sum_k c_k onehot(target_k), rounded once.
template <class E>
void gradient_shared(const Rows& r, int64_t token, const Acc<E>* lse, const Acc<E>* c, E* out) {
  using T = Acc<E>;
  const E* x = row_of<E>(r, token, 0);
  int64_t valid = -1;
  T total = 0;
  for (int64_t k = 0; k < r.H; ++k)
    if (target_of(r, token, k) >= 0) total += c[valid = k];
  if (valid < 0) return gradient_row<E>(x, r.V, 0, 0, -1, out);
  // The targets' columns come first: out may be x.
  T* columns = static_cast<T*>(__builtin_alloca(r.H * sizeof(T)));
  for (int64_t k = 0; k < r.H; ++k) {
    const int64_t target = target_of(r, token, k);
    if (target < 0) continue;
    columns[k] = total * exp_one(value_at(x, target) - lse[valid]);
    for (int64_t j = 0; j < r.H; ++j)  // heads may predict the same id
      if (target_of(r, token, j) == target) columns[k] -= c[j];
  }
  scaled_softmax(x, r.V, lse[valid], total, out);
  for (int64_t k = 0; k < r.H; ++k)
    if (const int64_t target = target_of(r, token, k); target >= 0)
      store_first(out + target, broadcast(columns[k]), 1);
}

// lse, row_scalar [B, S, H] -> grad contiguous [B, S, H, V], or [B, S, 1, V] for shared heads. Without
// grad the logits themselves are overwritten: each row is read before it is written, vector by vector.
template <class E>
void row_gradient(const Rows& r, const void* lse, const void* row_scalar, void* grad) {
  using T = Acc<E>;
  const int64_t rows = shared_heads(r) ? 1 : r.H;
  for_each_token(r, [&](int64_t token) {
    const T* token_lse = static_cast<const T*>(lse) + token * r.H;
    const T* c = static_cast<const T*>(row_scalar) + token * r.H;
    for (int64_t k = 0; k < rows; ++k) {
      const E* x = row_of<E>(r, token, k);
      E* out = grad ? static_cast<E*>(grad) + (token * rows + k) * r.V : const_cast<E*>(x);
      if (shared_heads(r)) return gradient_shared(r, token, token_lse, c, out);
      gradient_row(x, r.V, token_lse[k], c[k], target_of(r, token, k), out);
    }
  });
}

// logits [B, S, 1, V] -> ref_ce [B, S - 1].
template <class E> void next_token_ce(const Rows& r, void* ref_ce) {
  for_each_token(r, [&](int64_t token) {
    if (token % r.S + 1 == r.S) return;
    Acc<E> lse;
    token_ce<E>(r, token, static_cast<Acc<E>*>(ref_ce) + token - token / r.S, &lse);
  });
}

template <class F> void by_dtype(int32_t dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(Bf16{});
    case kFloat16: return f(Fp16{});
    case kFloat64: return f(double{});
  }
}

const Kernels kernels = {
    [](const Rows& r, const Weighting& how, const TokenLoss& out) {
      by_dtype(r.dtype, [&](auto e) { token_loss<decltype(e)>(r, how, out); });
    },
    [](const Rows& r, const void* lse, const void* row_scalar, void* grad) {
      by_dtype(r.dtype, [&](auto e) { row_gradient<decltype(e)>(r, lse, row_scalar, grad); });
    },
    [](const Rows& r, void* ref_ce) {
      by_dtype(r.dtype, [&](auto e) { next_token_ce<decltype(e)>(r, ref_ce); });
    },
};

}  // namespace WMTP_ISA
}  // namespace wmtp
