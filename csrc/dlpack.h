// The part of the public DLPack C ABI (version 1) that reading a tensor from its Python object takes.
// torch.Tensor.__dlpack_c_exchange_api__ holds such an api; nothing of torch is compiled or linked against.
#pragma once
#include <cstdint>

namespace dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kROCM = 10 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Api {
  uint32_t major, minor;
  Api* older;
  void* managed_tensor_allocator;
  void* managed_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows: valid while the object is
  void* current_work_stream;
};

}  // namespace dlpack
