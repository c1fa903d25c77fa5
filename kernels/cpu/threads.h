// Threads: each takes tokens, or, where tokens are few, columns of every row.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

#include "weights.h"

namespace wmtp {
namespace WMTP_ISA {

struct Team {
  int rank, size;
  int64_t begin, end;    // this thread's columns
  int64_t row_bytes;     // of its exponentials of one row
  char* kept;            // which stand here
  char* numbers;         // what it knows of a token's rows and heads
  char* partial_sums;    // [2][H][size], of all threads: a double buffer, because a fast thread may write the
                         // next token's sums while a slow one still reads
  mutable int turn = 0;  // the half in use

  void barrier() const {
    turn ^= 1;
    if (size == 1) return;
#pragma omp barrier
  }
};

// body(token, team) for every token. One thread opens no parallel region: a forked child of a threaded
// parent must not.
template <class Body>
void for_each_token(const Inputs& in, const Settings& set, const Outputs& out, int64_t live,
                    const Body& body) {
  const int64_t tokens = in.B * in.S;
  const int threads = useful_threads(in);
  const ScratchBytes bytes = scratch_of_thread(in, set, out.grad);
  // With the scratch of a slot; a team's partial sums are in the first.
  const auto team_of = [&](int slot, int size, int64_t begin, int64_t end) {
    char* const all = static_cast<char*>(out.scratch);
    char* const mine = all + slot * bytes.all;
    return Team{size > 1 ? slot : 0, size, begin, end, bytes.row, mine, mine + bytes.kept,
                (size > 1 ? all : mine) + bytes.kept + bytes.numbers};
  };
  if (threads <= 1) {
    for (int64_t i = 0; i < tokens; ++i) body(token_at(in, i), team_of(0, 1, 0, in.V));
    return;
  }
  // How many threads have work, on average, by tokens and by columns. Barriers are not free.
  const int64_t rounds = (live + threads - 1) / threads, blocks = in.V / kBlock;
  const int by_columns = int(blocks < threads ? blocks : threads);
  if (live && 0.9 * by_columns > double(live) / rounds) {
#pragma omp parallel num_threads(by_columns)
    {
      const int rank = omp_get_thread_num(), size = omp_get_num_threads();
      const int64_t part = (in.V + size * 64 - 1) / (size * 64) * 64, begin = rank * part;
      const int64_t end = begin + part < in.V ? begin + part : in.V;
      const Team team = team_of(rank, size, begin < end ? begin : end, end);
      for (int64_t i = 0; i < tokens; ++i) body(token_at(in, i), team);
    }
    return;
  }
  // Dynamic, since ignored tokens cost nothing and often stand together; in runs long enough that two
  // threads seldom fault in the same page of the gradient.
  [[maybe_unused]] const int64_t chunk = live / (threads * 8) + 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t i = 0; i < tokens; ++i) body(token_at(in, i), team_of(omp_get_thread_num(), 1, 0, in.V));
}

}  // namespace WMTP_ISA
}  // namespace wmtp
