// The exported functions: choose the instruction set, check targets and weights, call the kernels.
// Status 0 is success; errors name the first bad position, whatever the number of threads.
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(WMTP_X86)
#include <cpuid.h>
#endif

#include "wmtp_cpu.h"

#define WMTP_EXPORT extern "C" __attribute__((visibility("default")))

namespace wmtp {
namespace {

enum Status : int { kOk = 0, kBadTarget = 1, kBadWeight = 2, kUnknownIsa = 3, kMissingIsa = 4 };

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*present)();
};

#if defined(WMTP_X86)
// Read from the CPU itself: compilers disagree on what __builtin_cpu_supports may be asked. XCR0 tells
// which registers the operating system saves.
bool has(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t xcr0) {
  uint32_t a, b, c, d, ecx, ebx, saved, high;
  if (!__get_cpuid(1, &a, &b, &ecx, &d) || !(ecx & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &ebx, &c, &d)) return false;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  return !(leaf1_ecx & ~ecx) && !(leaf7_ebx & ~ebx) && !(xcr0 & ~saved);
}

bool has_avx2() { return has(bit_FMA | bit_F16C, bit_AVX2, 0x06); }

bool has_avx512() {
  return has_avx2() && has(0, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL, 0xe6);
}

bool has_avx512_bf16() {
  uint32_t a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1 << 5));
}
#endif

const InstructionSet kInstructionSets[] = {  // the best first
#if defined(WMTP_X86)
    {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16},
    {"avx512", &avx512::kernels, has_avx512},
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};

const InstructionSet* chosen = nullptr;

// The first (b, t, k) for which this does not hold, of those with a valid target; true: there is none. The
// others may be anything.
template <class Holds> bool all_ok(const Inputs& in, int64_t* position, const Holds& holds) {
  int64_t row = 0;
  for (int64_t b = 0; b < in.B; ++b)
    for (int64_t t = 0; t < in.S; ++t)
      for (int64_t k = 0; k < in.H; ++k, ++row) {
        const int64_t index = target_index(in, b, t, k);
        if (index < 0 || in.target_ids[index] == in.ignore_index || holds(row, in.target_ids[index])) continue;
        *position = row;
        return false;
      }
  return true;
}

bool targets_ok(const Inputs& in, int64_t* position) {
  return all_ok(in, position, [&](int64_t, int64_t id) { return id >= 0 && id < in.V; });
}

// Finite, and not negative where that would have no meaning.
template <class T> bool weights_ok(const Inputs& in, const Settings& set, int64_t* position) {
  const T infinity = T(__builtin_inff()), least = signed_weights(in, set) ? -infinity : T(0);
  const T* const w = static_cast<const T*>(in.head_weights);
  return all_ok(in, position, [&](int64_t row, int64_t) {
    return w[row] < infinity && (least < 0 ? w[row] > least : w[row] >= least);
  });
}

}  // namespace

// Compared by wmtp/backends/cpu_library.py before it calls anything. Data, for a library of another version may not have the
// function that would be called to ask.
WMTP_EXPORT const int32_t wmtp_cpu_abi[] = {
    kAbiVersion, sizeof(Inputs), sizeof(Settings), sizeof(Outputs)};

// Null or "" chooses the best that this machine has.
WMTP_EXPORT int wmtp_cpu_select(const char* name) {
  const bool any = !name || !*name;
  for (const InstructionSet& isa : kInstructionSets) {
    if (!any && std::strcmp(isa.name, name)) continue;
    if (isa.present()) return chosen = &isa, kOk;
    if (!any) return kMissingIsa;
  }
  return kUnknownIsa;
}

WMTP_EXPORT const char* wmtp_cpu_instruction_set() { return chosen->name; }

// The number of the rule of this name; -2 if there is none.
WMTP_EXPORT int32_t wmtp_cpu_rule(const char* name) { return chosen->kernels->rule(name); }

// Fresh memory is paid for by page: with 4 KiB pages a fresh 131 MB gradient takes three times as long
// (75 ms against 23, both on a busy machine). Only a hint.
WMTP_EXPORT void wmtp_cpu_ask_for_huge_pages(const void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, begin = (uintptr_t(memory) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(memory) + bytes) / page * page;
  if (bytes >= (size_t(8) << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Bytes that Outputs::scratch must have.
WMTP_EXPORT int64_t wmtp_cpu_scratch_bytes(const Inputs* in, const Settings* set, int with_grad) {
  const int64_t of_threads = useful_threads(*in) * scratch_of_thread(*in, *set, with_grad).all;
  return of_threads + in->B * in->S * int64_t(sizeof(double));
}

WMTP_EXPORT int wmtp_cpu_weighted_loss(const Inputs* in, const Settings* set, const Outputs* out,
                                       int64_t* position) {
  if (!targets_ok(*in, position)) return kBadTarget;
  const bool asks = in->head_weights && !set->checked;
  if (asks && !(in->dtype == kFloat64 ? weights_ok<double>(*in, *set, position)
                                      : weights_ok<float>(*in, *set, position)))
    return kBadWeight;
  chosen->kernels->weighted_loss(*in, *set, *out);
  return kOk;
}

}  // namespace wmtp
