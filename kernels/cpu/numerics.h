// What a logit l is to the softmax: x = slope l, or center + amplitude tanh(slope l + offset), which rises with
// l as well; and what the loss averages, f, in terms of softmax, onehot and the constant 1 (wmtp/numerics.py).
#pragma once
#include <type_traits>

#include "simd.h"
#include "wmtp_cpu.h"

namespace wmtp {
namespace WMTP_ISA {

// tanh(u) / u on |u| <= 1, a polynomial in u^2, the highest power first, interpolated at Chebyshev nodes: 4e-9.
// Storage of 16 bits is served by one power less: 5e-8.
template <class E> struct Tanh {
  static constexpr int kTerms = 7;
  static constexpr float kPoly[kTerms] = {0.001038025097f, -0.006194324834f, 0.02027970829f, -0.05345164637f,
                                          0.1332507615f,   -0.3333282798f,   0.9999999486f};
};
template <> struct Tanh<float> {
  static constexpr int kTerms = 8;
  static constexpr float kPoly[kTerms] = {-0.0003523280944f, 0.002278647665f, -0.007912485059f, 0.02146141016f,
                                          -0.05386970672f,   0.1333213931f,   -0.3333327738f,   0.9999999956f};
};

// With E = e^(-2 |u|) and q = 2 E / (1 + E): tanh |u| = 1 - q, and 1 - tanh^2 = q (2 - q), which keeps its digits
// where tanh is all but 1.
template <class E, int N> WMTP_INLINE void tanh_by_exp(Vec<Acc<E>> (&u)[N], Vec<Acc<E>> (&rest)[N]) {
  using T = Acc<E>;
  Vec<T> q[N];
  for (int j = 0; j < N; ++j) q[j] = absolute<T>(u[j]) * T(-2 * kLog2E);
  exp_each<E, true>(q);
  for (int j = 0; j < N; ++j) q[j] = (q[j] + q[j]) * reciprocal(T(1) + q[j]);
  for (int j = 0; j < N; ++j) rest[j] = q[j] * (T(2) - q[j]);
  for (int j = 0; j < N; ++j) u[j] = with_sign<T>(T(1) - q[j], u[j]);
}

// u -> tanh u; rest = 1 - tanh^2 u. A NaN stays one.
template <class E, int N> WMTP_INLINE void tanh_each(Vec<Acc<E>> (&u)[N], Vec<Acc<E>> (&rest)[N]) {
  using T = Acc<E>;
  if constexpr (std::is_same<T, float>::value) {
    using C = Tanh<E>;
    Vec<T> w[N], poly[N], most = {};
    for (int j = 0; j < N; ++j) w[j] = u[j] * u[j];
    for (int j = 0; j < N; ++j) most = larger(w[j], most);
    if (!any_above(most, 1.0f)) {  // all are within the cap, which is usual
      for (int j = 0; j < N; ++j) poly[j] = C::kPoly[0] * w[j] + C::kPoly[1];
      for (int i = 2; i < C::kTerms; ++i)
        for (int j = 0; j < N; ++j) poly[j] = poly[j] * w[j] + C::kPoly[i];
      for (int j = 0; j < N; ++j) u[j] *= poly[j];
      for (int j = 0; j < N; ++j) rest[j] = 1.0f - u[j] * u[j];
      return;
    }
  }
  tanh_by_exp<E>(u, rest);
}

template <class T> struct Transform {
  T slope, offset, amplitude, center;
  bool capped;

  explicit Transform(const Numerics& n)
      : slope(T(n.slope)), offset(T(n.offset)), amplitude(T(n.amplitude)), center(T(n.center)),
        capped(n.amplitude > 0) {}
};

// A logit's x, and dx / dl.
template <class T> struct Point { T x, steep; };

template <class E> inline Point<Acc<E>> transformed(const Transform<Acc<E>>& f, Acc<E> l) {
  using T = Acc<E>;
  if (!f.capped) return {f.slope * l, f.slope};
  Vec<T> u[] = {broadcast(f.slope * l + f.offset)}, rest[1];
  tanh_each<E>(u, rest);
  return {f.center + f.amplitude * u[0][0], f.slope * f.amplitude * rest[0][0]};
}

// What a row's gradient is made of: d f / d x = softmax p - target onehot - mean, times d loss / d f.
struct RowScalars {
  double softmax = 0, target = 0, mean = 0;
  void operator+=(const RowScalars& other) {
    softmax += other.softmax, target += other.target, mean += other.mean;
  }
};
inline RowScalars row_scalars(const Numerics& n, double c, double lse, int64_t V) {
  const double softmax = n.z_loss != 0 ? c * (1 + 2 * n.z_loss * lse) : c;
  return {softmax, c * (1 - n.label_smoothing), c * n.label_smoothing / double(V)};
}

}  // namespace WMTP_ISA
}  // namespace wmtp
