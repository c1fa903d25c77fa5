// One vector type for every instruction set, on the compilers' vector extensions.
// Vec<float> has 16, 8 or 4 lanes (AVX-512, AVX2, baseline), Vec<double> half of that. Storage
// elements (float, double, Bf16, Fp16) are widened to their acc type on load and rounded to nearest
// even on store.
// Each instruction set compiles this file under its own namespace, so that no inline function of one
// can be linked into another.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace wmtp {
namespace WMTP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Vec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64Vec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16Vec __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as FloatVec

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

template <class E> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class E> using Acc = typename AccOf<E>::type;

template <class T> struct Simd;

template <> struct Simd<float> {
  using Vec = FloatVec;
  using Bits = UInt32Vec;
  static constexpr float kMagic = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kBias = 127;
  static constexpr float kLowest = -88.02969f;  // -127 ln 2, where the scale 2^n becomes exactly 0
  static constexpr float kLn2High = 0.693359375f;  // 10 bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  // e^f on |f| <= ln 2 / 2 to 1e-8, the highest power first: 1 + f + f^2 q(f), where q interpolates
  // (e^f - 1 - f) / f^2 at Chebyshev nodes.
  static constexpr int kTerms = 7;
  static constexpr float kPoly[kTerms] = {
      0.0013926213466f, 0.008363202971576f, 0.0416665544376859f, 0.16666576845994f, 0.5f, 1, 1};
};

template <> struct Simd<double> {
  using Vec = DoubleVec;
  using Bits = UInt64Vec;
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr double kLowest = -709.0895657128241;  // -1023 ln 2
  static constexpr double kLn2High = 0x1.62e42feep-1;    // 32 bits
  static constexpr double kLn2Low = 1.90821492927058770e-10;
  static constexpr int kTerms = 12;
  static constexpr double kPoly[kTerms] = {  // the same, to 2e-17
      2.51004241570050668e-8, 2.76201387197339956e-7, 2.75572683786841929e-6, 2.48015211902177277e-5,
      1.98412698631059687e-4, 1.38888889172817933e-3, 8.33333333333005135e-3, 4.16666666666239915e-2,
      0.166666666666666675,   0.500000000000000103,   1, 1};
};

template <class T> using Vec = typename Simd<T>::Vec;
template <class T> using Bits = typename Simd<T>::Bits;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class T> constexpr T kInfinity = T(__builtin_inff());

template <class T> inline Vec<T> broadcast(T value) { return value - Vec<T>{}; }

