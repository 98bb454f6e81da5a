#include "batch.h"
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace {

constexpr int kMaxDims = 16;

std::optional<DType> dtype_of(const dlpack::Tensor& t) {
  if (t.type_lanes != 1) return std::nullopt;
  if (t.type_code == dlpack::kBfloat && t.type_bits == 16) return DType::bf16;
  if (t.type_code != dlpack::kFloat) return std::nullopt;
  if (t.type_bits == 32) return DType::f32;
  if (t.type_bits == 64) return DType::f64;
  if (t.type_bits == 16) return DType::f16;
  return std::nullopt;
}

int64_t numel_of(const dlpack::Tensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

int64_t address_of(const dlpack::Tensor& t) { return reinterpret_cast<int64_t>(t.data) + int64_t(t.byte_offset); }

bool contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

// One element after the other in memory, in whatever order of the dimensions.
bool dense(const dlpack::Tensor& t) {
  if (contiguous(t)) return true;
  if (t.ndim > kMaxDims) return false;
  int order[kMaxDims], n = 0;
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] != 1) order[n++] = d;
  std::sort(order, order + n, [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  int64_t expected = 1;
  for (int k = 0; k < n; ++k) {
    if (t.strides[order[k]] != expected) return false;
    expected *= t.shape[order[k]];
  }
  return true;
}

bool same_place(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.device_type != b.device_type || a.device_id != b.device_id || a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d] || (a.shape[d] != 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

// Whether `t` is still as the state that is kept for it was found to be.
template <class Place>
bool is_at(const Place& kept, const dlpack::Tensor& t, DType dtype) {
  return kept.ndim == t.ndim && kept.device_type == t.device_type && kept.device_id == t.device_id && kept.dtype == dtype &&
         std::equal(t.shape, t.shape + t.ndim, kept.shape) && std::equal(t.strides, t.strides + t.ndim, kept.strides);
}

bool is_gpu(const dlpack::Tensor& t) { return t.device_type == dlpack::kCUDA || t.device_type == dlpack::kROCM; }

// Looks `tensor` up by its identity, which is what torch hashes it by, without the call into Python that hashing is.
PyObject* entry_of(PyObject* state, PyObject* tensor) {
  PyObject* entry = _PyDict_GetItem_KnownHash(state, tensor, Py_hash_t(reinterpret_cast<intptr_t>(tensor)));
  if (!entry && PyErr_Occurred()) throw py::error_already_set();
  return entry;
}

// param.grad, by the getter that torch gave its tensors, without looking it up each time.
PyObject* grad_of(PyObject* param) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  static PyObject* const found = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(param)), name);
  if (!found || Py_TYPE(found) != &PyGetSetDescr_Type || !PyType_IsSubtype(Py_TYPE(param), PyDescr_TYPE(found))) return PyObject_GetAttr(param, name);
  const PyGetSetDef* getter = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
  return getter->get(param, getter->closure);
}

// Of two DTensors' specs, whether they are the same placements on a mesh of the same processes, or, if `one_mesh`, on one mesh:
// others of the same processes may have process groups of their own.
bool same_placement(py::handle a, py::handle b, bool one_mesh) {
  static PyObject *const mesh = PyUnicode_InternFromString("mesh"), *const placements = PyUnicode_InternFromString("placements");
  if (a.is(b)) return true;
  const py::object mesh_a = a.attr(mesh), mesh_b = b.attr(mesh);
  return (mesh_a.is(mesh_b) || (!one_mesh && mesh_a.equal(mesh_b))) && a.attr(placements).equal(b.attr(placements));
}

py::object spec_of(PyObject* dtensor) {
  static PyObject* const spec = PyUnicode_InternFromString("_spec");
  return py::handle(dtensor).attr(spec);
}

// torch's lazy negation, which no description of the memory shows. It comes as the imaginary part of a lazy conjugate, whose
// elements lie two apart: dense only where there is one of them.
bool is_negated_view(PyObject* tensor, const dlpack::Tensor& described) {
  if (numel_of(described) != 1) return false;
  static PyObject* const is_neg = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), "is_neg");
  PyObject* answer = PyObject_CallOneArg(is_neg, tensor);
  if (!answer) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

}  // namespace

Batch::Batch(py::tuple slots, py::tuple tensor_types, py::capsule api, const std::vector<std::string>& device_types)
    : slots_(slots),
      parameter_type_(reinterpret_cast<PyTypeObject*>(py::object(tensor_types[0]).ptr())),
      tensor_type_(reinterpret_cast<PyTypeObject*>(py::object(tensor_types[1]).ptr())),
      dtensor_type_(reinterpret_cast<PyTypeObject*>(py::object(tensor_types[2]).ptr())),
      api_(nullptr) {
  const auto* found = static_cast<const dlpack::Api*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  while (found && found->major > 1) found = found->older;
  if (!found || !found->tensor_from_object) throw std::invalid_argument("this torch's DLPack exchange API cannot describe a tensor");
  if (slots.size() > kMaxSlots) throw std::invalid_argument("a table's row has four slots");
  api_ = found;
  for (const std::string& type : device_types) (type == "cpu" ? cpu_ : cuda_) = true;
}

