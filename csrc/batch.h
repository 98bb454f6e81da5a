// What one optimizer step updates, read straight from Python's objects: p, p.grad and the optimizer's state.
#pragma once
#include <pybind11/pybind11.h>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>
#include "dlpack.h"
#include "table.h"

namespace py = pybind11;

constexpr int kKeptDims = 4;

class Batch {
 public:
  // `slots`: names of the state tensors, in the rule's order; `tensor_types`: (torch.nn.Parameter, torch.Tensor), taken here
  // when they are these very types, and DTensor or None, whose local part is taken; `device_types`: "cpu", "cuda", the devices whose backend reads a table.
  Batch(py::tuple slots, py::tuple tensor_types, py::capsule api, const std::vector<std::string>& device_types);

  // Forgets a step that failed, and what was known of the state.
  void clear();

  // Begins a step. `apart`: DTensors of one mesh and placements have launches of their own. `slabs`: the optimizer's own memory
  // for small state, one tensor each. State that lay there and that nobody else could reach when last looked at is looked at
  // again only if `look`, or if a slab's memory has been replaced.
  void begin(py::list slabs, bool look, bool apart);

  // Takes every parameter whose gradient and state are plain, dense and alike in layout. Returns the positions of
  // those with a gradient that are not: no state yet, another layout, dtype, device or tensor type.
  py::list read(py::list params, py::dict state, int group);

  // Takes one parameter from plain tensors of one layout; false, and nothing taken, if they are not. `spec`: that of the
  // DTensor they are the local parts of, else None.
  bool add(py::handle param, py::handle grad, py::list slots, py::handle step, int group, py::object spec);

  // The distinct (group, step count after this step), in the order of the table's rows of coefficients.
  py::list coefficient_keys() const;

  // One tuple a launch: (device type, device index, param dtype, grad dtype, address of the rows, number of rows, the spec of
  // its DTensors where they are kept apart).
  py::list buckets() const;

  // Raises every step count; what `read` and `add` took has been updated.
  void count_step();

  // Lets go of the gradients.
  void release();

 private:
  struct Launch { int device_type, device_id; DType param, grad; int spec; std::vector<Row> rows; };
  struct Count { float* step; float next; };

  struct Delete { void operator()(dlpack::Managed* tensor) const { tensor->deleter(tensor); } };

  // Device, dtype and layout of a parameter of few dimensions.
  struct Place {
    int ndim = -1;  // none
    int device_type, device_id;
    DType dtype;
    int64_t shape[kKeptDims], strides[kKeptDims];
  };

  // What is known of a parameter from step to step.
  struct Kept {
    PyObject* param = nullptr;
    // A reference from C++. While there is one, torch describes a tensor in 18 ns instead of 48, as it need not pass
    // ownership between Python and C++ and back. On the CPU only, where it costs no GPU its memory.
    std::unique_ptr<dlpack::Managed, Delete> held;
    bool ours = false;  // its state is in a slab, and only the optimizer has references to it: addresses stay as they are
    Place place;        // the state's and the parameter's, where it is ours
    float* step = nullptr;
    int64_t slot[kMaxSlots] = {};
  };
  struct State { PyObject *entry, *step, *slots[kMaxSlots]; };

  void reset();
  bool describe(PyObject* object, dlpack::Tensor& out) const;
  py::object part_of(PyObject* tensor, PyObject* placed_like) const;
  bool find(PyObject* state, PyObject* param, State& out) const;
  bool look_at(Kept& kept, PyObject* param, const dlpack::Tensor& described, DType dtype, const State& state) const;
  bool in_slab(int64_t address) const;
  template <class FindState>
  bool take(Kept& kept, PyObject* param, PyObject* grad, int group, py::object spec, FindState find_state);
  Launch& launch_for(const dlpack::Tensor& param, DType param_dtype, DType grad_dtype, int spec);
  int index_of(const py::object& spec);
  int64_t coefficients_for(int group, float step);

  py::tuple slots_;
  const PyTypeObject *parameter_type_, *tensor_type_, *dtensor_type_;
  const dlpack::Api* api_;  // static in torch
  bool cpu_ = false, cuda_ = false, apart_ = false;
  std::vector<Launch> launches_;
  std::vector<py::object> specs_;  // of mesh and placements that differ; a launch's `spec` is a place here, or -1
  std::vector<Count> counts_;
  std::vector<std::pair<int, float>> keys_;
  std::unordered_map<uint64_t, int64_t> key_index_;
  std::vector<std::pair<int64_t, int64_t>> slabs_, sorted_slabs_;  // first address, and the one after the last
  bool look_ = true;
  std::vector<Kept> kept_;  // by position in the optimizer's groups
  size_t position_ = 0;
  std::vector<py::object> grads_;  // which another thread could free while the lock is released
};
