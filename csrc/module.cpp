// The Python module: names, and numbers into structs. No update rule, no pointer arithmetic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include "batch.h"
#include "cpu.h"
#ifdef HAVE_CUDA
#include "cuda.h"
#include "multi_tensor.h"
#endif

namespace {

Bucket bucket_of(int algorithm, bool full, int param, int grad, int64_t rows, int64_t n_rows, int64_t coefficients) {
  return {algorithm, full, DType(param), DType(grad), reinterpret_cast<const Row*>(rows), n_rows, reinterpret_cast<const double*>(coefficients)};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of adabayes_fused for CPUs and NVIDIA GPUs; adabayes_fused.backends.native is the way in.";

  py::class_<Batch>(m, "Batch")
      .def(py::init<py::tuple, py::tuple, py::capsule, const std::vector<std::string>&>())
      .def("clear", &Batch::clear)
      .def("begin", &Batch::begin)
      .def("read", &Batch::read)
      .def("add", &Batch::add)
      .def("coefficient_keys", &Batch::coefficient_keys)
      .def("buckets", &Batch::buckets)
      .def("count_step", &Batch::count_step)
      .def("looked_at", &Batch::looked_at)
      .def("release", &Batch::release);

  m.def("cpu_isas", &cpu_isas);
  m.def("run_cpu", [](int algorithm, bool full, int param, int grad, int64_t rows, int64_t n_rows, int64_t coefficients, int threads, const std::string& isa) {
    const Bucket bucket = bucket_of(algorithm, full, param, grad, rows, n_rows, coefficients);
    py::gil_scoped_release release;
    run_cpu(bucket, threads, isa);
  });
  m.def("sum_of_squares_cpu", [](int algorithm, bool full, int param, int grad, int64_t rows, int64_t n_rows, int64_t coefficients, int threads, const std::string& isa) {
    const Bucket bucket = bucket_of(algorithm, full, param, grad, rows, n_rows, coefficients);
    py::gil_scoped_release release;
    return sum_of_squares_cpu(bucket, threads, isa);
  });

#ifdef HAVE_CUDA
  m.attr("CUDA_CHUNK") = kChunk;
  m.def("run_cuda", [](int algorithm, bool full, int param, int grad, int64_t rows, int64_t n_rows, int64_t coefficients,
                       int64_t chunks, int64_t n_chunks, int64_t found_inf, int device, int64_t stream) {
    run_cuda(bucket_of(algorithm, full, param, grad, rows, n_rows, coefficients), chunks, n_chunks, found_inf, device, stream);
  });
  m.def("sum_of_squares_cuda", [](int algorithm, bool full, int param, int grad, int64_t rows, int64_t n_rows, int64_t coefficients,
                                  int64_t chunks, int64_t n_chunks, int64_t sums, int device, int64_t stream) {
    sum_of_squares_cuda(bucket_of(algorithm, full, param, grad, rows, n_rows, coefficients), chunks, n_chunks, sums, device, stream);
  });
#endif
}
