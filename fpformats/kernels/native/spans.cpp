// The passes over memory, block by block; compiled once for each instruction set.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "dtypes.hpp"
#include "decoding.hpp"
#include "hadamard.hpp"
#include "packing.hpp"
#include "philox.hpp"
#include "rounding.hpp"
#include "scales.hpp"
#include "trials.hpp"

namespace fpformats {
namespace {

// Sets rounding to nearest with subnormal numbers, whatever the calling thread has set.
class Arithmetic {
#if defined(__x86_64__)
 public:
  Arithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~Arithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Room for the random words of a block, in either width, and for 16 more.
struct RandomWords {
  uint64_t wide[block + 16];
  uint32_t narrow[block + 16];
};

// Buffers for the lanes, codes and random words of a block.
template <class Lane>
struct alignas(64) Buffers {
  Lane lanes[block], results[block], scales[block], zero_points[block];
  uint32_t codes[block];
  RandomWords words;
};

template <class Way, class Lane, class Out>
void apply(const Way& way, const Lane* in, Out* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<Out, uint32_t>) {
      out[i] = way.code(in[i]);
    } else {
      out[i] = way.value(in[i]);
    }
  }
}

template <Mode mode, class Lane, class Out>
void apply_general(const Job& job, int64_t begin, int64_t count, const Lane* in, Out* out,
                   uint64_t* words) {
  const General<mode> way(*job.plan, job.random.bits);
  if (way.is_stochastic) draw(job.random, begin, count, words);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t word = way.is_stochastic ? words[i] : 0;
    if constexpr (std::is_same_v<Out, uint32_t>) {
      out[i] = way.code(in[i], word);
    } else {
      out[i] = Lane(way.value(in[i], word));
    }
  }
}

template <class Lane, class Out>
void round_in_general(const Job& job, int64_t begin, int64_t count, const Lane* in, Out* out,
                      RandomWords* words) {
  switch (job.plan->mode) {
#define FPFORMATS_MODE(name) \
  case Mode::name:           \
    return apply_general<Mode::name>(job, begin, count, in, out, words ? words->wide : nullptr);
    FPFORMATS_MODE(nearest_ties_to_even)
    FPFORMATS_MODE(nearest_ties_to_away)
    FPFORMATS_MODE(toward_zero)
    FPFORMATS_MODE(toward_positive)
    FPFORMATS_MODE(toward_negative)
    FPFORMATS_MODE(to_odd)
    FPFORMATS_MODE(stochastic_a)
    FPFORMATS_MODE(stochastic_b)
    FPFORMATS_MODE(stochastic_c)
#undef FPFORMATS_MODE
  }
}

template <bool Signed, class Out>
void round_drawn(const Job& job, int64_t begin, int64_t count, const float* in, Out* out,
                 uint32_t* words) {
  const Drawn<Signed> way(*job.plan, job.random.bits);
  draw(job.random, begin, count, words);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<Out, uint32_t>) {
      out[i] = way.code(in[i], words[i]);
    } else {
      out[i] = way.value(in[i], words[i]);
    }
  }
}

template <bool Signed, class Out>
bool round_fast(const Plan& plan, int64_t count, const float* in, Out* out) {
  if (!plan.is_default) return false;
  if (plan.is_narrow) {
    if (plan.digits == 0) {
      apply(Narrow<Signed, true>(plan), in, out, count);
    } else {
      apply(Narrow<Signed, false>(plan), in, out, count);
    }
    return true;
  }
  if (!Pattern<Signed>::fits(plan)) return false;
  apply(Pattern<Signed>(plan), in, out, count);
  return true;
}

template <class Out>
void round_block(const Job& job, int64_t begin, int64_t count, const float* in, Out* out,
                 RandomWords* words) {
  const Plan& plan = *job.plan;
  if (plan.draws_narrow) {
    const auto draws = plan.is_signed ? round_drawn<true, Out> : round_drawn<false, Out>;
    return draws(job, begin, count, in, out, words->narrow);
  }
  const bool done = plan.is_signed ? round_fast<true>(plan, count, in, out)
                                   : round_fast<false>(plan, count, in, out);
  if (!done) round_in_general(job, begin, count, in, out, words);
}

template <class Out>
void round_block(const Job& job, int64_t begin, int64_t count, const double* in, Out* out,
                 RandomWords* words) {
  round_in_general(job, begin, count, in, out, words);
}

