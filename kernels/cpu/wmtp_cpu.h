// The C ABI of libwmtp_cpu: what wmtp/backends/cpu.py passes in, and the table each instruction set fills.
// Legend: B batch, S sequence, H heads, V vocabulary. `acc` is float, or double for double logits.
#pragma once
#include <cstdint>

namespace wmtp {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Reduction : int32_t { kSum = 0, kTokenMean = 1, kWeightMean = 2 };

// x = slope l, or center + amplitude tanh(slope l + offset) if amplitude > 0; the loss averages
// f = (1 - label_smoothing) ce + label_smoothing (lse - mean x) + z_loss lse^2.
struct Numerics {
  double slope, offset, amplitude, center, z_loss, label_smoothing;
  double largest_gradient;  // no |df / dl| is larger
};

// The tensors, and where they lie; wmtp/records.py has these three records.
struct Inputs {
  const void* logits;                    // [B, S, H, V], last stride 1
  int64_t stride_b, stride_s, stride_h;  // in elements, any value; stride_h = 0: shared heads
  int64_t B, S, H, V;
  const int64_t* head_offsets;  // [H], instead of k stride_h: heads in memory of their own, whatever stride_h
                                // is; or null
  const int64_t* target_ids;  // [B, targets]: head k at t predicts target_ids[b, t target_stride + k], if that
  int64_t target_stride_b, target_stride, targets;  // is below `targets`; target_stride is 1, or H: each head's own
  int64_t ignore_index;
  const void* head_weights;  // [B, S, H] acc, or null: weight 1; what the weights of a rule are multiplied by
  const void* head_scale;    // [H] acc, or null: what a head's weights are multiplied by once they are summed up
  const void* ref_ce;        // acc, or null: head k at t compares with ref_ce[b ref_stride_b + t ref_stride + k]
  int64_t ref_stride_b, ref_stride;
  double numbers[4];         // the rule's
  double normalizer;         // replaces the denominator, if has_normalizer
  int32_t has_normalizer;
  int32_t dtype;
  int32_t threads;
};

// Instead of a rule: head_weights are d loss / d f itself, of any sign, and grad is final.
constexpr int32_t kRowScalar = -1;

struct Settings {
  int32_t rule;         // of weights.h, or kRowScalar
  int32_t known;        // its weights do not depend on the cross entropies;
  int32_t whole_token;  // else: they follow from those of all heads of a token,
  int32_t sums_to_one;  // and sum to 1 over its valid heads
  int32_t reduction;
  int32_t checked;      // head_weights may be anything
  Numerics numerics;
  int32_t metrics;      // entropy and correct are wanted
};

// Contiguous, acc unless said otherwise; every entry is written.
struct Outputs {
  void* loss;           // [1]
  uint8_t* valid_mask;  // [B, S]
  void* ce;             // [B, S, H]
  void* row_loss;       // [B, S, H] f; null where that is ce
  void* token_loss;     // [B, S]
  void* weight_sum;     // [B, S]
  void* row_scalar;     // [B, S, H] d loss / d f
  void* row_max;        // [B, S, H] and
  void* log_sum;        // [B, S, H]: their sum is the log-sum-exp; 0 without a target
  void* entropy;        // [B, S, H], and the next; null without metrics
  uint8_t* correct;     // [B, S, H]
  void* factors;        // [2]: 1 / denominator, and what grad still has to be multiplied with
  void* grad;           // [B, S, H, V] of the logits' dtype, [B, S, 1, V] for shared heads; the logits
                        // themselves: in place, with their strides; null: not wanted
  void* scratch;        // scratch_bytes(), 64-byte aligned
  int64_t grad_stride;  // of the rows of grad, unless they are the logits'
  double grad_scale;    // grad is that of grad_scale x loss
};

// Library and cpu_library.py must mean the same by all this: raise the version with every change of it.
constexpr int32_t kAbiVersion = 6;

struct Kernels {
  void (*weighted_loss)(const Inputs&, const Settings&, const Outputs&);
  int32_t (*rule)(const char* name);  // its number, or that of a product "a*b"; -2 where there is none
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

// A row is summed block by block, from L1; the shift of its exponentials may change with each.
constexpr int64_t kBlock = 4096;
constexpr int64_t kPadding = 16;  // a vector, before the exponentials; after them, the last is stored whole

// Where head k's target at (b, t) stands; -1: nowhere.
inline int64_t target_index(const Inputs& in, int64_t b, int64_t t, int64_t k) {
  const int64_t place = t * in.target_stride + k;
  return place < in.targets ? b * in.target_stride_b + place : -1;
}

// -1: no valid target.
inline int64_t target_of(const Inputs& in, int64_t b, int64_t t, int64_t k) {
  const int64_t index = target_index(in, b, t, k);
  return index >= 0 && in.target_ids[index] != in.ignore_index ? in.target_ids[index] : -1;
}

// Weights may be negative where they divide nothing.
inline bool signed_weights(const Inputs& in, const Settings& set) {
  return set.reduction == kSum || (set.reduction == kWeightMean && in.has_normalizer);
}

inline bool shared_heads(const Inputs& in) { return in.H > 1 && !in.head_offsets && in.stride_h == 0; }

// Waking a sleeping thread takes about as long as `worth` logits do.
inline int useful_threads(const Inputs& in) {
  const int64_t worth = 1 << 17, last = in.S && target_index(in, 0, in.S - 1, 0) < 0;
  const int64_t rows = in.B * (in.S - last) * (shared_heads(in) ? 1 : in.H);
  const int64_t most = 1 + rows * in.V / worth;
  return int(most < in.threads ? most : in.threads);
}

inline int64_t waiting_rows(const Inputs& in, const Settings& set) {
  return set.whole_token && !shared_heads(in) ? in.H : 1;
}

// Scratch of one thread, in bytes: `kept`, the exponentials of the rows whose gradient waits for the weights
// (`row` each), with a shift for every block; `numbers`, kHeadBytes for each head of a token; and 2 x H x
// threads partial sums of a row. After that of all threads, a double for each token.
constexpr int64_t kHeadBytes = 96, kPartialBytes = 56;
struct ScratchBytes {
  int64_t row, kept, numbers, all;
};
inline ScratchBytes scratch_of_thread(const Inputs& in, const Settings& set, bool with_grad) {
  const int64_t acc = in.dtype == kFloat64 ? 8 : 4;
  const int64_t row = ((in.V + 2 * kPadding + in.V / kBlock + 1) * acc + 63) / 64 * 64;
  const int64_t kept = with_grad ? waiting_rows(in, set) * row : 0, numbers = in.H * kHeadBytes;
  return {row, kept, numbers, kept + numbers + (2 * in.H * useful_threads(in) * kPartialBytes + 63) / 64 * 64};
}

}  // namespace wmtp
