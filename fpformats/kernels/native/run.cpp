// Choosing the instruction set once, and sharing a pass among threads.
#include "run.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fpformats {

std::vector<const Passes*> available_passes() {
  std::vector<const Passes*> passes;
#if defined(FPFORMATS_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("bmi2"))
    passes.push_back(&avx512_passes());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("fma"))  // every machine with FMA has F16C
    passes.push_back(&avx2_passes());
#endif
  passes.push_back(&baseline_passes());
  return passes;
}

namespace {

// Call `part` for each index below `parts`, on one thread each if the system has enough. Threads
// are started again each time: a pool would not survive a fork.
template <class Part>
void share(int64_t parts, const Part& part) {
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(parts));
  int64_t started = 1;
  try {
    for (; started < parts; ++started) helpers.emplace_back(part, started);
  } catch (const std::system_error&) {
    // The system has no more threads; this one does the rest.
  }
  part(0);
  for (int64_t index = started; index < parts; ++index) part(index);
  for (auto& helper : helpers) helper.join();
}

}  // namespace

unsigned run(Pass pass, const Job& job, int threads) {
  // Parts begin at whole blocks, so that no two threads share a byte of packed codes.
  const int64_t blocks = (job.count + block - 1) / block;
  const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(blocks, 1));
  std::atomic<unsigned> met{0};
  share(parts, [&](int64_t index) {
    const int64_t begin = blocks * index / parts * block;
    const int64_t end = std::min(blocks * (index + 1) / parts * block, job.count);
    if (begin < end) met |= pass(job, begin, end);
  });
  return met;
}

void run(Attempt attempt, const Trial& trial, int threads) {
  const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(trial.row_count, 1));
  share(parts, [&](int64_t index) {
    attempt(trial, trial.row_count * index / parts, trial.row_count * (index + 1) / parts);
  });
}

void run(TransformGroups transform, const Transform& job, int threads) {
  const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(job.outer, 1));
  share(parts, [&](int64_t index) {
    transform(job, job.outer * index / parts, job.outer * (index + 1) / parts);
  });
}

}  // namespace fpformats