template <class Lane>
unsigned quantize_lanes(const Job& job, int64_t begin, int64_t end) {
  Buffers<Lane> buffers;
  Scales<Lane> scales(job, begin, buffers.scales, buffers.zero_points);
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = std::min(block, end - from);
    const Lane* in = load(job, from, count, buffers.lanes);
    Lane* out = place(job, from, buffers.results);
    if (job.scales) {
      scales.fill(count);
      scales.divide(in, buffers.lanes, count);
      in = buffers.lanes;
    }
    round_block(job, from, count, in, out, &buffers.words);
    if (job.scales) scales.multiply(out, count);
    store(job, from, count, out);
  }
  return 0;
}

// The codes of a narrow format as bytes, without a buffer of wider ones.
template <class Way>
unsigned encode_bytes(const Way& way, const Job& job, const float* in, uint8_t* out,
                      int64_t count) {
  const bool has_code = job.nan_code >= 0;
  const uint8_t nan = has_code ? uint8_t(job.nan_code) : 0;
  unsigned met = 0;
#pragma omp simd reduction(| : met)
  for (int64_t i = 0; i < count; ++i) {
    const bool is_nan = in[i] != in[i];
    met |= is_nan ? nan_in | nan_out : 0;
    out[i] = is_nan ? nan : uint8_t(way.code(in[i]));
  }
  return has_code ? 0 : met;
}

template <bool Signed>
unsigned encode_bytes(const Job& job, const float* in, uint8_t* out, int64_t count) {
  const Plan& plan = *job.plan;
  return plan.digits == 0 ? encode_bytes(Narrow<Signed, true>(plan), job, in, out, count)
                          : encode_bytes(Narrow<Signed, false>(plan), job, in, out, count);
}

template <class Lane>
unsigned encode_block(const Job& job, int64_t from, int64_t count, const Lane* in,
                      Buffers<Lane>& buffers) {
  const Plan& plan = *job.plan;
  if constexpr (std::is_same_v<Lane, float>) {
    if (plan.is_default && plan.is_narrow && (job.packed_bits || job.code_bytes == 1)) {
      uint8_t bytes[block + 8];
      char* out = static_cast<char*>(job.out);
      uint8_t* to = job.packed_bits ? bytes : reinterpret_cast<uint8_t*>(out) + from;
      const unsigned met = plan.is_signed ? encode_bytes<true>(job, in, to, count)
                                          : encode_bytes<false>(job, in, to, count);
      if (job.packed_bits) {
        std::memset(bytes + count, 0, 8);
        pack(bytes, out + from / 8 * job.packed_bits, count, job.packed_bits);
      }
      return met;
    }
  }
  round_block(job, from, count, in, buffers.codes, &buffers.words);
  const unsigned met = name_nan(job, count, in, buffers.codes);
  store_codes(job, from, count, buffers.codes);
  return met;
}

template <class Lane>
unsigned encode_lanes(const Job& job, int64_t begin, int64_t end) {
  Buffers<Lane> buffers;
  Scales<Lane> scales(job, begin, buffers.scales, buffers.zero_points);
  unsigned met = 0;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = std::min(block, end - from);
    const Lane* in = load(job, from, count, buffers.lanes);
    if (job.scales) {
      scales.fill(count);
      scales.divide(in, buffers.lanes, count);
      in = buffers.lanes;
    }
    met |= encode_block(job, from, count, in, buffers);
  }
  return met;
}

template <class Lane>
unsigned decode_lanes(const Job& job, int64_t begin, int64_t end) {
  Buffers<Lane> buffers;
  Scales<Lane> scales(job, begin, buffers.scales, buffers.zero_points);
  unsigned met = 0;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = std::min(block, end - from);
    met |= load_codes(job, from, count, buffers.codes);
    Lane* out = place(job, from, buffers.results);
    decode_block(*job.plan, count, buffers.codes, out);
    if (job.scales) {
      scales.fill(count);
      scales.multiply(out, count);
    }
    store(job, from, count, out);
  }
  return met;
}

