// What bounds the CPU kernel: its arithmetic on a row in L1, one thread, and the memory, all threads.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -Wno-psabi -fopenmp -DWMTP_ISA=avx512_bf16 -mavx512f -mavx512bw
//       -mavx512dq -mavx512vl -mfma -mf16c -mavx512bf16 -Ikernels/cpu benchmarks/bounds.cpp -o build/bounds
//   build/bounds > benchmarks/results/bounds.txt
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "row.h"

using namespace wmtp;
using namespace wmtp::WMTP_ISA;

// The least and the median of 31 calls, in ns.
template <class F> void time_it(const char* what, double elements, const char* unit, double per, const F& f) {
  std::vector<double> times;
  for (int i = 0; i < 31; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    times.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  std::printf("%-52s least %.4f, median %.4f %s\n", what, times[0] / elements / per,
              times[15] / elements / per, unit);
}

template <class E> void arithmetic(const char* dtype) {
  static E x[2 * kBlock], out[kBlock];  // the prefetch looks a block ahead
  static float e[kBlock + kPadding];
  for (int i = 0; i < 2 * kBlock; ++i) store_first(x + i, broadcast(float(i * 7919 % 1000) / 250 - 2), 1);
  const int times = 200;
  float sum = 0, max;
  std::printf("%s\n", dtype);
  time_it("  sum of exponentials", times * kBlock, "ns an element", 1, [&] {
    for (int i = 0; i < times; ++i) sum += block_sum_exp<E>(x, kBlock, 1, nullptr, &max);
  });
  time_it("  the same, exponentials kept", times * kBlock, "ns an element", 1, [&] {
    for (int i = 0; i < times; ++i) sum += block_sum_exp<E>(x, kBlock, 1, e, &max);
  });
  time_it("  their multiples, written", times * kBlock, "ns an element", 1, [&] {
    for (int i = 0; i < times; ++i) write_scaled<E>(e, kBlock, 1e-3f + i, false, x, out);
  });
  volatile float used = sum;
  (void)used;
}

void memory(const char* what, int64_t bytes) {
  const int64_t n = bytes / 4;
  std::vector<float> from(n + 16, 1.f), to(n + 16, 1.f);
  float* const source = from.data();
  float* const aligned = to.data() + (-reinterpret_cast<uintptr_t>(to.data()) % 64) / 4;
  std::printf("%s\n", what);
  time_it("  read and written in place", 1, "ms", 1e6, [&] {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += 16) store(source + i, load(source + i) * 1.0001f);
  });
  time_it("  copied past the caches", 1, "ms", 1e6, [&] {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += 16) store_past_caches(aligned + i, load(source + i));
  });
}

int main() {
  arithmetic<float>("fp32, one thread, 4096 columns in L1");
  arithmetic<Bf16>("bf16, one thread, 4096 columns in L1");
  memory("131 MB, [1, 256, 4, 32000] in fp32, all threads", 131072000);
  memory("66 MB, the same in bf16, all threads", 65536000);
}