// Lane-wise a > b ? a : b: a NaN in `a` is passed over, a NaN in `b` is kept. gcc makes a comparison
// and a blend of the expression, though maxps is defined as just this.
#if defined(__AVX512F__)
inline FloatVec larger(FloatVec a, FloatVec b) { return (FloatVec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline FloatVec larger(FloatVec a, FloatVec b) { return (FloatVec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline FloatVec larger(FloatVec a, FloatVec b) { return a > b ? a : b; }
#endif
inline DoubleVec larger(DoubleVec a, DoubleVec b) { return a > b ? a : b; }

// e^x for x <= 0 or a rounding error above: -inf and anything below the normal range give exactly 0,
// NaN stays NaN. e^x = 2^n e^f with n = round(x / ln 2), f = x - n ln 2.
// Four vectors go step by step together, so that their latencies overlap.
template <class T> using Vec4 = Vec<T>[4];

template <class T> inline void exp4(Vec4<T>& x) {
  using C = Simd<T>;
  Vec4<T> n, f, poly;
  Bits<T> scale[4];
  for (int j = 0; j < 4; ++j) x[j] = larger(broadcast(C::kLowest), x[j]);
  for (int j = 0; j < 4; ++j) n[j] = x[j] * T(1.4426950408889634) + C::kMagic;
  for (int j = 0; j < 4; ++j) scale[j] = ((Bits<T>)n[j] + C::kBias) << C::kMantissaBits;
  for (int j = 0; j < 4; ++j) n[j] = n[j] - C::kMagic;
  for (int j = 0; j < 4; ++j) f[j] = x[j] - n[j] * C::kLn2High;
  for (int j = 0; j < 4; ++j) f[j] = f[j] - n[j] * C::kLn2Low;
  for (int j = 0; j < 4; ++j) poly[j] = C::kPoly[0] * f[j] + C::kPoly[1];
  for (int i = 2; i < C::kTerms; ++i)
    for (int j = 0; j < 4; ++j) poly[j] = poly[j] * f[j] + C::kPoly[i];
  for (int j = 0; j < 4; ++j) x[j] = poly[j] * (Vec<T>)scale[j];
}

template <class T> inline Vec<T> exp(Vec<T> x) {
  Vec4<T> four = {x, x, x, x};
  exp4<T>(four);
  return four[0];
}

// ---- 16-bit floats: UInt16Vec <-> FloatVec ----

// Compilers split __builtin_convertvector between these two sizes into halves.
#if defined(__AVX512F__)
inline UInt32Vec widen_bits(UInt16Vec v) { return (UInt32Vec)_mm512_cvtepu16_epi32((__m256i)v); }
inline UInt16Vec narrow_bits(UInt32Vec v) { return (UInt16Vec)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
inline UInt32Vec widen_bits(UInt16Vec v) { return (UInt32Vec)_mm256_cvtepu16_epi32((__m128i)v); }
inline UInt16Vec narrow_bits(UInt32Vec v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // within each 128-bit half
  return (UInt16Vec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
inline UInt32Vec widen_bits(UInt16Vec v) { return __builtin_convertvector(v, UInt32Vec); }
inline UInt16Vec narrow_bits(UInt32Vec v) { return __builtin_convertvector(v, UInt16Vec); }
#endif

inline FloatVec widen(UInt16Vec bits, Bf16) { return (FloatVec)(widen_bits(bits) << 16); }

// Every NaN stored is the result of arithmetic, so a quiet one, that keeps being a NaN when it is cut
// off; rounding could carry it into an infinity or a zero.
inline UInt16Vec narrow(FloatVec value, Bf16) {
  const UInt32Vec bits = (UInt32Vec)value;
  const UInt32Vec rounding = 0x7fff + ((bits >> 16) & 1);
  return narrow_bits((bits + (rounding & (UInt32Vec)(value == value))) >> 16);
}

#if defined(__F16C__)
inline FloatVec widen(UInt16Vec bits, Fp16) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_cvtph_ps((__m256i)bits);
#else
  return (FloatVec)_mm256_cvtph_ps((__m128i)bits);
#endif
}

inline UInt16Vec narrow(FloatVec value, Fp16) {
#if defined(__AVX512F__)
  return (UInt16Vec)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (UInt16Vec)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#endif
}
#else
// Half has 5 exponent bits (bias 15) and 10 mantissa bits, float 8 (bias 127) and 23. Half subnormals
// go through a float addition whose rounding position is half's: no subnormal operand, so exact even
// where the process flushes those to zero.
inline FloatVec widen(UInt16Vec half, Fp16) {
  const UInt32Vec bits = widen_bits(half);
  const UInt32Vec magnitude = (bits & 0x7fff) << 13;
  const UInt32Vec normal = magnitude + ((127u - 15u) << 23);
  const UInt32Vec special = magnitude + ((255u - 31u) << 23);
  const FloatVec smallest = (FloatVec)(UInt32Vec{} + (113u << 23));  // 2^-14
  const UInt32Vec subnormal = (UInt32Vec)((FloatVec)(magnitude + (113u << 23)) - smallest);
  UInt32Vec result = magnitude >= (31u << 23) ? special : normal;
  result = magnitude < (1u << 23) ? subnormal : result;
  return (FloatVec)(result | ((bits & 0x8000) << 16));
}

inline UInt16Vec narrow(FloatVec value, Fp16) {
  const UInt32Vec bits = (UInt32Vec)value;
  const UInt32Vec magnitude = bits & 0x7fffffff;
  const UInt32Vec normal = (magnitude - ((127u - 15u) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const UInt32Vec half_unit = UInt32Vec{} + (126u << 23);  // 0.5: its last bit is worth 2^-24
  const UInt32Vec subnormal = (UInt32Vec)((FloatVec)magnitude + (FloatVec)half_unit) - half_unit;
  const UInt32Vec infinity = UInt32Vec{} + 0x7c00;
  UInt32Vec result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? infinity : result;  // 65536 and above
  result = value == value ? result : infinity | 0x200;
  return narrow_bits(result | ((bits >> 16) & 0x8000));
}
#endif

// ---- Memory: full vectors, and the first `count` lanes of one ----

inline FloatVec load(const float* from) { FloatVec v; std::memcpy(&v, from, sizeof v); return v; }
inline DoubleVec load(const double* from) { DoubleVec v; std::memcpy(&v, from, sizeof v); return v; }
template <class E> inline FloatVec load(const E* from) {
  UInt16Vec v;
  std::memcpy(&v, from, sizeof v);
  return widen(v, E{});
}

inline void store(float* to, FloatVec v) { std::memcpy(to, &v, sizeof v); }
inline void store(double* to, DoubleVec v) { std::memcpy(to, &v, sizeof v); }
template <class E> inline void store(E* to, FloatVec v) {
  const UInt16Vec bits = narrow(v, E{});
  std::memcpy(to, &bits, sizeof bits);
}

// Never touches memory past from[count - 1]; the other lanes are -inf, which neither max nor exp sees.
template <class E> inline Vec<Acc<E>> load_first(const E* from, int64_t count) {
  using T = Acc<E>;
  E lanes[kLanes<T>] = {};
  std::memcpy(lanes, from, count * sizeof(E));
  Vec<T> v = load(lanes);
  for (int64_t i = count; i < kLanes<T>; ++i) v[i] = -kInfinity<T>;
  return v;
}

template <class E> inline void store_first(E* to, Vec<Acc<E>> v, int64_t count) {
  E lanes[kLanes<Acc<E>>];
  store(lanes, v);
  std::memcpy(to, lanes, count * sizeof(E));
}

}  // namespace WMTP_ISA
}  // namespace wmtp
