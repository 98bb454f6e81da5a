// The CUDA backend under other macros (csrc/multi_tensor.h), as a library that ctypes calls: bench/tune.py.
#include "../csrc/cuda.cu"

extern "C" const char* run(int algorithm, int full, int state, int weight, int param, int grad, int64_t rows, int64_t n_rows, int64_t numbers, int64_t chunks,
                           int64_t n_chunks, int64_t decision, int device, int64_t stream) {
  static std::string error;
  try {
    run_cuda({algorithm, full != 0, State(state), Weight(weight), DType(param), DType(grad), reinterpret_cast<const Row*>(rows), n_rows,
              reinterpret_cast<const double*>(numbers)},
             chunks, n_chunks, decision, device, stream);
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}
