// The Python module: plans, and passes over memory given by its address.
//
// Only what Python cannot know is checked here. Callers keep the memory alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "histogram.hpp"
#include "run.hpp"

namespace nb = nanobind;

namespace fpformats {
namespace {

std::vector<const Passes*>& choices() {
  static std::vector<const Passes*> passes = available_passes();
  return passes;
}

const Passes* chosen = choices().front();

Plan make_plan(const nb::object& plan, int mode) {
  Plan p{};
#define FPFORMATS_READ(field) p.field = nb::cast<decltype(p.field)>(plan.attr(#field));
  FPFORMATS_READ(low)
  FPFORMATS_READ(high)
  FPFORMATS_READ(floor)
  FPFORMATS_READ(smallest)
  FPFORMATS_READ(quantum)
  FPFORMATS_READ(digits)
  FPFORMATS_READ(code_base)
  FPFORMATS_READ(magnitude_bits)
  FPFORMATS_READ(mantissa_bits)
  FPFORMATS_READ(max_code)
  FPFORMATS_READ(linear)
  FPFORMATS_READ(pattern_offset)
  FPFORMATS_READ(infinite_code)
  FPFORMATS_READ(first_nan)
  FPFORMATS_READ(zero)
  FPFORMATS_READ(negative_zero)
  FPFORMATS_READ(nan_is_negative_zero)
  FPFORMATS_READ(is_default)
  FPFORMATS_READ(is_narrow)
  FPFORMATS_READ(draws_narrow)
#undef FPFORMATS_READ
  p.is_signed = nb::cast<bool>(plan.attr("signed"));
  p.mode = Mode(mode);
  for (int i = 0; i < edge_count; ++i) {
    p.edges[i] = nb::cast<double>(plan.attr("edges")[i]);
    p.edge_codes[i] = nb::cast<int64_t>(plan.attr("edge_codes")[i]);
  }
  return p;
}

const void* pointer(uint64_t address) { return reinterpret_cast<const void*>(uintptr_t(address)); }

// Scales and zero points by address, 0 for none, and their layout.
struct Scaling {
  uint64_t scales, zero_points;
  Layout layout;
};

struct Kernel {
  Plan plan;
  FloatDtype dtype;

  Kernel(const nb::object& fields, int mode, int dtype)
      : plan(make_plan(fields, mode)), dtype(FloatDtype(dtype)) {}

  Job job(uint64_t in, uint64_t out, int64_t count, const Scaling* scaling,
          const Random* random) const {
    Job job{};
    job.plan = &plan;
    job.in = pointer(in);
    job.out = const_cast<void*>(pointer(out));
    job.count = count;
    job.dtype = dtype;
    job.layout = {1, 1, 0};
    if (scaling) {
      job.scales = pointer(scaling->scales);
      job.zero_points = pointer(scaling->zero_points);
      job.layout = scaling->layout;
    }
    job.random = random ? *random : Random{nullptr, 0, 32};
    return job;
  }

  void quantize(uint64_t in, uint64_t out, int64_t count, int threads, bool streams,
                const Scaling* scaling, const Random* random) const {
    Job job = this->job(in, out, count, scaling, random);
    job.streams = streams;
    const Pass pass = chosen->quantize;
    nb::gil_scoped_release release;
    run(pass, job, threads);
  }

  unsigned encode(uint64_t in, uint64_t out, int64_t count, int threads, int64_t nan_code,
                  int code_bytes, int packed_bits, const Scaling* scaling,
                  const Random* random) const {
    Job job = this->job(in, out, count, scaling, random);
    job.nan_code = nan_code;
    job.code_bytes = code_bytes;
    job.packed_bits = packed_bits;
    const Pass pass = chosen->encode;
    nb::gil_scoped_release release;
    return run(pass, job, threads);
  }

