// Whether a tensor's memory holds its values, by torch's own account of what the tensor is: its set of dispatch keys.
// A lazily negated or conjugated tensor, a zero tensor, a fake, functional or batched one, and one made in inference mode
// bear other keys than a plain one, whatever their memory looks like.
#pragma once
#include <pybind11/pybind11.h>
#include <cstdint>

class PlainTensors {
 public:
  // `samples`: (tensor, raw set of its keys), some plain and some not; `plain`: the set of a plain tensor without the bits of
  // `device_bits`, which only say where it lies; `is_plain`: the same question to Python.
  //
  // Asking Python takes longer than all the rest of reading a tensor. Where torch keeps the set is therefore looked for, once,
  // in the samples' memory: the place that holds the right set in every one of them. Where there is none, Python is asked.
  PlainTensors(pybind11::list samples, uint64_t plain, uint64_t device_bits, pybind11::object is_plain);

  // Of a tensor that is of torch's own Python types.
  bool contains(PyObject* tensor) const;

  // Asks the memory for a tensor's description, which is read soon: a thousand of them are thousands of cold places.
  void fetch(PyObject* tensor) const;

 private:
  size_t implementation_ = 0, keys_ = 0;  // bytes from the start of the Python object and of torch's object; 0: not found
  uint64_t plain_, device_bits_;
  pybind11::object is_plain_;
};