void Batch::clear() {
  reset();
  slabs_.clear();
}

void Batch::reset() {
  for (Launch& launch : launches_) launch.rows.clear();
  position_ = 0;
  specs_.clear();
  counts_.clear(), keys_.clear(), key_index_.clear(), grads_.clear();
}

bool Batch::describe(PyObject* object, dlpack::Tensor& out) const {
  const PyTypeObject* type = Py_TYPE(object);
  if (type != tensor_type_ && type != parameter_type_) return false;
  if (api_->tensor_from_object(object, &out) == 0) return true;
  PyErr_Clear();  // sparse, meta and the like: Python's path says what is wrong with them
  return false;
}

// The part of `tensor` that is in this process: itself, or a DTensor's local tensor, null where it is placed otherwise than
// `placed_like`, another DTensor.
py::object Batch::part_of(PyObject* tensor, PyObject* placed_like) const {
  static PyObject* const local = PyUnicode_InternFromString("_local_tensor");
  const bool sharded = Py_TYPE(tensor) == dtensor_type_;
  if (sharded != (Py_TYPE(placed_like) == dtensor_type_)) return {};
  if (!sharded) return py::reinterpret_borrow<py::object>(tensor);
  if (tensor != placed_like && !same_placement(spec_of(tensor), spec_of(placed_like), false)) return {};
  return py::handle(tensor).attr(local);
}

int Batch::index_of(const py::object& spec) {
  if (!apart_ || !spec || spec.is_none()) return -1;
  for (size_t k = 0; k < specs_.size(); ++k)
    if (same_placement(specs_[k], spec, true)) return int(k);
  specs_.push_back(spec);
  return int(specs_.size()) - 1;
}

int64_t Batch::coefficients_for(int group, float step) {
  if (!keys_.empty() && keys_.back() == std::make_pair(group, step)) return int64_t(keys_.size()) - 1;
  uint32_t bits;
  memcpy(&bits, &step, 4);
  const auto [found, added] = key_index_.try_emplace(uint64_t(group) << 32 | bits, keys_.size());
  if (added) keys_.push_back({group, step});
  return found->second;
}

Batch::Launch& Batch::launch_for(const dlpack::Tensor& p, DType param, DType grad, int spec) {
  for (Launch& l : launches_)
    if (l.device_type == p.device_type && l.device_id == p.device_id && l.param == param && l.grad == grad && l.spec == spec) return l;
  return launches_.emplace_back(Launch{p.device_type, p.device_id, param, grad, spec, {}});
}

void Batch::begin(py::list slabs, bool look, bool apart) {
  reset();
  apart_ = apart;
  const size_t n = PyList_GET_SIZE(slabs.ptr());
  look_ = look || n != slabs_.size();
  slabs_.resize(n);
  for (size_t k = 0; k < n; ++k) {
    dlpack::Tensor t;
    if (!describe(PyList_GET_ITEM(slabs.ptr(), k), t)) throw std::invalid_argument("a slab must be a plain tensor");
    const std::pair<int64_t, int64_t> range{address_of(t), address_of(t) + numel_of(t) * t.type_bits / 8};
    look_ |= range != slabs_[k];
    slabs_[k] = range;
  }
  if (!look_) return;
  sorted_slabs_ = slabs_;
  std::sort(sorted_slabs_.begin(), sorted_slabs_.end());
}

bool Batch::in_slab(int64_t address) const {
  const auto after = std::upper_bound(sorted_slabs_.begin(), sorted_slabs_.end(), address, [](int64_t a, const auto& slab) { return a < slab.first; });
  return after != sorted_slabs_.begin() && address < std::prev(after)->second;
}

bool Batch::find(PyObject* state, PyObject* param, State& out) const {
  static PyObject* const step_name = PyUnicode_InternFromString("step");
  out.entry = entry_of(state, param);
  if (!out.entry || !PyDict_Check(out.entry) || !(out.step = PyDict_GetItemWithError(out.entry, step_name))) return false;
  for (size_t k = 0; k < slots_.size(); ++k)
    if (!(out.slots[k] = PyDict_GetItemWithError(out.entry, PyTuple_GET_ITEM(slots_.ptr(), k)))) return false;
  return true;
}