  unsigned decode(uint64_t in, uint64_t out, int64_t count, int threads, bool streams,
                  int code_bytes, int packed_bits, const Scaling* scaling) const {
    Job job = this->job(in, out, count, scaling, nullptr);
    job.code_bytes = code_bytes;
    job.packed_bits = packed_bits;
    job.streams = streams;
    const Pass pass = chosen->decode;
    nb::gil_scoped_release release;
    return run(pass, job, threads);
  }

  unsigned count_steps(uint64_t in, uint64_t out, int64_t count, int threads, int step_offset,
                       const Scaling* scaling) const {
    Job job = this->job(in, out, count, scaling, nullptr);
    job.step_offset = step_offset;
    const Pass pass = chosen->count_steps;
    nb::gil_scoped_release release;
    return run(pass, job, threads);
  }

  // Gradients by address, 0 for those that are not wanted: see Gradients.
  void differentiate(uint64_t in, uint64_t given, uint64_t x, uint64_t scale, uint64_t zero_point,
                     bool clips, int64_t count, int threads, const Scaling& scaling,
                     const Random* random) const {
    Job job = this->job(in, 0, count, &scaling, random);
    const auto target = [](uint64_t address) { return const_cast<void*>(pointer(address)); };
    job.gradients = {pointer(given), target(x), target(scale), target(zero_point), clips};
    const Pass pass = chosen->differentiate;
    nb::gil_scoped_release release;
    run(pass, job, threads);
  }

  // Errors or, with `sums`, the six sums of candidates: see Trial.
  void attempt(uint64_t rows, uint64_t weights, uint64_t scales, uint64_t zero_points,
               int64_t row_count, int64_t length, int64_t candidates, uint64_t out, bool sums,
               int threads) const {
    const Trial trial = {
        &plan,
        dtype,
        pointer(rows),
        static_cast<const double*>(pointer(weights)),
        pointer(scales),
        pointer(zero_points),
        row_count,
        length,
        candidates,
        static_cast<double*>(const_cast<void*>(pointer(out))),
    };
    const Attempt attempt = sums ? chosen->sums : chosen->errors;
    nb::gil_scoped_release release;
    run(attempt, trial, threads);
  }
};

// A new NumPy array with a copy of some values.
template <class Value>
nb::object array_of(const Value* values, std::initializer_list<size_t> shape) {
  size_t size = 1;
  for (const size_t length : shape) size *= length;
  Value* copy = new Value[size];
  std::copy_n(values, size, copy);
  nb::capsule owner(copy, [](void* memory) noexcept { delete[] static_cast<Value*>(memory); });
  return nb::cast(nb::ndarray<nb::numpy, Value>(copy, shape.size(), shape.begin(), owner));
}

// The bins; and counts, sums and sums of squares of the low bits, of shape (bins, 3).
nb::tuple moments(uint64_t numbers, int64_t count, int low_bits) {
  Histogram result;
  {
    nb::gil_scoped_release release;
    result = histogram(static_cast<const float*>(pointer(numbers)), count, low_bits);
  }
  const size_t bins = result.bins.size();
  const int64_t* fields = reinterpret_cast<const int64_t*>(result.moments.data());
  return nb::make_tuple(array_of(result.bins.data(), {bins}), array_of(fields, {bins, 3}));
}

// Hadamard transforms, in float32 or, if wide, float64: see Transform.
void transform(uint64_t in, uint64_t out, int64_t outer, int64_t size, int64_t inner,
               double factor, bool wide, int threads) {
  if (size > hadamard_most) throw std::invalid_argument("the size of a transform is too large");
  const Transform job = {
      wide ? FloatDtype::float64 : FloatDtype::float32,
      pointer(in),
      const_cast<void*>(pointer(out)),
      outer,
      size,
      inner,
      factor,
  };
  const TransformGroups pass = chosen->transform;
  nb::gil_scoped_release release;
  run(pass, job, threads);
}

// The address of the memory of an array that is contiguous in row-major order.
uint64_t address(const nb::handle& array) {
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw nb::python_error();
  const uint64_t result = reinterpret_cast<uintptr_t>(view.buf);
  PyBuffer_Release(&view);
  return result;
}

#define FPFORMATS_NAME(name, text) text,
const std::vector<std::string> dtype_names = {FPFORMATS_DTYPES(FPFORMATS_NAME)};
const std::vector<std::string> mode_names = {FPFORMATS_MODES(FPFORMATS_NAME)};
#undef FPFORMATS_NAME

std::vector<std::string> names() {
  std::vector<std::string> result;
  for (const Passes* passes : choices()) result.emplace_back(passes->name);
  return result;
}

void choose(const std::string& name) {
  for (const Passes* passes : choices()) {
    if (name == passes->name) {
      chosen = passes;
      return;
    }
  }
  throw std::invalid_argument("this machine has no instructions of the name " + name);
}

}  // namespace
}  // namespace fpformats

