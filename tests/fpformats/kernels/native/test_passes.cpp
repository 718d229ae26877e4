// The compiled passes under the sanitizers: tails, misaligned memory, aliasing, threads.
//
// cmake -S . -B build/sanitize -DFPFORMATS_SANITIZE=ON && cmake --build build/sanitize &&
// ctest --test-dir build/sanitize --output-on-failure
//
// Whether the numbers are right is tested from Python; here every instruction set must agree with
// the baseline, byte for byte, and touch nothing outside of what it was given.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "run.hpp"

using namespace fpformats;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
}

// E2M1: values to 6, spacing 0.5 below 1.
Plan e2m1(Mode mode, bool is_default) {
  Plan plan{};
  plan.low = -6, plan.high = 6, plan.floor = 1, plan.quantum = 0.5;
  plan.digits = 1, plan.magnitude_bits = 3, plan.mantissa_bits = 1;
  plan.max_code = 7, plan.linear = 2, plan.pattern_offset = 2044;
  plan.infinite_code = plan.first_nan = -1;
  plan.zero = plan.is_signed = plan.negative_zero = true;
  plan.is_default = plan.is_narrow = is_default;
  plan.mode = mode;
  const double edges[] = {6, -6, 6, -6, 0};
  const int64_t codes[] = {7, 15, 7, 15, 0};
  std::copy_n(edges, +edge_count, plan.edges);
  std::copy_n(codes, +edge_count, plan.edge_codes);
  return plan;
}

// Memory of exactly `size` bytes on the heap, from an address that is `shift` off alignment.
struct Memory {
  Memory(size_t size, size_t shift) : all(new char[size + shift]), begin(all.get() + shift) {}
  std::unique_ptr<char[]> all;
  char* begin;
};

size_t bytes_of(FloatDtype dtype) {
  return dtype == FloatDtype::float64 ? 8 : dtype == FloatDtype::float32 ? 4 : 2;
}

void fill(char* memory, int64_t count, FloatDtype dtype) {
  std::mt19937 generator(7);
  std::normal_distribution<double> normal(0, 3);
  for (int64_t i = 0; i < count; ++i) {
    const double x = i % 17 == 3 ? NAN : i % 19 == 4 ? -HUGE_VAL : i % 7 == 0 ? -0.0 : normal(generator);
    const float single = float(x);
    uint32_t pattern;
    std::memcpy(&pattern, &single, 4);
    const uint16_t half = uint16_t(pattern >> 16);  // some pattern or other, where it is float16
    if (dtype == FloatDtype::float64) std::memcpy(memory + 8 * i, &x, 8);
    if (dtype == FloatDtype::float32) std::memcpy(memory + 4 * i, &single, 4);
    if (bytes_of(dtype) == 2) std::memcpy(memory + 2 * i, &half, 2);
  }
}

struct Case {
  int64_t count;
  FloatDtype dtype;
  Mode mode;
  bool is_default, scaled, streams;
  int packed_bits, threads;
};

std::string describe(const Case& c, const char* isa, const char* pass) {
  return std::string(pass) + " of " + std::to_string(c.count) + " by " + isa + ", dtype " +
         std::to_string(int(c.dtype)) + ", mode " + std::to_string(int(c.mode)) +
         (c.scaled ? ", scaled" : "") + (c.streams ? ", streamed" : "") + ", packed " +
         std::to_string(c.packed_bits) + ", threads " + std::to_string(c.threads);
}

std::vector<char> outcome(const Passes& passes, const Case& c, const char* pass) {
  const Plan plan = e2m1(c.mode, c.is_default);
  const size_t width = bytes_of(c.dtype), shift = width;
  const std::string name = pass;
  const bool steps = name == "count_steps";
  const size_t codes = c.packed_bits && !steps ? size_t((c.count * c.packed_bits + 7) / 8) : size_t(c.count);
  const size_t in_bytes = name == "decode" ? codes : width * size_t(c.count);
  const size_t out_bytes = name == "encode" || steps ? codes : width * size_t(c.count);
  Memory in(in_bytes, name == "decode" ? 1 : shift), out(out_bytes, name == "encode" || steps ? 1 : shift);
  if (name == "decode") {
    for (size_t i = 0; i < in_bytes; ++i) in.begin[i] = char(c.packed_bits ? i * 37 : i % 16);
  } else {
    fill(in.begin, c.count, c.dtype);
  }
  // Groups of five along rows of twelve, so that the last of a row is shorter.
  const Layout layout = {12, 5, 3};
  const size_t scales = size_t(c.count / 12 + 1) * 3, lane = c.dtype == FloatDtype::float64 ? 8 : 4;
  Memory scale(scales * lane, lane), zero(scales * lane, lane);
  for (size_t i = 0; i < scales; ++i) {
    const double s = 0.25 + double(i % 5), z = double(i % 3) - 1;
    const float narrow_s = float(s), narrow_z = float(z);
    std::memcpy(scale.begin + i * lane, lane == 8 ? (const void*)&s : &narrow_s, lane);
    std::memcpy(zero.begin + i * lane, lane == 8 ? (const void*)&z : &narrow_z, lane);
  }
  Job job{};
  job.plan = &plan, job.in = in.begin, job.out = out.begin, job.count = c.count;
  job.dtype = c.dtype, job.layout = {1, 1, 0}, job.random = {nullptr, 11, 32};
  if (c.scaled) job.scales = scale.begin, job.zero_points = zero.begin, job.layout = layout;
  job.nan_code = 3, job.code_bytes = 1, job.packed_bits = c.packed_bits, job.streams = c.streams;
  job.step_offset = 128;
  run(name == "quantize" ? passes.quantize : name == "encode" ? passes.encode
      : steps ? passes.count_steps : passes.decode,
      job, c.threads);
  return std::vector<char>(out.begin, out.begin + out_bytes);
}

