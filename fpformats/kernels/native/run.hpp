// Running a pass with the instructions that the machine has.
#pragma once

#include <vector>

#include "job.hpp"

namespace fpformats {

using Pass = unsigned (*)(const Job&, int64_t begin, int64_t end);

using Attempt = void (*)(const Trial&, int64_t begin_row, int64_t end_row);

// The instruction sets that were compiled and that the machine has, from the fastest.
std::vector<const Passes*> available_passes();

// Apply a pass to all elements of a job, on up to so many threads, and tell what was met.
unsigned run(Pass pass, const Job& job, int threads);

// Try all rows of a trial, on up to so many threads.
void run(Attempt attempt, const Trial& trial, int threads);

}  // namespace fpformats
