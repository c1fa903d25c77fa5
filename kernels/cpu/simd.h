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

// The bodies of the loops over a row: out of line their vectors would go through memory.
#define WMTP_INLINE inline __attribute__((always_inline))

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
};

template <> struct Simd<double> {
  using Vec = DoubleVec;
  using Bits = UInt64Vec;
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kBias = 1023;
};

// 2^f on |f| <= 1/2, the highest power first: 1 + f q(f), where q interpolates (2^f - 1) / f at
// Chebyshev nodes. Storage of 16 bits is served by one power less: 2e-7 instead of 5e-9.
template <class E> struct Exp2 {
  static constexpr int kTerms = 6;
  static constexpr float kPoly[kTerms] = {
      0.001338130254f, 0.009666368515f, 0.05550381014f, 0.2402234904f, 0.6931471806f, 1};
};
template <> struct Exp2<float> {
  static constexpr int kTerms = 7;
  static constexpr float kPoly[kTerms] = {0.0001545316295f, 0.001339086336f, 0.009618082557f,
                                          0.05550357114f,   0.2402265076f,   0.693147188f, 1};
};
template <> struct Exp2<double> {
  static constexpr int kTerms = 12;
  static constexpr double kPoly[kTerms] = {  // the same, to 8e-18
      4.45496059818651839e-10, 7.0725859492692237e-9,   1.01780624458457735e-7,
      1.32154425879216897e-6,  1.52527338298361184e-5,  1.54035304417360502e-4,
      1.33335581464169353e-3,  9.61812910760688853e-3,  5.55041086648215943e-2,
      0.240226506959100982,    0.693147180559945309,    1};
};

template <class T> using Vec = typename Simd<T>::Vec;
template <class T> using Bits = typename Simd<T>::Bits;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class T> constexpr T kInfinity = T(__builtin_inff());

template <class T> inline Vec<T> broadcast(T value) { return value - Vec<T>{}; }

// Whether a lane of a comparison holds.
template <class Mask> inline bool any(Mask lanes) {
  uint64_t parts[sizeof lanes / 8], all = 0;
  std::memcpy(parts, &lanes, sizeof lanes);
  for (const uint64_t part : parts) all |= part;
  return all != 0;
}
inline bool any_above(FloatVec v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#else
  return any(v > bound);
#endif
}

// 1 / v of a v in [1, 2].
#if defined(__AVX512F__)
inline FloatVec reciprocal(FloatVec v) {  // to 14 bits, and by Newton's step to 28
  const FloatVec about = (FloatVec)_mm512_rcp14_ps((__m512)v);
  return about * (2.0f - v * about);
}
#else
inline FloatVec reciprocal(FloatVec v) { return 1.0f / v; }
#endif
inline DoubleVec reciprocal(DoubleVec v) { return 1.0 / v; }

template <class T> inline Bits<T> sign_bits() { return (Bits<T>)broadcast(T(-0.0)); }
template <class T> inline Vec<T> absolute(Vec<T> v) { return (Vec<T>)((Bits<T>)v & ~sign_bits<T>()); }
// v >= 0, with the sign of another.
template <class T> inline Vec<T> with_sign(Vec<T> v, Vec<T> of) {
  return (Vec<T>)((Bits<T>)v | ((Bits<T>)of & sign_bits<T>()));
}

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

// e^x of N vectors, or 2^x, for e^x up to e^80: -inf gives exactly 0 (outside AVX-512 so does anything below the normal
// range), NaN stays NaN. e^x = 2^n 2^f with t = x / ln 2, n = round(t), f = t - n; the error in t matters only where
// e^x is next to nothing. They go step by step together: their latencies overlap.
template <class T> using Vec4 = Vec<T>[4];
constexpr double kLog2E = 1.4426950408889634;
// Where the scale 2^n becomes exactly 0.
template <class T, bool kBase2> constexpr T kLowest = T(-double(Simd<T>::kBias) / (kBase2 ? 1 : kLog2E));

template <class T, int N, bool kBase2>
WMTP_INLINE void split(Vec<T> (&x)[N], Vec<T> (&f)[N], Bits<T> (&scale)[N]) {  // x -> t
  using C = Simd<T>;
  constexpr T factor = kBase2 ? T(1) : T(kLog2E);
#if defined(__AVX512F__)  // two instructions know what takes the others five
  if constexpr (sizeof(T) == 4) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    for (int j = 0; j < N; ++j) x[j] = x[j] * factor;
    for (int j = 0; j < N; ++j) scale[j] = (Bits<T>)_mm512_roundscale_ps((__m512)x[j], nearest);
    for (int j = 0; j < N; ++j) f[j] = (Vec<T>)_mm512_reduce_ps((__m512)x[j], nearest);
    return;
  }