// Values as whole numbers of steps: the smallest spacing of the format. Its reciprocal is a power of
// two, so that the products are exact.
//
// Narrow formats need no conversion to integers: added to a number whose last bit is the step, a value
// changes the number's last bits by its steps.
template <class Way, class Scaling>
unsigned count_narrow(const Way way, const Scaling scaled, float counter, const float* in,
                      uint8_t* out, int64_t count) {
  unsigned met = 0;
#pragma omp simd reduction(| : met)
  for (int64_t i = 0; i < count; ++i) {
    met |= in[i] != in[i] ? nan_in : 0;
    out[i] = uint8_t(bit_cast<uint32_t>(way.number(scaled(in[i])) + counter));
  }
  return met;
}

template <class Scaling>
unsigned count_narrow(const Job& job, const Scaling& scaled, const float* in, uint8_t* out,
                      int64_t count) {
  const Plan& plan = *job.plan;
  const float counter = float((0x1.8p23 + job.step_offset) * plan.quantum);
  const auto with = [&](const auto& way) {
    return count_narrow(way, scaled, counter, in, out, count);
  };
  if (plan.is_signed)
    return plan.digits ? with(Narrow<true, false>(plan)) : with(Narrow<true, true>(plan));
  return plan.digits ? with(Narrow<false, false>(plan)) : with(Narrow<false, true>(plan));
}

bool counts_narrow(const Plan& plan) {
  return plan.is_default && plan.is_narrow && plan.quantum <= 0x1p100;
}

template <class Lane>
unsigned count_block(const Job& job, int64_t from, int64_t count, const Lane* in,
                     Buffers<Lane>& buffers) {
  uint8_t* out = static_cast<uint8_t*>(job.out) + from;
  const Plan& plan = *job.plan;
  if constexpr (std::is_same_v<Lane, float>) {
    if (counts_narrow(plan)) return count_narrow(job, [](float x) { return x; }, in, out, count);
  }
  round_block(job, from, count, in, buffers.results, &buffers.words);
  const Lane per_unit = Lane(1 / plan.quantum);
  const Lane* q = buffers.results;
  unsigned met = 0;
#pragma omp simd reduction(| : met)
  for (int64_t i = 0; i < count; ++i) {
    const bool is_nan = q[i] != q[i];
    met |= is_nan ? nan_in : 0;
    out[i] = uint8_t(int32_t(is_nan ? Lane(0) : q[i] * per_unit) + job.step_offset);
  }
  return met;
}

template <class Lane>
unsigned count_steps_lanes(const Job& job, int64_t begin, int64_t end) {
  Buffers<Lane> buffers;
  Scales<Lane> scales(job, begin, buffers.scales, buffers.zero_points);
  unsigned met = 0;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = std::min(block, end - from);
    const Lane* in = load(job, from, count, buffers.lanes);
    if constexpr (std::is_same_v<Lane, float>) {
      if (scales.has_quotient() && counts_narrow(*job.plan)) {
        uint8_t* out = static_cast<uint8_t*>(job.out) + from;
        met |= scales.with_quotient(
            [&](const auto& scaled) { return count_narrow(job, scaled, in, out, count); });
        continue;
      }
    }
    if (job.scales) {
      scales.fill(count);
      scales.divide(in, buffers.lanes, count);
      in = buffers.lanes;
    }
    met |= count_block(job, from, count, in, buffers);
  }
  return met;
}

// The gradients of learned step sizes, as quantize_scaled in scaled.py describes them.
template <class Lane>
unsigned differentiate_lanes(const Job& job, int64_t begin, int64_t end) {
  Buffers<Lane> buffers;
  Scales<Lane> scales(job, begin, buffers.scales, buffers.zero_points);
  const Gradients& wanted = job.gradients;
  const Lane low = Lane(job.plan->low), high = Lane(job.plan->high);
  const Lane *v = buffers.lanes, *q = buffers.results;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = std::min(block, end - from);
    scales.fill(count);
    scales.divide(static_cast<const Lane*>(job.in) + from, buffers.lanes, count);
    round_block(job, from, count, v, buffers.results, &buffers.words);
    const Lane* given = static_cast<const Lane*>(wanted.given) + from;
    const auto write = [&](void* memory, const auto& factor) {
      if (!memory) return;
      Lane* out = static_cast<Lane*>(memory) + from;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const bool inside = (v[i] >= low) & (v[i] <= high);
        out[i] = given[i] * factor(inside, v[i], q[i]);
      }
    };
    const Lane beyond = wanted.clips ? Lane(0) : Lane(1);
    write(wanted.x, [=](bool inside, Lane, Lane) { return inside ? Lane(1) : beyond; });
    write(wanted.scale, [](bool inside, Lane v, Lane q) { return inside ? q - v : q; });
    write(wanted.zero_point, [](bool inside, Lane, Lane) { return inside ? Lane(0) : Lane(1); });
  }
  return 0;
}

