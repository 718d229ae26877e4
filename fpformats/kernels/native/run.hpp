// Running a pass with the instructions that the machine has.
#pragma once

#include <vector>

#include "job.hpp"

namespace fpformats {

using Pass = unsigned (*)(const Job&, int64_t begin, int64_t end);

// The instruction sets that were compiled and that the machine has, from the fastest.
std::vector<const Passes*> available_passes();

// Apply a pass to all elements of a job, on up to so many threads, and tell what was met.
unsigned run(Pass pass, const Job& job, int threads);

}  // namespace fpformats
