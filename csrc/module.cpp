// The Python module: names, and numbers into structs. No update rule, no pointer arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <memory>
#include <tuple>
#include "batch.h"
#include "cpu.h"
#ifdef HAVE_CUDA
#include "cuda.h"
#include "multi_tensor.h"
#endif

namespace {

using BucketNumbers = std::tuple<int, bool, int, int, int, int, int64_t, int64_t, int64_t>;

Bucket bucket_of(const BucketNumbers& numbers) {
  return std::apply([](int algorithm, bool full, int state, int weight, int param, int grad, int64_t rows, int64_t n_rows, int64_t numbers) {
    return Bucket{algorithm, full, State(state), Weight(weight), DType(param), DType(grad), reinterpret_cast<const Row*>(rows), n_rows,
                  reinterpret_cast<const double*>(numbers)};
  }, numbers);
}

// A step on the CPU from its first change to its last: the buckets' weights, state and step counts, then `copies`, pairs of
// a parameter with gaps and the dense tensor that was updated in its place. No line of Python runs in between, so that no signal
// handler can leave half a step behind.
void step_cpu(const std::vector<BucketNumbers>& numbers, int threads, const std::string& isa, py::list copies) {
  static PyObject* const copy = PyUnicode_InternFromString("copy_");
  std::vector<Bucket> buckets;
  for (const BucketNumbers& bucket : numbers) buckets.push_back(bucket_of(bucket));
  {
    py::gil_scoped_release release;
    run_cpu(buckets, threads, isa);
  }
  for (const py::handle pair : copies) {
    PyObject* done = PyObject_CallMethodOneArg(PyTuple_GET_ITEM(pair.ptr(), 0), copy, PyTuple_GET_ITEM(pair.ptr(), 1));
    if (!done) throw py::error_already_set();
    Py_DECREF(done);
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of adabayes_fused for CPUs and NVIDIA GPUs; adabayes_fused.backends.native is the way in.";

  // Made by functions: a constructor that finds no memory would throw through Python's own frames, which ends the process.
  m.def("plain_tensors", [](py::list samples, uint64_t plain, uint64_t device_bits, py::object is_plain) {
    return std::make_unique<PlainTensors>(samples, plain, device_bits, is_plain);
  });
  m.def("batch", [](py::tuple slots, py::list layouts, py::object place_of, py::object alone, py::tuple tensor_types, py::capsule api,
                    const std::vector<std::string>& device_types, const PlainTensors& plain) {
    return std::make_unique<Batch>(slots, layouts, place_of, alone, tensor_types, api, device_types, plain);
  });

  py::class_<PlainTensors>(m, "PlainTensors")
      .def("contains", [](const PlainTensors& plain, py::object tensor) { return plain.contains(tensor.ptr()); });

  py::class_<Batch>(m, "Batch")
      .def("clear", &Batch::clear)
      .def("forget", &Batch::forget)
      .def("begin", &Batch::begin)
      .def("read", &Batch::read)
      .def("add", &Batch::add)
      .def("buckets", &Batch::buckets)
      .def("looked_at", &Batch::looked_at)
      .def("release", &Batch::release);

  m.def("cpu_isas", &cpu_isas);
  m.attr("ROW_WORDS") = kRowWords;
  m.attr("NUMBERS") = kNumbers;
  m.def("step_cpu", &step_cpu);
  m.def("sum_of_squares_cpu", [](const BucketNumbers& numbers, int threads, const std::string& isa) {
    const Bucket bucket = bucket_of(numbers);
    py::gil_scoped_release release;
    return sum_of_squares_cpu(bucket, threads, isa);
  });

#ifdef HAVE_CUDA
  m.attr("CUDA_CHUNK") = kChunk;
  m.def("run_cuda", [](const BucketNumbers& bucket, int64_t chunks, int64_t n_chunks, int64_t decision, int device, int64_t stream) {
    run_cuda(bucket_of(bucket), chunks, n_chunks, decision, device, stream);
  });
  m.def("sum_of_squares_cuda", [](const BucketNumbers& bucket, int64_t chunks, int64_t n_chunks, int64_t sums, int device, int64_t stream) {
    sum_of_squares_cuda(bucket_of(bucket), chunks, n_chunks, sums, device, stream);
  });
  m.def("decide_cuda", &decide_cuda);
  m.def("why_not_cuda", [](const BucketNumbers& bucket, int device) { return why_not_cuda(bucket_of(bucket), device); });
#endif
}