// Notes where the state lies, and whether it is ours; false if it is not as a kernel takes it.
bool Batch::look_at(Kept& kept, PyObject* param, const dlpack::Tensor& p, DType dtype, const State& state) const {
  const DType state_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  bool ours = state.entry && Py_TYPE(param) != dtensor_type_ && Py_REFCNT(state.entry) == 1 && Py_REFCNT(state.step) == 1 && p.ndim <= kKeptDims;
  dlpack::Tensor s;
  for (size_t k = 0; k < slots_.size(); ++k) {
    const py::object slot = part_of(state.slots[k], param);
    if (!slot || !describe(slot.ptr(), s) || dtype_of(s) != state_dtype || !same_place(p, s)) return false;
    kept.slot[k] = address_of(s);
    ours = ours && Py_REFCNT(state.slots[k]) == 1 && in_slab(kept.slot[k]);
  }
  if (!describe(state.step, s) || dtype_of(s) != DType::f32 || s.ndim != 0 || s.device_type != dlpack::kCPU) return false;
  kept.step = reinterpret_cast<float*>(address_of(s));
  kept.ours = ours && in_slab(address_of(s));
  if (!kept.ours) return true;
  kept.place.ndim = p.ndim, kept.place.device_type = p.device_type, kept.place.device_id = p.device_id, kept.place.dtype = dtype;
  std::copy_n(p.shape, p.ndim, kept.place.shape), std::copy_n(p.strides, p.ndim, kept.place.strides);
  return true;
}

template <class FindState>
bool Batch::take(Kept& kept, PyObject* param, PyObject* grad, int group, py::object spec, FindState find_state) {
  // A description is valid until the next object's on this thread: keep only numbers of it. Shape and strides belong
  // to the tensor and stay.
  dlpack::Tensor p, g;
  const py::object part = part_of(param, param), grad_part = part_of(grad, param);
  if (!part || !grad_part || !describe(part.ptr(), p) || !describe(grad_part.ptr(), g)) return false;
  if (!(p.device_type == dlpack::kCPU ? cpu_ : is_gpu(p) && cuda_)) return false;
  const auto param_dtype = dtype_of(p), grad_dtype = dtype_of(g);
  if (!param_dtype || !grad_dtype || !same_place(p, g) || is_negated_view(grad_part.ptr(), g) || is_negated_view(part.ptr(), p)) return false;
  const bool known = kept.ours && !look_ && kept.param == param && is_at(kept.place, p, *param_dtype);
  State state;
  if (!known && (!dense(p) || !find_state(state) || !look_at(kept, param, p, *param_dtype, state))) return false;
  Row row{address_of(p), address_of(g), {}, numel_of(p), coefficients_for(group, *kept.step + 1)};
  std::copy_n(kept.slot, kMaxSlots, row.slot);
  if (apart_ && Py_TYPE(param) == dtensor_type_) spec = spec_of(param);
  launch_for(p, *param_dtype, *grad_dtype, index_of(spec)).rows.push_back(row);
  counts_.push_back({kept.step, *kept.step + 1});
  grads_.push_back(py::reinterpret_borrow<py::object>(grad));
  if (kept.param == param) return true;
  dlpack::Managed* held = nullptr;
  if (p.device_type == dlpack::kCPU && part.ptr() == param && api_->managed_from_object(param, &held) != 0) PyErr_Clear();
  kept.held.reset(held);
  kept.param = param;  // alive where `ours` is: it is a key of the state then
  return true;
}

bool Batch::add(py::handle param, py::handle grad, py::list slots, py::handle step, int group, py::object spec) {
  if (slots.size() != slots_.size()) throw std::invalid_argument("one tensor per slot");
  Kept kept;
  return take(kept, param.ptr(), grad.ptr(), group, spec, [&](State& state) {
    state = {nullptr, step.ptr(), {}};
    for (size_t k = 0; k < slots.size(); ++k) state.slots[k] = PyList_GET_ITEM(slots.ptr(), k);
    return true;
  });
}

py::list Batch::read(py::list params, py::dict state, int group) {
  py::list left;
  kept_.resize(std::max(kept_.size(), position_ + PyList_GET_SIZE(params.ptr())));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    Kept& kept = kept_[position_++];
    const auto grad = py::reinterpret_steal<py::object>(grad_of(param));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    if (take(kept, param, grad.ptr(), group, {}, [&](State& out) { return find(state.ptr(), param, out); })) continue;
    kept.ours = false;
    left.append(i);
  }
  return left;
}

py::list Batch::coefficient_keys() const {
  py::list keys;
  for (const auto& [group, step] : keys_) keys.append(py::make_tuple(group, step));
  return keys;
}

py::list Batch::buckets() const {
  py::list out;
  for (const Launch& l : launches_)
    if (!l.rows.empty())
      out.append(py::make_tuple(l.device_type, l.device_id, int(l.param), int(l.grad), reinterpret_cast<int64_t>(l.rows.data()), l.rows.size(),
                                l.spec < 0 ? py::none() : specs_[l.spec]));
  return out;
}

void Batch::count_step() {
  for (const Count& c : counts_) *c.step = c.next;
}

void Batch::release() { grads_.clear(); }
