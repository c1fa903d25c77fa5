// The C ABI of libwmtp_cpu: what wmtp/cpu.py passes in, and the table each instruction set fills.
// Legend: B batch, S sequence, H heads, V vocabulary. `acc` is float, or double for double logits.
#pragma once
#include <cstdint>

namespace wmtp {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct Rows {
  const void* logits;                    // [B, S, H, V], last stride 1
  int64_t stride_b, stride_s, stride_h;  // in elements, any value; stride_h = 0: shared heads
  int64_t B, S, H, V;
  const int64_t* target_ids;  // [B, S] unshifted: head k at t predicts target_ids[b, t + k + 1]
  int64_t ignore_index;
  int32_t dtype;
  int32_t threads;
};

// At most one of the two pointers is set; none of them means weight 1.
struct Weighting {
  const void* head_weights;  // [B, S, H] acc, or null
  const void* ref_ce;        // [B, S - 1] acc, or null: head k at t compares with ref_ce[b, t + k]
  double temperature;
  int32_t is_signed;  // excess = ce - ref instead of |ce - ref|
  int32_t normalize;  // row_scalar = w / sum w instead of w
};

// Contiguous, acc; every entry is written.
struct TokenLoss {
  void* token_loss;  // [B, S]
  void* row_scalar;  // [B, S, H]
  void* weight_sum;  // [B, S]
  void* ce;          // [B, S, H]
  void* lse;         // [B, S, H]
};

struct Kernels {
  void (*token_loss)(const Rows&, const Weighting&, const TokenLoss&);
  void (*row_gradient)(const Rows&, const void* lse, const void* row_scalar, void* grad);
  void (*next_token_ce)(const Rows&, void* ref_ce);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace wmtp