#endif
  Vec<T> n[N];
  for (int j = 0; j < N; ++j) x[j] = larger(broadcast(kLowest<T, kBase2>), x[j]);
  for (int j = 0; j < N; ++j) n[j] = x[j] * factor + C::kMagic;
  for (int j = 0; j < N; ++j) scale[j] = ((Bits<T>)n[j] + C::kBias) << C::kMantissaBits;
  for (int j = 0; j < N; ++j) f[j] = x[j] * factor - (n[j] - C::kMagic);
  for (int j = 0; j < N; ++j) x[j] = x[j] * factor;
}
template <class T> inline Vec<T> times_power(Vec<T> value, Bits<T> scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_scalef_ps((__m512)value, (__m512)scale);
#endif
  return value * (Vec<T>)scale;
}

// log2 [N]: of each e^x, or not wanted.
template <class E, bool kBase2 = false, int N>
WMTP_INLINE void exp_each(Vec<Acc<E>> (&x)[N], Vec<Acc<E>>* log2 = nullptr) {
  using T = Acc<E>;
  using C = Exp2<E>;
  Vec<T> f[N], poly[N];
  Bits<T> scale[N];
  split<T, N, kBase2>(x, f, scale);
  if (log2)
    for (int j = 0; j < N; ++j) log2[j] = x[j];
  for (int j = 0; j < N; ++j) poly[j] = C::kPoly[0] * f[j] + C::kPoly[1];
  for (int i = 2; i < C::kTerms; ++i)
    for (int j = 0; j < N; ++j) poly[j] = poly[j] * f[j] + C::kPoly[i];
  for (int j = 0; j < N; ++j) x[j] = times_power<T>(poly[j], scale[j]);
}

template <class E> inline Vec<Acc<E>> exp(Vec<Acc<E>> x) {
  Vec<Acc<E>> one[] = {x};
  exp_each<E>(one);
  return one[0];
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

#if defined(__AVX512BF16__)  // subnormals become 0
inline UInt16Vec narrow(FloatVec value, Bf16) { return (UInt16Vec)_mm512_cvtneps_pbh((__m512)value); }
#else
// Every NaN stored is the result of arithmetic, so a quiet one, that keeps being a NaN when it is cut
// off; rounding could carry it into an infinity or a zero.
inline UInt16Vec narrow(FloatVec value, Bf16) {
  const UInt32Vec bits = (UInt32Vec)value;
  const UInt32Vec rounding = 0x7fff + ((bits >> 16) & 1);
  return narrow_bits((bits + (rounding & (UInt32Vec)(value == value))) >> 16);
}
#endif

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

// Past the caches, to a multiple of the vector's size. A fence must follow.
template <class V> inline void stream(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
  if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#endif
  std::memcpy(to, &v, sizeof v);
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class E> inline void store_past_caches(E* to, Vec<Acc<E>> v) {
  if constexpr (sizeof(E) == 2)
    stream(to, narrow(v, E{}));
  else
    stream(to, v);
}

// Never touches memory past from[count - 1]; the other lanes are -inf, which neither max nor exp sees.
template <class E> inline Vec<Acc<E>> load_first(const E* from, int64_t count) {
  E lanes[kLanes<Acc<E>>];
  store(lanes, broadcast(-kInfinity<Acc<E>>));
  std::memcpy(lanes, from, count * sizeof(E));
  return load(lanes);
}

template <class E> inline void store_first(E* to, Vec<Acc<E>> v, int64_t count) {
  E lanes[kLanes<Acc<E>>];
  store(lanes, v);
  std::memcpy(to, lanes, count * sizeof(E));
}

#if defined(__AVX512F__)
inline uint32_t first_lanes(int64_t count) { return (uint32_t(1) << count) - 1; }  // count <= 16

template <> inline FloatVec load_first(const float* from, int64_t count) {
  const FloatVec others = broadcast(-kInfinity<float>);
  return (FloatVec)_mm512_mask_loadu_ps((__m512)others, __mmask16(first_lanes(count)), from);
}
template <> inline void store_first(float* to, FloatVec v, int64_t count) {
  _mm512_mask_storeu_ps(to, __mmask16(first_lanes(count)), (__m512)v);
}
template <> inline FloatVec load_first(const Bf16* from, int64_t count) {
  const __m256i others = _mm256_set1_epi16(int16_t(0xff80));  // -inf
  return widen((UInt16Vec)_mm256_mask_loadu_epi16(others, __mmask16(first_lanes(count)), from), Bf16{});
}
template <> inline void store_first(Bf16* to, FloatVec v, int64_t count) {
  _mm256_mask_storeu_epi16(to, __mmask16(first_lanes(count)), (__m256i)narrow(v, Bf16{}));
}
template <> inline FloatVec load_first(const Fp16* from, int64_t count) {
  const __m256i others = _mm256_set1_epi16(int16_t(0xfc00));
  return widen((UInt16Vec)_mm256_mask_loadu_epi16(others, __mmask16(first_lanes(count)), from), Fp16{});
}
template <> inline void store_first(Fp16* to, FloatVec v, int64_t count) {
  _mm256_mask_storeu_epi16(to, __mmask16(first_lanes(count)), (__m256i)narrow(v, Fp16{}));
}
#endif

}  // namespace WMTP_ISA
}  // namespace wmtp
