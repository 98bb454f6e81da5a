// What one optimizer step updates, read straight from Python's objects: p, p.grad and the optimizer's state.
#pragma once
#include <pybind11/pybind11.h>
#include <string>
#include <utility>
#include <vector>
#include "dlpack.h"
#include "plain.h"
#include "table.h"

namespace py = pybind11;

constexpr int kKeptDims = 4;

class Batch {
 public:
  // `slots`: names of the state tensors, in the rule's order; `layouts`: for each dtype of parameters, how their state is stored
  // (adabayes_fused.codes.Layout): the numbers of the slots' dtypes, of the correction's or -1, and whether there is a seed; None
  // where none is. `place_of`: first, run and stride of a row, of a DTensor's spec. `alone`: whether nothing but references to
  // some tensors leads to their memory. `tensor_types`: (torch.nn.Parameter, torch.Tensor), taken here when
  // they are these very types and plain, and DTensor or None, whose local part is taken; `device_types`: "cpu", "cuda", the devices
  // whose backend reads a table.
  Batch(py::tuple slots, py::list layouts, py::object place_of, py::object alone, py::tuple tensor_types, py::capsule api,
        const std::vector<std::string>& device_types, PlainTensors plain);

  // Forgets a step that failed, and what was known of the state.
  void clear();

  // Has the next step look at all state, and lets go of it: somebody has asked for it.
  void forget();

  // Begins a step. `apart`: DTensors of one mesh and placements have launches of their own. `slabs`: the optimizer's own memory
  // for small state, one tensor each. State that nobody else could reach when it was looked at is looked at again once it has been
  // forgotten, if `held` (somebody has it now, or had it in the step before), or if a slab's memory has been replaced.
  void begin(py::list slabs, bool held, bool apart);

  // Takes every parameter whose gradient and state are plain, dense and alike in layout. Returns the positions of
  // those with a gradient that are not: no state yet, another layout, dtype, device or tensor type.
  py::list read(py::object params, py::dict state, int group);

  // Takes one parameter from plain tensors of one layout; false, and nothing taken, if they are not. `state`: by name. `spec`: that
  // of the DTensor they are the local parts of, else None.
  bool add(py::handle param, py::handle grad, py::dict state, int group, py::object spec);

  // One tuple a launch: (device type, device index, param dtype, grad dtype, address of the rows, number of rows, the spec of
  // its DTensors where they are kept apart).
  py::list buckets() const;

  // How many parameters' state had to be looked at in this step.
  int64_t looked_at() const { return looked_at_; }

  // Lets go of the gradients.
  void release();

 private:
  // How the state of parameters of one dtype is stored.
  struct Layout {
    bool known = false, random;
    DType slot[kMaxSlots], correction;
    bool corrected;
  };
  struct Launch { int device_type, device_id; DType param, grad; int spec; std::vector<Row> rows; };
  // Device, dtype and layout of a parameter of few dimensions.
  struct Place {
    int ndim = -1;  // none
    int device_type, device_id;
    DType dtype;
    int64_t shape[kKeptDims], strides[kKeptDims];
  };

  // What is known of a parameter from step to step. It holds while `date` is the present one: then its state lay in slabs,
  // which `slabs_` keeps alive, or in tensors that are `own`; nobody but the optimizer had references to it, and nobody can have
  // got any since. `param` is alive as long, being a key of that state; it is compared, never followed.
  struct Kept {
    int64_t date = 0, looked = 0;  // of the last look
    PyObject* param = nullptr;
    Place place;  // the state's and the parameter's
    int64_t step = 0, seed = 0, correction = 0;
    int64_t slot[kMaxSlots] = {};
    py::object own;   // state that lies in no slab
    py::object spec;  // of a DTensor, whose
    int64_t first = 0, run = 0, stride = 0;  // these are
  };
  struct Slab {
    py::object tensor;
    int64_t begin, end;  // addresses
  };
  struct State { PyObject *entry, *step, *slots[kMaxSlots], *correction, *seed; };

  void reset();
  bool describe(PyObject* object, dlpack::Tensor& out) const;
  py::object grad_of(PyObject* param) const;
  void fetch(PyObject* tensor) const;
  py::object part_of(PyObject* tensor, PyObject* placed_like) const;
  bool find(PyObject* entry, const Layout& layout, State& out) const;
  bool look_at(Kept& kept, PyObject* param, const dlpack::Tensor& described, DType dtype, const State& state) const;
  int64_t number_at(PyObject* tensor, DType dtype, const dlpack::Tensor& beside) const;
  void find_place(Kept& kept, const py::object& spec, int64_t numel) const;
  bool in_slab(int64_t address) const;
  template <class FindEntry>
  bool take(Kept& kept, PyObject* param, PyObject* grad, int group, py::object spec, FindEntry find_entry);
  Launch& launch_for(const dlpack::Tensor& param, DType param_dtype, DType grad_dtype, int spec);
  int index_of(const py::object& spec);

  py::tuple slots_;
  Layout layouts_[4];  // by the parameters' dtype
  py::object place_of_, alone_;
  const PyTypeObject *parameter_type_, *tensor_type_, *dtensor_type_;
  const dlpack::Api* api_;  // static in torch
  PlainTensors plain_;
  const PyGetSetDef* grad_ = nullptr;  // torch's own getter of p.grad
  bool cpu_ = false, cuda_ = false, apart_ = false;
  std::vector<Launch> launches_;
  std::vector<py::object> specs_;  // of mesh and placements that differ; a launch's `spec` is a place here, or -1
  std::vector<Slab> slabs_;                                 // in the optimizer's order
  std::vector<std::pair<int64_t, int64_t>> sorted_slabs_;   // their addresses
  int64_t date_ = 1;                                        // of what is known now
  bool held_ = true;                                        // of the step before: what was looked at then could be changed since
  int64_t looked_at_ = 0;
  std::vector<Kept> kept_;  // by position in the optimizer's groups
  size_t position_ = 0;
  std::vector<py::object> grads_;  // which another thread could free while the lock is released
};
