#include "batch.h"
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <pybind11/stl.h>
#include "dtype.h"

namespace {

constexpr int kMaxDims = 16;
constexpr size_t kAhead = 4;  // parameters

std::optional<DType> dtype_of(const dlpack::Tensor& t) {
  if (t.type_lanes != 1) return std::nullopt;
  switch (t.type_code << 8 | t.type_bits) {
    case dlpack::kFloat << 8 | 32: return DType::f32;
    case dlpack::kFloat << 8 | 64: return DType::f64;
    case dlpack::kFloat << 8 | 16: return DType::f16;
    case dlpack::kBfloat << 8 | 16: return DType::bf16;
    case dlpack::kUInt << 8 | 8: return DType::u8;
    case dlpack::kInt << 8 | 8: return DType::i8;
    case dlpack::kInt << 8 | 16: return DType::i16;
    case dlpack::kInt << 8 | 64: return DType::i64;
  }
  return std::nullopt;
}

bool is_float(std::optional<DType> dtype) { return dtype && *dtype <= DType::bf16; }

int64_t numel_of(const dlpack::Tensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

int64_t address_of(const dlpack::Tensor& t) { return reinterpret_cast<int64_t>(t.data) + int64_t(t.byte_offset); }

bool contiguous(const dlpack::Tensor& t) {
  if (numel_of(t) == 0) return true;
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

// On one device, of one shape, and laid out alike: strides count where a dimension has a second element.
bool same_place(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.device_type != b.device_type || a.device_id != b.device_id || a.ndim != b.ndim) return false;
  const bool empty = numel_of(a) == 0;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d] || (!empty && a.shape[d] != 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

// Whether `t` is still as the state that is kept for it was found to be.
template <class Place>
bool is_at(const Place& kept, const dlpack::Tensor& t, DType dtype) {
  return kept.ndim == t.ndim && kept.device_type == t.device_type && kept.device_id == t.device_id && kept.dtype == dtype &&
         std::equal(t.shape, t.shape + t.ndim, kept.shape) && std::equal(t.strides, t.strides + t.ndim, kept.strides);
}

bool is_gpu(const dlpack::Tensor& t) { return t.device_type == dlpack::kCUDA || t.device_type == dlpack::kROCM; }

// Whether there is one reference to a tensor, and no weak one.
bool held_once(PyObject* tensor) {
  const Py_ssize_t offset = Py_TYPE(tensor)->tp_weaklistoffset;
  return Py_REFCNT(tensor) == 1 && !(offset && *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset));
}

// Looks `tensor` up by its identity, which is what torch hashes it by, without the call into Python that hashing is.
PyObject* entry_of(PyObject* state, PyObject* tensor) {
  PyObject* entry = _PyDict_GetItem_KnownHash(state, tensor, Py_hash_t(reinterpret_cast<intptr_t>(tensor)));
  if (!entry && PyErr_Occurred()) throw py::error_already_set();
  return entry;
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

}  // namespace

Batch::Batch(py::tuple slots, py::list layouts, py::object place_of, py::object alone, py::tuple tensor_types, py::capsule api,
             const std::vector<std::string>& device_types, PlainTensors plain)
    : slots_(slots),
      place_of_(place_of),
      alone_(alone),
      parameter_type_(reinterpret_cast<PyTypeObject*>(py::object(tensor_types[0]).ptr())),
      tensor_type_(reinterpret_cast<PyTypeObject*>(py::object(tensor_types[1]).ptr())),
      dtensor_type_(reinterpret_cast<PyTypeObject*>(py::object(tensor_types[2]).ptr())),
      api_(nullptr),
      plain_(std::move(plain)) {
  const auto* found = static_cast<const dlpack::Api*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  while (found && found->major > 1) found = found->older;
  if (!found || !found->tensor_from_object) throw std::invalid_argument("this torch's DLPack exchange API cannot describe a tensor");
  if (slots.size() > kMaxSlots) throw std::invalid_argument("a table's row has four slots");
  api_ = found;
  if (layouts.size() != std::size(layouts_)) throw std::invalid_argument("a layout for each dtype of parameters");
  for (size_t d = 0; d < layouts.size(); ++d) {
    if (layouts[d].is_none()) continue;
    const auto [dtypes, correction, random] = layouts[d].cast<std::tuple<std::vector<int>, int, bool>>();
    if (dtypes.size() != slots.size()) throw std::invalid_argument("a dtype for each slot");
    layouts_[d].known = true, layouts_[d].random = random, layouts_[d].corrected = correction >= 0, layouts_[d].correction = DType(correction);
    for (size_t k = 0; k < dtypes.size(); ++k) layouts_[d].slot[k] = DType(dtypes[k]);
  }
  for (const std::string& type : device_types) (type == "cpu" ? cpu_ : cuda_) = true;
}

void Batch::clear() {
  reset();
  forget();
}

void Batch::forget() {
  ++date_;
  for (Kept& kept : kept_) kept.own = {};
}

void Batch::reset() {
  for (Launch& launch : launches_) launch.rows.clear();
  position_ = looked_at_ = 0;
  specs_.clear(), grads_.clear();
}

// False for what is not plain, or has elements and no memory: Python's path takes it, or says what is wrong with it.
bool Batch::describe(PyObject* object, dlpack::Tensor& out) const {
  const PyTypeObject* type = Py_TYPE(object);
  if ((type != tensor_type_ && type != parameter_type_) || !plain_.contains(object)) return false;
  if (api_->tensor_from_object(object, &out) == 0) return out.data || numel_of(out) == 0;
  PyErr_Clear();
  return false;
}

void Batch::fetch(PyObject* tensor) const {
  if (Py_TYPE(tensor) == parameter_type_) plain_.fetch(tensor);
}

// param.grad. Of torch's own types by torch's own getter, without looking it up each time; others may have one of their own.
py::object Batch::grad_of(PyObject* param) const {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  const bool torchs = Py_TYPE(param) == parameter_type_ || Py_TYPE(param) == tensor_type_;
  const auto grad = py::reinterpret_steal<py::object>(grad_ && torchs ? grad_->get(param, grad_->closure) : PyObject_GetAttr(param, name));
  if (!grad) throw py::error_already_set();
  return grad;
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

Batch::Launch& Batch::launch_for(const dlpack::Tensor& p, DType param, DType grad, int spec) {
  for (Launch& l : launches_)
    if (l.device_type == p.device_type && l.device_id == p.device_id && l.param == param && l.grad == grad && l.spec == spec) return l;
  return launches_.emplace_back(Launch{p.device_type, p.device_id, param, grad, spec, {}});
}

void Batch::begin(py::list slabs, bool held, bool apart) {
  reset();
  apart_ = apart;
  // Both types share the getter unless somebody has given Parameter one of its own.
  const py::handle parameter(reinterpret_cast<PyObject*>(const_cast<PyTypeObject*>(parameter_type_)));
  const py::handle tensor(reinterpret_cast<PyObject*>(const_cast<PyTypeObject*>(tensor_type_)));
  const py::object found = parameter.attr("grad");
  const bool shared = found.is(tensor.attr("grad")) && Py_TYPE(found.ptr()) == &PyGetSetDescr_Type;
  grad_ = shared ? reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset : nullptr;

  bool look = held || held_ || slabs.size() != slabs_.size();
  slabs_.resize(slabs.size());
  for (size_t k = 0; k < slabs_.size(); ++k) {
    dlpack::Tensor t;
    PyObject* slab = PyList_GET_ITEM(slabs.ptr(), k);
    const bool there = describe(slab, t);  // its storage may have been freed through a tensor that lay in it
    const int64_t begin = there ? address_of(t) : 0, end = there ? begin + numel_of(t) * t.type_bits / 8 : 0;
    look |= slabs_[k].tensor.ptr() != slab || begin != slabs_[k].begin || end != slabs_[k].end;
    slabs_[k] = {py::reinterpret_borrow<py::object>(slab), begin, end};
  }
  held_ = held;
  if (!look) return;
  forget();
  sorted_slabs_.clear();
  for (const Slab& slab : slabs_) sorted_slabs_.push_back({slab.begin, slab.end});
  std::sort(sorted_slabs_.begin(), sorted_slabs_.end());
}

bool Batch::in_slab(int64_t address) const {
  const auto after = std::upper_bound(sorted_slabs_.begin(), sorted_slabs_.end(), address, [](int64_t a, const auto& slab) { return a < slab.first; });
  return after != sorted_slabs_.begin() && address < std::prev(after)->second;
}

bool Batch::find(PyObject* entry, const Layout& layout, State& out) const {
  static PyObject *const step = PyUnicode_InternFromString("step"), *const seed = PyUnicode_InternFromString("seed"),
                         *const correction = PyUnicode_InternFromString("correction");
  auto get = [&](PyObject* name, PyObject*& found) { return (found = PyDict_GetItemWithError(entry, name)) != nullptr; };
  out.entry = entry, out.seed = out.correction = nullptr;
  if (!entry || !PyDict_Check(entry) || !get(step, out.step)) return false;
  for (size_t k = 0; k < slots_.size(); ++k)
    if (!get(PyTuple_GET_ITEM(slots_.ptr(), k), out.slots[k])) return false;
  return (!layout.random || get(seed, out.seed)) && (!layout.corrected || get(correction, out.correction));
}

// The address of a 0-dim tensor on the device of `beside`; 0 if it is none.
int64_t Batch::number_at(PyObject* tensor, DType dtype, const dlpack::Tensor& beside) const {
  dlpack::Tensor t;
  const bool good = describe(tensor, t) && dtype_of(t) == dtype && t.ndim == 0 && t.device_type == beside.device_type && t.device_id == beside.device_id;
  return good ? address_of(t) : 0;
}

// Where the elements of a parameter of this spec, or of none, lie in the whole tensor.
void Batch::find_place(Kept& kept, const py::object& spec, int64_t numel) const {
  const bool whole = !spec || spec.is_none();
  if (whole) kept.spec = {}, kept.first = kept.stride = 0, kept.run = std::max<int64_t>(numel, 1);
  else if (!kept.spec.is(spec)) {
    std::tie(kept.first, kept.run, kept.stride) = place_of_(spec).cast<std::tuple<int64_t, int64_t, int64_t>>();
    kept.spec = spec;
  }
}

// Notes where the state lies, and dates that if it is ours; false if it is not as a kernel takes it. What lies in no slab may be
// ours at the second look of a date: where others read the state at each step, there is none.
bool Batch::look_at(Kept& kept, PyObject* param, const dlpack::Tensor& p, DType dtype, const State& state) const {
  const Layout& layout = layouts_[int(dtype)];
  const int64_t date = date_;
  const bool again = kept.looked == date && kept.param == param;
  bool ours = Py_TYPE(param) != dtensor_type_ && Py_REFCNT(state.entry) == 1 && held_once(state.step) && p.ndim <= kKeptDims;
  std::vector<py::object> own;
  kept.date = kept.seed = kept.correction = 0;
  kept.looked = date;
  kept.own = {};
  auto look = [&](PyObject* like_param, DType stored, int64_t& address) {
    dlpack::Tensor s;
    ours = ours && held_once(like_param);  // before `part` is one more
    const py::object part = part_of(like_param, param);
    if (!part || !describe(part.ptr(), s) || dtype_of(s) != stored || !same_place(p, s)) return false;
    address = address_of(s);
    if (!ours || in_slab(address)) return true;
    ours = again;
    if (ours) own.push_back(part);
    return true;
  };
  for (size_t k = 0; k < slots_.size(); ++k)
    if (!look(state.slots[k], layout.slot[k], kept.slot[k])) return false;
  if (layout.corrected && !look(state.correction, layout.correction, kept.correction)) return false;
  kept.step = number_at(state.step, DType::f32, p);
  if (layout.random) {
    kept.seed = number_at(state.seed, DType::i64, p);
    ours = ours && held_once(state.seed) && in_slab(kept.seed);
  }
  if (!kept.step || (layout.random && !kept.seed)) return false;
  if (!ours || !in_slab(kept.step)) return true;
  kept.place.ndim = p.ndim, kept.place.device_type = p.device_type, kept.place.device_id = p.device_id, kept.place.dtype = dtype;
  std::copy_n(p.shape, p.ndim, kept.place.shape), std::copy_n(p.strides, p.ndim, kept.place.strides);
  py::object owned;
  if (!own.empty()) {
    owned = py::cast(own);
    own.clear();
    if (!alone_(owned).cast<bool>()) return true;
  }
  kept.date = date;  // somebody may have asked for the state since
  kept.own = std::move(owned);
  return true;
}

template <class FindEntry>
bool Batch::take(Kept& kept, PyObject* param, PyObject* grad, int group, py::object spec, FindEntry find_entry) {
  // A description is valid until the next object's on this thread: keep only numbers of it. Shape and strides belong
  // to the tensor and stay.
  dlpack::Tensor p, g;
  const py::object part = part_of(param, param), grad_part = part_of(grad, param);
  if (!part || !grad_part || !describe(part.ptr(), p) || !describe(grad_part.ptr(), g)) return false;
  if (!(p.device_type == dlpack::kCPU ? cpu_ : is_gpu(p) && cuda_)) return false;
  const auto param_dtype = dtype_of(p), grad_dtype = dtype_of(g);
  if (!is_float(param_dtype) || !is_float(grad_dtype) || !same_place(p, g)) return false;
  const Layout& layout = layouts_[int(*param_dtype)];
  if (!layout.known) return false;
  const bool known = kept.date == date_ && kept.param == param && is_at(kept.place, p, *param_dtype);
  State state;
  if (!known && (!dense(p) || !find(find_entry(), layout, state) || !look_at(kept, param, p, *param_dtype, state))) return false;
  looked_at_ += !known;
  if (Py_TYPE(param) == dtensor_type_ && (apart_ || layout.random)) spec = spec_of(param);
  if (layout.random) find_place(kept, spec, numel_of(p));
  Row row{address_of(p), address_of(g), {}, numel_of(p), group, kept.step, kept.correction, kept.seed, kept.first, kept.run, kept.stride};
  if (!layout.random) row.run = std::max<int64_t>(row.numel, 1);
  std::copy_n(kept.slot, kMaxSlots, row.slot);
  launch_for(p, *param_dtype, *grad_dtype, index_of(spec)).rows.push_back(row);
  grads_.push_back(py::reinterpret_borrow<py::object>(grad));
  kept.param = param;
  return true;
}

bool Batch::add(py::handle param, py::handle grad, py::dict state, int group, py::object spec) {
  Kept kept;
  return take(kept, param.ptr(), grad.ptr(), group, spec, [&] { return state.ptr(); });
}

py::list Batch::read(py::object params, py::dict state, int group) {
  const auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(params.ptr(), "a group's params must be a sequence"));
  if (!sequence) throw py::error_already_set();
  const size_t n = PySequence_Fast_GET_SIZE(sequence.ptr());
  PyObject* const* items = PySequence_Fast_ITEMS(sequence.ptr());
  if (kept_.size() < position_ + n) kept_.resize(position_ + n);
  py::list left;
  for (size_t i = 0; i < n; ++i) {
    PyObject* param = items[i];
    if (i + 2 * kAhead < n) __builtin_prefetch(items[i + 2 * kAhead]);
    if (i + kAhead < n) fetch(items[i + kAhead]);
    Kept& kept = kept_[position_++];
    const py::object grad = grad_of(param);
    if (grad.is_none() || take(kept, param, grad.ptr(), group, {}, [&] { return entry_of(state.ptr(), param); })) continue;
    kept.date = 0;
    left.append(i);
  }
  return left;
}

py::list Batch::buckets() const {
  py::list out;
  for (const Launch& l : launches_)
    if (!l.rows.empty())
      out.append(py::make_tuple(l.device_type, l.device_id, int(l.param), int(l.grad), reinterpret_cast<int64_t>(l.rows.data()), l.rows.size(),
                                l.spec < 0 ? py::none() : specs_[l.spec]));
  return out;
}

void Batch::release() { grads_.clear(); }
