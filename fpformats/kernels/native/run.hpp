// Running a pass with the instructions that the machine supports.
#pragma once

#include <vector>

#include "job.hpp"

namespace fpformats {

using Pass = unsigned (*)(const Job&, int64_t begin, int64_t end);

using Attempt = void (*)(const Trial&, int64_t begin_row, int64_t end_row);

// The compiled instruction sets that the machine supports, the fastest first.
std::vector<const Passes*> available_passes();

// Apply a pass to all elements of a job, on up to `threads` threads, and return the flags of `Met`.
unsigned run(Pass pass, const Job& job, int threads);

// Try all rows of a trial, on up to `threads` threads.
void run(Attempt attempt, const Trial& trial, int threads);

using TransformGroups = void (*)(const Transform&, int64_t begin, int64_t end);

// Transform all groups, on up to `threads` threads.
void run(TransformGroups transform, const Transform& job, int threads);

}  // namespace fpformats
