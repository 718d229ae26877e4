// The work for a kernel, as plain records that Python checks and fills.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fpformats {

// Each list gives the members of an enumeration and their names in Python, in the same order.
#define FPFORMATS_DTYPES(each) \
  each(float16, "float16")     \
  each(bfloat16, "bfloat16")   \
  each(float32, "float32")     \
  each(float64, "float64")

#define FPFORMATS_MODES(each)                       \
  each(nearest_ties_to_even, "NearestTiesToEven")   \
  each(nearest_ties_to_away, "NearestTiesToAway")   \
  each(toward_zero, "TowardZero")                   \
  each(toward_positive, "TowardPositive")           \
  each(toward_negative, "TowardNegative")           \
  each(to_odd, "ToOdd")                             \
  each(stochastic_a, "StochasticA")                 \
  each(stochastic_b, "StochasticB")                 \
  each(stochastic_c, "StochasticC")

#define FPFORMATS_MEMBER(name, text) name,
enum class FloatDtype : int { FPFORMATS_DTYPES(FPFORMATS_MEMBER) };
enum class Mode : int { FPFORMATS_MODES(FPFORMATS_MEMBER) };
#undef FPFORMATS_MEMBER

// Results that are not values of the format, in the order of Edges in policy.py.
enum Edge { above, below, infinity, negative_infinity, zero_result, edge_count };

constexpr int64_t nan_edge = -1;  // code of an edge that is NaN

// A format and a policy; plan.py describes the fields.
struct Plan {
  double low, high, floor, smallest, quantum;
  int digits, code_base, magnitude_bits, mantissa_bits;
  int64_t max_code, linear, pattern_offset, infinite_code, first_nan;
  bool zero, is_signed, negative_zero, nan_is_negative_zero, is_default, is_narrow, draws_narrow;
  Mode mode;
  double edges[edge_count];
  int64_t edge_codes[edge_count];
};

// Which scale an element has. The array consists of rows of `row_length` elements, and a row of
// runs of `run_length`, of which the last may be shorter. Run j of a row has the scale at index
// row * row_stride + j.
struct Layout {
  int64_t row_length, run_length, row_stride;
};

// Random words of the stochastic modes: given, or drawn by the index of the element.
struct Random {
  const int64_t* words;  // null to draw them from the seed
  uint64_t seed;
  int bits;
};

// The given gradient of a scaled result, and the gradients of its inputs, element by element, in
// the dtype: float32 or float64. A null pointer means that this gradient is not wanted.
struct Gradients {
  const void* given;
  void *x, *scale, *zero_point;
  bool clips;  // whether the gradient of x is zero beyond the range
};

// One pass over `count` elements. Scales are float64 for float64 data, else float32; null for none.
struct Job {
  const Plan* plan;
  const void* in;
  void* out;
  int64_t count;
  FloatDtype dtype;
  const void* scales;
  const void* zero_points;
  Layout layout;
  Random random;
  int64_t nan_code;  // code of NaN, negative for none
  int code_bytes;    // width of an unpacked code
  int packed_bits;   // width of a packed code, 1 to 8; 0 for unpacked ones
  int step_offset;   // what is added to a value in steps, to store it in a byte
  bool streams;      // whether to write past the caches
  Gradients gradients;
};

// Rows to quantize by several candidates of a scale and a zero point, for comparison. Data, scales
// and zero points have the dtype, float32 or float64.
struct Trial {
  const Plan* plan;
  FloatDtype dtype;
  const void* rows;           // (row_count, length)
  const double* weights;      // the same shape, or null for 1
  const void* scales;         // (row_count, candidates)
  const void* zero_points;    // the same shape, or null
  int64_t row_count, length, candidates;
  double* out;  // (row_count, candidates); for sums, six values for each
};

// Hadamard transforms of all groups of an array of shape (outer, size, inner) along the size.
struct Transform {
  FloatDtype dtype;  // float32 or float64
  const void* in;
  void* out;  // may be `in`
  int64_t outer, size, inner;  // the size is a power of two up to hadamard_most
  double factor;               // multiplies the sums
};

constexpr int64_t hadamard_most = 1024;

constexpr int sum_count = 6;  // the fields of Sums in objective.py, in the same order

// Flags for input that a pass has found and its caller must refuse.
enum Met : unsigned { nan_in = 1, nan_out = 2, bad_code = 4 };

// The passes of one instruction set, over the elements from `begin` to `end`. `begin` is a
// multiple of `block`.
constexpr int64_t block = 1024;

struct Passes {
  const char* name;
  unsigned (*quantize)(const Job&, int64_t begin, int64_t end);
  unsigned (*encode)(const Job&, int64_t begin, int64_t end);
  unsigned (*decode)(const Job&, int64_t begin, int64_t end);
  unsigned (*count_steps)(const Job&, int64_t begin, int64_t end);
  unsigned (*differentiate)(const Job&, int64_t begin, int64_t end);
  // For rows of a trial: weighted sums of squared errors, and the sums for a least-squares fit.
  void (*errors)(const Trial&, int64_t begin_row, int64_t end_row);
  void (*sums)(const Trial&, int64_t begin_row, int64_t end_row);
  void (*transform)(const Transform&, int64_t begin, int64_t end);  // of outer indices
};

const Passes& baseline_passes();
const Passes& avx2_passes();
const Passes& avx512_passes();

}  // namespace fpformats