// Bits 0 to 2 of `wanted` are the gradients of x, scale and zero point; bit 3 clips.
std::vector<char> gradients_of(const Passes& passes, FloatDtype dtype, int64_t count, int wanted,
                               int threads) {
  const Plan plan = e2m1(Mode::nearest_ties_to_even, true);
  const size_t width = bytes_of(dtype), size = width * size_t(count);
  Memory in(size, width), given(size, 0), out(3 * size, width);
  fill(in.begin, count, dtype);
  fill(given.begin, count, dtype);
  std::memset(out.begin, 0, 3 * size);
  const double wide[] = {0.25, 1.5, 4}, zeros[] = {-1, 0, 0.5};
  const float narrow[] = {0.25f, 1.5f, 4}, narrow_zeros[] = {-1, 0, 0.5f};
  Job job{};
  job.plan = &plan, job.in = in.begin, job.count = count, job.dtype = dtype;
  job.layout = {12, 5, 0}, job.random = {nullptr, 0, 32};
  job.scales = width == 8 ? (const void*)wide : narrow;
  job.zero_points = width == 8 ? (const void*)zeros : narrow_zeros;
  const auto target = [&](int i) { return wanted >> i & 1 ? out.begin + i * size : nullptr; };
  job.gradients = {given.begin, target(0), target(1), target(2), bool(wanted & 8)};
  run(passes.differentiate, job, threads);
  return std::vector<char>(out.begin, out.begin + 3 * size);
}

void agree(const Case& c) {
  const auto all = available_passes();
  for (const char* pass : {"quantize", "encode", "count_steps", "decode"}) {
    Case single = c;
    single.threads = 1, single.streams = false;
    const auto expected = outcome(baseline_passes(), single, pass);
    for (const Passes* passes : all)
      expect(outcome(*passes, c, pass) == expected, describe(c, passes->name, pass));
  }
}

// Each gradient alone and all together, clipped or not, on memory of exactly their size.
void gradients_agree() {
  for (const FloatDtype dtype : {FloatDtype::float32, FloatDtype::float64}) {
    for (const int64_t count : {0, 1, 17, 1023, 1025, 2500}) {
      for (int wanted = 1; wanted < 16; ++wanted) {
        std::vector<char> expected;
        for (const int threads : {1, 3}) {
          for (const Passes* passes : available_passes()) {
            const std::vector<char> found = gradients_of(*passes, dtype, count, wanted, threads);
            if (expected.empty()) expected = found;
            expect(found == expected, std::string("gradients by ") + passes->name);
          }
        }
      }
    }
  }
}

// In place, and with words that are given.
void in_place_and_words() {
  const int64_t count = 3001;
  const Plan plan = e2m1(Mode::stochastic_b, false);
  std::vector<int64_t> words(count, 77);
  for (const Passes* passes : available_passes()) {
    Memory in(4 * count, 4), out(4 * count, 4);
    fill(in.begin, count, FloatDtype::float32);
    Job job{};
    job.plan = &plan, job.in = in.begin, job.out = out.begin, job.count = count;
    job.dtype = FloatDtype::float32, job.layout = {1, 1, 0}, job.random = {words.data(), 0, 8};
    run(passes->quantize, job, 1);
    job.out = in.begin;
    run(passes->quantize, job, 2);
    expect(std::memcmp(in.begin, out.begin, 4 * count) == 0, std::string("in place by ") + passes->name);
  }
}

}  // namespace

int main() {
  const FloatDtype dtypes[] = {FloatDtype::float16, FloatDtype::bfloat16, FloatDtype::float32, FloatDtype::float64};
  for (const int64_t count : {0, 1, 7, 8, 15, 17, 63, 1023, 1024, 1025, 2500}) {
    for (const FloatDtype dtype : dtypes) {
      for (const bool scaled : {false, true}) {
        for (const int bits : {0, 4, 6, 7}) {
          agree({count, dtype, Mode::nearest_ties_to_even, true, scaled, false, bits, 1});
          agree({count, dtype, Mode::nearest_ties_to_even, true, scaled, true, bits, 2});
        }
        for (int mode = 0; mode <= int(Mode::stochastic_c); ++mode)
          agree({count, dtype, Mode(mode), false, scaled, false, 4, 3});
      }
    }
  }
  in_place_and_words();
  gradients_agree();
  std::printf("%d failures\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