// Quantize each row by each candidate, block by block; `take` gets the rounded block.
template <class Lane, class Take>
void try_rows(const Trial& trial, int64_t begin_row, int64_t end_row, const Take& take) {
  alignas(64) Lane v[block], q[block];
  Job job{};
  job.plan = trial.plan;
  for (int64_t row = begin_row; row < end_row; ++row) {
    for (int64_t candidate = 0; candidate < trial.candidates; ++candidate) {
      const TrialRow<Lane> tried = row_of<Lane>(trial, row, candidate);
      for (int64_t from = 0; from < trial.length; from += block) {
        const int64_t count = std::min(block, trial.length - from);
        divide(tried, from, count, v);
        round_block(job, 0, count, v, q, nullptr);
        take(tried, row * trial.candidates + candidate, from, count, q);
      }
    }
  }
}

template <class Lane>
void errors_of_rows(const Trial& trial, int64_t begin_row, int64_t end_row) {
  std::fill_n(trial.out + begin_row * trial.candidates,
              (end_row - begin_row) * trial.candidates, 0);
  try_rows<Lane>(trial, begin_row, end_row,
                 [&](const TrialRow<Lane>& row, int64_t at, int64_t from, int64_t count,
                     const Lane* q) { trial.out[at] += squared_error(row, from, count, q); });
}

template <class Lane>
void sums_of_rows(const Trial& trial, int64_t begin_row, int64_t end_row) {
  const int64_t size = trial.candidates * sum_count;
  std::fill_n(trial.out + begin_row * size, (end_row - begin_row) * size, 0);
  try_rows<Lane>(trial, begin_row, end_row,
                 [&](const TrialRow<Lane>& row, int64_t at, int64_t from, int64_t count,
                     const Lane* q) { add_sums(row, from, count, q, trial.out + at * sum_count); });
}

using Attempt = void (*)(const Trial&, int64_t, int64_t);

template <Attempt narrow, Attempt wide>
void attempt(const Trial& trial, int64_t begin_row, int64_t end_row) {
  const Arithmetic arithmetic;
  (trial.dtype == FloatDtype::float64 ? wide : narrow)(trial, begin_row, end_row);
}

void transform(const Transform& job, int64_t begin, int64_t end) {
  const Arithmetic arithmetic;
  (job.dtype == FloatDtype::float64 ? transform_groups<double> : transform_groups<float>)(
      job, begin, end);
}

using Pass = unsigned (*)(const Job&, int64_t, int64_t);

template <Pass narrow, Pass wide>
unsigned pass(const Job& job, int64_t begin, int64_t end) {
  const Arithmetic arithmetic;
  const unsigned met = (job.dtype == FloatDtype::float64 ? wide : narrow)(job, begin, end);
#if defined(__x86_64__)
  if (job.streams) _mm_sfence();
#endif
  return met;
}

}  // namespace

#define FPFORMATS_JOIN(isa, rest) isa##rest
#define FPFORMATS_PASSES(isa) FPFORMATS_JOIN(isa, _passes)
#define FPFORMATS_STRING(isa) #isa
#define FPFORMATS_NAME(isa) FPFORMATS_STRING(isa)

const Passes& FPFORMATS_PASSES(FPFORMATS_ISA)() {
  static constexpr Passes passes = {
      FPFORMATS_NAME(FPFORMATS_ISA),
      pass<quantize_lanes<float>, quantize_lanes<double>>,
      pass<encode_lanes<float>, encode_lanes<double>>,
      pass<decode_lanes<float>, decode_lanes<double>>,
      pass<count_steps_lanes<float>, count_steps_lanes<double>>,
      pass<differentiate_lanes<float>, differentiate_lanes<double>>,
      attempt<errors_of_rows<float>, errors_of_rows<double>>,
      attempt<sums_of_rows<float>, sums_of_rows<double>>,
      transform,
  };
  return passes;
}

}  // namespace fpformats