NB_MODULE(_native, m) {
  using namespace fpformats;
  nb::class_<Scaling>(m, "Scaling")
      .def("__init__", [](Scaling* self, uint64_t scales, uint64_t zero_points, int64_t row_length,
                          int64_t run_length, int64_t row_stride) {
        new (self) Scaling{scales, zero_points, {row_length, run_length, row_stride}};
      });
  nb::class_<Random>(m, "Random").def(
      "__init__", [](Random* self, uint64_t words, uint64_t seed, int bits) {
        new (self) Random{static_cast<const int64_t*>(pointer(words)), seed, bits};
      });
  nb::class_<Kernel>(m, "Kernel")
      .def(nb::init<const nb::object&, int, int>(), nb::arg("plan"), nb::arg("mode"),
           nb::arg("dtype"))
      .def("quantize", &Kernel::quantize, nb::arg("source"), nb::arg("out"), nb::arg("count"),
           nb::arg("threads"), nb::arg("streams"), nb::arg("scaling").none() = nb::none(),
           nb::arg("random").none() = nb::none())
      .def("encode", &Kernel::encode, nb::arg("source"), nb::arg("out"), nb::arg("count"),
           nb::arg("threads"), nb::arg("nan_code"), nb::arg("code_bytes"), nb::arg("packed_bits"),
           nb::arg("scaling").none() = nb::none(), nb::arg("random").none() = nb::none())
      .def("decode", &Kernel::decode, nb::arg("source"), nb::arg("out"), nb::arg("count"),
           nb::arg("threads"), nb::arg("streams"), nb::arg("code_bytes"), nb::arg("packed_bits"),
           nb::arg("scaling").none() = nb::none())
      .def("count_steps", &Kernel::count_steps, nb::arg("source"), nb::arg("out"),
           nb::arg("count"), nb::arg("threads"), nb::arg("step_offset"),
           nb::arg("scaling").none() = nb::none())
      .def("differentiate", &Kernel::differentiate, nb::arg("source"), nb::arg("given"),
           nb::arg("x"), nb::arg("scale"), nb::arg("zero_point"), nb::arg("clips"),
           nb::arg("count"), nb::arg("threads"), nb::arg("scaling"),
           nb::arg("random").none() = nb::none())
      .def("attempt", &Kernel::attempt, nb::arg("rows"), nb::arg("weights"), nb::arg("scales"),
           nb::arg("zero_points"), nb::arg("row_count"), nb::arg("length"), nb::arg("candidates"),
           nb::arg("out"), nb::arg("sums"), nb::arg("threads"));
  m.def("moments", &moments, nb::arg("numbers"), nb::arg("count"), nb::arg("low_bits"));
  m.def("transform", &transform, nb::arg("source"), nb::arg("out"), nb::arg("outer"),
        nb::arg("size"), nb::arg("inner"), nb::arg("factor"), nb::arg("wide"),
        nb::arg("threads"));
  m.def("address", &address, nb::arg("array"));
  m.def("names", &names);
  m.def("modes", [] { return mode_names; });
  m.def("dtypes", [] { return dtype_names; });
  m.def("chosen", [] { return std::string(chosen->name); });
  m.def("choose", &choose, nb::arg("name"));
}
