// A CUDA runtime and driver without a GPU. Device memory is host memory behind addresses that fault when the host touches
// them, copies and memsets are done, kernels are not run unless host code was given for them (fakecuda_implement), and every
// call can be recorded. What is not here is a stub (stubs.py).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>
#include "fakecuda.h"

namespace {

// --- The machine ------------------------------------------------------------------------------------------------------

constexpr int kMaxDevices = 8, kSms = 132;
constexpr size_t kTotal = 85017755648, kArena = size_t(1) << 38, kSharedDefault = 48 << 10, kSharedOptin = 227 << 10;
constexpr const char* kName = "NVIDIA H100 80GB HBM3 (fakecuda)";

int number(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value && *value ? atoi(value) : otherwise;
}
int n_devices() { static const int n = std::min(number("FAKECUDA_DEVICES", 1), kMaxDevices); return n; }
int capability() { static const int n = number("FAKECUDA_CAPABILITY", 90); return n; }
bool lazy() { static const bool on = number("FAKECUDA_LAZY", 0); return on; }

std::recursive_mutex& mutex() { static auto* m = new std::recursive_mutex; return *m; }  // outlives every destructor
using Lock = std::lock_guard<std::recursive_mutex>;

// --- The record -------------------------------------------------------------------------------------------------------

bool recording = false;
std::vector<FakeCall>& calls() { static auto* v = new std::vector<FakeCall>; return *v; }

thread_local int device = 0;
thread_local bool bound = false;  // whether this thread has a context
thread_local cudaError_t last_error = cudaSuccess;
bool context_made[kMaxDevices];

void note(const char* call, uint32_t flags = 0, int stream = 0, int kind = -1, uint64_t bytes = 0, int result = 0,
          const char* kernel = nullptr, unsigned grid = 0, unsigned block = 0, unsigned shared = 0) {
  if (!recording) return;
  Lock lock(mutex());
  calls().push_back({call, kernel, bytes, device, stream, kind, result, flags, grid, block, shared});
}
cudaError_t fail(cudaError_t error) { return last_error = error; }
#define NOTE(...) note(__func__, ##__VA_ARGS__)
void use() { bound = true; context_made[device] = true; }

// --- Memory -----------------------------------------------------------------------------------------------------------

struct Arena {
  char* base = nullptr;   // the addresses handed out: no access for the host
  ptrdiff_t shift = 0;    // to where their contents lie
  size_t used = 0;
  std::map<char*, size_t> taken, free_;
  void make() {
    if (base) return;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    base = static_cast<char*>(mmap(nullptr, kArena, PROT_NONE, flags, -1, 0));
    shift = static_cast<char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE, flags, -1, 0)) - base;
    free_[base] = kArena;
  }
};
Arena& arena(int d) { static auto* all = new Arena[kMaxDevices]; all[d].make(); return all[d]; }
struct Pinned { size_t size; bool registered; };
std::map<char*, Pinned>& pinned() { static auto* m = new std::map<char*, Pinned>; return *m; }
bool arena_made[kMaxDevices];
char* arena_base[kMaxDevices];

int device_of(const void* p) {
  for (int d = 0; d < n_devices(); ++d)
    if (arena_made[d] && p >= arena_base[d] && p < arena_base[d] + kArena) return d;
  return -1;
}
template <class T> T* host(T* p) {
  const int d = device_of(p);
  return d < 0 ? p : (T*)((char*)p + arena(d).shift);
}
const std::pair<char* const, Pinned>* pinned_at(const void* p) {
  auto it = pinned().upper_bound((char*)p);
  if (it == pinned().begin()) return nullptr;
  --it;
  return (char*)p < it->first + it->second.size ? &*it : nullptr;
}

void* take(int d, size_t size) {
  Lock lock(mutex());
  Arena& a = arena(d);
  arena_base[d] = a.base, arena_made[d] = true;
  size = std::max<size_t>((size + 511) & ~size_t(511), 512);
  if (a.used + size > kTotal) return nullptr;
  for (auto it = a.free_.begin(); it != a.free_.end(); ++it)
    if (it->second >= size) {
      char* p = it->first;
      const size_t left = it->second - size;
      a.free_.erase(it);
      if (left) a.free_[p + size] = left;
      a.taken[p] = size, a.used += size;
      return p;
    }
  return nullptr;
}
bool give(void* p) {
  Lock lock(mutex());
  const int d = device_of(p);
  if (d < 0) return false;
  Arena& a = arena(d);
  auto it = a.taken.find((char*)p);
  if (it == a.taken.end()) return false;
  size_t size = it->second;
  char* at = it->first;
  a.taken.erase(it), a.used -= size;
  char *first = host(at) + ((-(intptr_t)host(at)) & 4095), *last = (char*)((intptr_t)(host(at) + size) & ~intptr_t(4095));
  if (last > first) madvise(first, last - first, MADV_DONTNEED);
  auto next = a.free_.lower_bound(at);
  if (next != a.free_.end() && at + size == next->first) size += next->second, next = a.free_.erase(next);
  if (next != a.free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == at) return before->second += size, true;
  }
  a.free_[at] = size;
  return true;
}

// --- Streams, events, graphs ------------------------------------------------------------------------------------------
// Work is done when it is asked for, unless the stream is busy: behind torch.cuda._sleep (or any kernel, FAKECUDA_LAZY=1)
// it waits for somebody to synchronise, so that what a host does too early shows.

using Work = std::function<void()>;
struct Graph { std::vector<Work> nodes; };
struct Capture { unsigned long long id; cudaStreamCaptureMode mode; Graph* graph; bool broken = false; };
struct Stream {
  int id, device, priority = 0;
  unsigned flags = 0;
  bool busy = false;
  uint64_t asked = 0, done = 0;
  std::deque<Work> waiting;
  std::shared_ptr<Capture> capture;
};
struct Event {
  Stream* stream = nullptr;
  uint64_t ticket = 0;
  std::shared_ptr<Capture> capture;
  double time = 0;
};
std::set<Stream*>& streams() { static auto* s = new std::set<Stream*>; return *s; }
Stream* default_stream(int d) {
  static auto* all = new std::map<int, Stream*>;
  Stream*& s = (*all)[d];
  if (!s) streams().insert(s = new Stream{0, d});
  return s;
}
Stream* stream_of(const void* handle) {
  Lock lock(mutex());
  use();
  if ((uintptr_t)handle <= 2) return default_stream(device);
  return streams().count((Stream*)handle) ? (Stream*)handle : nullptr;
}
void drain(Stream* s) {
  while (!s->waiting.empty()) {
    Work work = std::move(s->waiting.front());
    s->waiting.pop_front();
    work();
  }
  s->busy = false, s->done = s->asked;
}
void drain_device(int d) {
  for (Stream* s : std::set<Stream*>(streams())) if (s->device == d) drain(s);
}
void enqueue(Stream* s, Work work) {
  if (s->capture) return s->capture->graph->nodes.push_back(std::move(work));
  ++s->asked;
  if (s->busy) return s->waiting.push_back(std::move(work));
  work();
  s->done = s->asked;
}
bool ready(const Event* e) { return !e->stream || !streams().count(e->stream) || e->ticket <= e->stream->done; }
double now() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int captures_global = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local int captures_of_thread = 0;
std::set<Capture*>& captures() { static auto* s = new std::set<Capture*>; return *s; }
// Whether a capture forbids this call, as CUDA does for what may wait or allocate; the captures are then lost.
bool forbidden() {
  if (!captures_global && !captures_of_thread) return false;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  if (thread_mode == cudaStreamCaptureModeThreadLocal && !captures_of_thread) return false;
  Lock lock(mutex());
  for (Capture* c : captures()) c->broken = true;
  return true;
}
#define REFUSE_IN_CAPTURE(...) \
  if (forbidden()) { NOTE(__VA_ARGS__, 0, -1, 0, cudaErrorStreamCaptureUnsupported); return fail(cudaErrorStreamCaptureUnsupported); }
uint32_t captured(const Stream* s) { return s->capture ? uint32_t(kCaptured) : 0; }

// --- Kernels ----------------------------------------------------------------------------------------------------------

struct Body { std::string part; void (*run)(void**, const unsigned*, const unsigned*); std::vector<size_t> sizes; };
std::deque<Body>& bodies() { static auto* all = new std::deque<Body>; return *all; }
struct Kernel {
  std::string name;
  size_t shared = kSharedDefault;
  int home = -1;  // the device it was loaded on, by the driver's interface
  bool spins = false;
  const Body* body = nullptr;
  // Not those with a part of FAKECUDA_UNLOADABLE in their mangled names: as on a device that the program was not built for.
  bool loadable() const {
    const char* parts = getenv("FAKECUDA_UNLOADABLE");
    std::stringstream each(parts ? parts : "");
    for (std::string part; std::getline(each, part, ',');)
      if (!part.empty() && name.find(part) != std::string::npos) return false;
    return true;
  }
};
std::unordered_map<const void*, Kernel*>& kernels() { static auto* m = new std::unordered_map<const void*, Kernel*>; return *m; }
Kernel* new_kernel(const char* name, int home = -1) {
  auto* k = new Kernel{name, kSharedDefault, home, strstr(name, "spin_kernel") != nullptr};
  for (const Body& b : bodies()) if (k->name.find(b.part) != std::string::npos) k->body = &b;
  kernels()[k] = k;
  return k;
}
Kernel* kernel_of(const void* f) {
  auto it = kernels().find(f);
  return it == kernels().end() ? nullptr : it->second;
}

cudaError_t launch(const char* call, const void* f, const unsigned* grid, const unsigned* block, size_t shared, const void* stream, void** args) {
  Lock lock(mutex());
  Stream* s = stream_of(stream);
  Kernel* k = kernel_of(f);
  const uint64_t threads = uint64_t(block[0]) * block[1] * block[2], blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  cudaError_t error = cudaSuccess;
  if (!k) error = cudaErrorInvalidDeviceFunction;
  else if (!k->loadable()) error = cudaErrorNoKernelImageForDevice;
  else if (!s || s->device != device || (k->home >= 0 && k->home != device)) error = cudaErrorInvalidResourceHandle;
  else if (!blocks || !threads || threads > 1024 || block[2] > 64 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) error = cudaErrorInvalidConfiguration;
  else if (shared > k->shared) error = cudaErrorInvalidValue;
  note(call, s ? captured(s) : 0, s ? s->id : -1, -1, 0, error, k ? k->name.c_str() : "?", unsigned(blocks), unsigned(threads), unsigned(shared));
  if (error) return error;
  Work work = [] {};
  if (const Body* body = k->body) {
    std::vector<std::vector<char>> kept;
    for (size_t i = 0; i < body->sizes.size(); ++i) kept.emplace_back((char*)args[i], (char*)args[i] + body->sizes[i]);
    const std::vector<unsigned> shape{grid[0], grid[1], grid[2], block[0], block[1], block[2]};
    work = [run = body->run, kept, shape]() mutable {
      std::vector<void*> pointers;
      for (auto& k : kept) pointers.push_back(k.data());
      run(pointers.data(), shape.data(), shape.data() + 3);
    };
  }
  if ((k->spins || lazy()) && !s->capture) s->busy = true;
  enqueue(s, std::move(work));
  return cudaSuccess;
}

// --- Copies -----------------------------------------------------------------------------------------------------------

bool within(const void* p, size_t n) {  // of device memory that is taken, or of the host's
  const int d = device_of(p);
  if (d < 0) return p != nullptr || n == 0;
  auto& taken = arena(d).taken;
  auto it = taken.upper_bound((char*)p);
  return it != taken.begin() && (--it, (char*)p + n <= it->first + it->second);
}
cudaError_t copy(const char* call, void* to, const void* from, size_t n, int kind, const void* stream, bool waits) {
  Lock lock(mutex());
  Stream* s = stream_of(stream);
  const bool to_device = device_of(to) >= 0, from_device = device_of(from) >= 0;
  const int real = from_device ? (to_device ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost) : (to_device ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost);
  uint32_t flags = 0;
  if (real == cudaMemcpyDeviceToHost && !pinned_at(to) || real == cudaMemcpyHostToDevice && !pinned_at(from)) flags |= kPageable;
  if (waits || ((flags & kPageable) && real == cudaMemcpyDeviceToHost) || real == cudaMemcpyHostToHost) flags |= kWaits;
  cudaError_t error = cudaSuccess;
  if (!s) error = cudaErrorInvalidResourceHandle;
  else if ((kind != cudaMemcpyDefault && kind != real) || !within(to, n) || !within(from, n)) error = cudaErrorInvalidValue;
  else if (s->capture && flags) error = cudaErrorStreamCaptureUnsupported, s->capture->broken = true;
  else if (waits && forbidden()) error = cudaErrorStreamCaptureUnsupported;
  note(call, flags | (s ? captured(s) : 0), s ? s->id : -1, real, n, error);
  if (error) return fail(error);
  if (flags & kWaits) drain(s);
  if ((flags & kPageable) && s->busy) {  // staged
    std::vector<char> staged((const char*)from, (const char*)from + n);
    enqueue(s, [to = host(to), staged = std::move(staged)] { memcpy(to, staged.data(), staged.size()); });
  } else {
    enqueue(s, [to = host(to), from = host(from), n] { memmove(to, from, n); });
  }
  return cudaSuccess;
}
cudaError_t copy_2d(const char* call, void* to, size_t tp, const void* from, size_t fp, size_t w, size_t h, int kind, const void* stream, bool waits) {
  for (size_t i = 0; i < h; ++i)
    if (cudaError_t e = copy(call, (char*)to + i * tp, (const char*)from + i * fp, w, kind, stream, waits)) return e;
  return cudaSuccess;
}
template <class T> cudaError_t fill(const char* call, void* to, T value, size_t n, const void* stream, bool waits) {
  Lock lock(mutex());
  Stream* s = stream_of(stream);
  const cudaError_t error = !s ? cudaErrorInvalidResourceHandle : !within(to, n * sizeof(T)) ? cudaErrorInvalidValue : waits && forbidden() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
  note(call, s ? captured(s) : 0, s ? s->id : -1, -1, n * sizeof(T), error);
  if (error) return fail(error);
  enqueue(s, [to = (T*)host(to), value, n] { std::fill(to, to + n, value); });
  return cudaSuccess;
}

cudaError_t allocate(const char* call, void** p, size_t n) {
  use();
  *p = n ? take(device, n) : nullptr;
  const cudaError_t error = *p || !n ? cudaSuccess : cudaErrorMemoryAllocation;
  note(call, kAllocates, 0, -1, n, error);
  return error ? fail(error) : error;
}
cudaError_t release(const char* call, void* p, bool waits) {
  Lock lock(mutex());
  note(call, kAllocates | (waits ? uint32_t(kWaits) : 0));
  if (!p) return use(), cudaSuccess;
  const int d = device_of(p);
  if (d >= 0 && waits) drain_device(d);
  return give(p) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t allocate_host(const char* call, void** p, size_t n) {
  use();
  Lock lock(mutex());
  *p = aligned_alloc(4096, std::max<size_t>((n + 4095) & ~size_t(4095), 4096));
  pinned()[(char*)*p] = {std::max<size_t>(n, 1), false};
  note(call, kAllocates, 0, -1, n);
  return cudaSuccess;
}
cudaError_t release_host(const char* call, void* p) {
  Lock lock(mutex());
  note(call, kAllocates | kWaits);
  if (!p) return cudaSuccess;
  for (int d = 0; d < n_devices(); ++d) drain_device(d);
  if (!pinned().erase((char*)p)) return fail(cudaErrorInvalidValue);
  free(p);
  return cudaSuccess;
}

int attribute(int a) {
  switch (a) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return kSharedDefault;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: case CU_DEVICE_ATTRIBUTE_SURFACE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return kSms;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return capability() / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return capability() % 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 228 << 10;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return kSharedOptin;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP: case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: case CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED: case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED: case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED: return 1;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: return 1;
    default: return 0;
  }
}
int blocks_an_sm(int threads) { return threads > 0 ? std::min(32, 2048 / threads) : 0; }
template <class E> E as(cudaError_t e) { return E(int(e)); }  // CUresult and cudaError_t agree in what is used here
CUresult drv(cudaError_t e) {
  last_error = e ? last_error : e;
  return e == cudaErrorInvalidConfiguration ? CUDA_ERROR_INVALID_VALUE : as<CUresult>(e);
}

struct Context { int device; };
Context contexts[kMaxDevices] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};

struct PushedCall { dim3 grid, block; size_t shared; void* stream; };
thread_local std::vector<PushedCall> pushed;

struct AtStart {
  AtStart() { const char* path = getenv("FAKECUDA_LOG"); recording = path && *path; }
  ~AtStart() {  // one line a call
    const char* path = getenv("FAKECUDA_LOG");
    if (!path || !*path || calls().empty()) return;
    FILE* f = fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "w");
    if (!f) return;
    fprintf(f, "call\tkernel\tbytes\tdevice\tstream\tkind\tresult\tflags\tgrid\tblock\n");
    for (const FakeCall& c : calls())
      fprintf(f, "%s\t%s\t%lu\t%d\t%d\t%d\t%d\t%u\t%u\t%u\n", c.call, c.kernel ? c.kernel : "", c.bytes, c.device, c.stream, c.kind, c.result, c.flags, c.grid, c.block);
    fclose(f);
  }
} at_start;

}  // namespace

#pragma GCC diagnostic ignored "-Wunused-parameter"
#define RT extern "C" cudaError_t
#define DR extern "C" CUresult

// --- fakecuda's own ---------------------------------------------------------------------------------------------------

extern "C" {
void fakecuda_record(int on) { recording = on; }
void fakecuda_clear() { calls().clear(); }
size_t fakecuda_count() { return calls().size(); }
const FakeCall* fakecuda_calls() { return calls().data(); }
void fakecuda_implement(const char* part, void (*run)(void**, const unsigned*, const unsigned*), const size_t* sizes, size_t n) {
  Lock lock(mutex());
  bodies().push_back({part, run, {sizes, sizes + n}});
  for (auto& [_, k] : kernels()) if (k->name.find(part) != std::string::npos) k->body = &bodies().back();
}
void* fakecuda_host(void* p) { return host(p); }
void fakecuda_stub(const char* name) {  // of the generated stubs
  note(name, kStub);
  static auto* seen = new std::set<std::string>;
  Lock lock(mutex());
  if (seen->insert(name).second) fprintf(stderr, "fakecuda: %s is a stub: it did nothing and returned success\n", name);
}
}

// --- Runtime: devices -------------------------------------------------------------------------------------------------

RT cudaGetDeviceCount(int* n) { NOTE(); *n = n_devices(); return *n ? cudaSuccess : fail(cudaErrorNoDevice); }
RT cudaGetDevice(int* d) { NOTE(); *d = device; return cudaSuccess; }
RT cudaSetDevice(int d) {
  NOTE();
  if (d < 0 || d >= n_devices()) return fail(cudaErrorInvalidDevice);
  device = d, use();
  return cudaSuccess;
}
RT cudaDriverGetVersion(int* v) { NOTE(); *v = CUDART_VERSION; return cudaSuccess; }
RT cudaRuntimeGetVersion(int* v) { NOTE(); *v = CUDART_VERSION; return cudaSuccess; }
RT cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int d) { NOTE(); *v = attribute(a); return cudaSuccess; }
RT cudaDeviceGetPCIBusId(char* out, int n, int d) { NOTE(); snprintf(out, n, "0000:%02x:00.0", d + 1); return cudaSuccess; }
RT cudaDeviceGetByPCIBusId(int* d, const char* id) { NOTE(); *d = atoi(id + 5) - 1; return cudaSuccess; }
RT cudaDeviceCanAccessPeer(int* can, int a, int b) { NOTE(); *can = a != b; return cudaSuccess; }
RT cudaDeviceEnablePeerAccess(int, unsigned) { NOTE(); return cudaSuccess; }
RT cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { NOTE(); *least = 0, *greatest = -5; return cudaSuccess; }
RT cudaDeviceGetLimit(size_t* v, enum cudaLimit) { NOTE(); *v = 1024; return cudaSuccess; }
RT cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  NOTE();
  if (d < 0 || d >= n_devices()) return fail(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", kName);
  memset(&p->uuid, 0x11 * (d + 1), sizeof p->uuid);
  p->totalGlobalMem = kTotal, p->sharedMemPerBlock = kSharedDefault, p->regsPerBlock = 65536, p->warpSize = 32, p->memPitch = 0x7fffffff;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535, p->totalConstMem = 65536;
  p->major = capability() / 10, p->minor = capability() % 10, p->textureAlignment = 512, p->texturePitchAlignment = 32, p->multiProcessorCount = kSms;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->pciBusID = d + 1, p->asyncEngineCount = 3, p->memoryBusWidth = 5120, p->l2CacheSize = 50 << 20, p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 228 << 10, p->regsPerMultiprocessor = 65536, p->computePreemptionSupported = p->canUseHostPointerForRegisteredMem = 1;
  p->cooperativeLaunch = p->hostRegisterSupported = p->memoryPoolsSupported = p->clusterLaunch = p->ipcEventSupported = 1;
  p->sharedMemPerBlockOptin = kSharedOptin, p->maxBlocksPerMultiProcessor = 32, p->reservedSharedMemPerBlock = 1024;
  return cudaSuccess;
}
RT cudaMemGetInfo(size_t* free, size_t* total) {
  NOTE();
  use();
  Lock lock(mutex());
  *total = kTotal, *free = kTotal - arena(device).used;
  return cudaSuccess;
}
RT cudaDeviceSynchronize() {
  REFUSE_IN_CAPTURE(kWaits);
  NOTE(kWaits);
  use();
  Lock lock(mutex());
  drain_device(device);
  return cudaSuccess;
}
RT cudaDeviceReset() { NOTE(kWaits); return cudaSuccess; }

// --- Runtime: errors --------------------------------------------------------------------------------------------------

RT cudaGetLastError() { NOTE(); const cudaError_t e = last_error; last_error = cudaSuccess; return e; }
RT cudaPeekAtLastError() { NOTE(); return last_error; }
extern "C" const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported: not permitted when a stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    default: return "fakecuda error";
  }
}
extern "C" const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }

// --- Runtime: memory --------------------------------------------------------------------------------------------------

RT cudaMalloc(void** p, size_t n) { REFUSE_IN_CAPTURE(kAllocates); return allocate(__func__, p, n); }
RT cudaFree(void* p) { REFUSE_IN_CAPTURE(kAllocates | kWaits); return release(__func__, p, true); }
RT cudaMallocAsync(void** p, size_t n, cudaStream_t) { return allocate(__func__, p, n); }
RT cudaFreeAsync(void* p, cudaStream_t) { return release(__func__, p, false); }
RT cudaHostAlloc(void** p, size_t n, unsigned) { REFUSE_IN_CAPTURE(kAllocates); return allocate_host(__func__, p, n); }
RT cudaMallocHost(void** p, size_t n) { REFUSE_IN_CAPTURE(kAllocates); return allocate_host(__func__, p, n); }
RT cudaFreeHost(void* p) { REFUSE_IN_CAPTURE(kAllocates | kWaits); return release_host(__func__, p); }
RT cudaHostRegister(void* p, size_t n, unsigned) { NOTE(kAllocates, 0, -1, n); Lock lock(mutex()); pinned()[(char*)p] = {n, true}; return cudaSuccess; }
RT cudaHostUnregister(void* p) { NOTE(kAllocates); Lock lock(mutex()); return pinned().erase((char*)p) ? cudaSuccess : fail(cudaErrorInvalidValue); }
RT cudaHostGetDevicePointer(void** d, void* h, unsigned) { NOTE(); *d = h; return cudaSuccess; }
RT cudaHostGetFlags(unsigned* flags, void* p) { NOTE(); *flags = 0; Lock lock(mutex()); return pinned_at(p) ? cudaSuccess : fail(cudaErrorInvalidValue); }
RT cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  NOTE();
  memset(a, 0, sizeof *a);
  Lock lock(mutex());
  const int d = device_of(p);
  a->device = d >= 0 ? d : device;
  if (d >= 0) a->type = cudaMemoryTypeDevice, a->devicePointer = (void*)p;
  else if (pinned_at(p)) a->type = cudaMemoryTypeHost, a->devicePointer = a->hostPointer = (void*)p;
  else a->type = cudaMemoryTypeUnregistered, a->device = -2, a->hostPointer = (void*)p;
  return cudaSuccess;
}
RT cudaMemcpy(void* to, const void* from, size_t n, enum cudaMemcpyKind k) { return copy(__func__, to, from, n, k, nullptr, true); }
RT cudaMemcpyAsync(void* to, const void* from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { return copy(__func__, to, from, n, k, s, false); }
RT cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) { return copy(__func__, to, from, n, cudaMemcpyDefault, s, false); }
RT cudaMemcpy2DAsync(void* to, size_t tp, const void* from, size_t fp, size_t w, size_t h, enum cudaMemcpyKind k, cudaStream_t s) { return copy_2d(__func__, to, tp, from, fp, w, h, k, s, false); }
RT cudaMemcpy2D(void* to, size_t tp, const void* from, size_t fp, size_t w, size_t h, enum cudaMemcpyKind k) { return copy_2d(__func__, to, tp, from, fp, w, h, k, nullptr, true); }
RT cudaMemset(void* p, int v, size_t n) { return fill(__func__, p, (unsigned char)v, n, nullptr, true); }
RT cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) { return fill(__func__, p, (unsigned char)v, n, s, false); }
RT cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int d) { NOTE(); *pool = (cudaMemPool_t)&contexts[d]; return cudaSuccess; }
RT cudaDeviceGetMemPool(cudaMemPool_t* pool, int d) { NOTE(); *pool = (cudaMemPool_t)&contexts[d]; return cudaSuccess; }
RT cudaMemPoolGetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void* v) { NOTE(); *(uint64_t*)v = 0; return cudaSuccess; }
RT cudaMemPoolSetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void*) { NOTE(); return cudaSuccess; }
RT cudaMemPoolTrimTo(cudaMemPool_t, size_t) { NOTE(); return cudaSuccess; }
RT cudaDeviceGetGraphMemAttribute(int, enum cudaGraphMemAttributeType, void* v) { NOTE(); *(uint64_t*)v = 0; return cudaSuccess; }
RT cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { NOTE(); return fail(cudaErrorNotSupported); }
RT cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { NOTE(); return fail(cudaErrorNotSupported); }

// --- Runtime: streams and events --------------------------------------------------------------------------------------

static cudaError_t new_stream(cudaStream_t* out, unsigned flags, int priority) {
  use();
  Lock lock(mutex());
  static int last = 0;
  auto* s = new Stream{++last, device, priority, flags};
  streams().insert(s);
  *out = (cudaStream_t)s;
  return cudaSuccess;
}
#define STREAM(handle) Lock lock(mutex()); Stream* s = stream_of(handle); if (!s) { NOTE(); return fail(cudaErrorInvalidResourceHandle); }
RT cudaStreamCreate(cudaStream_t* s) { NOTE(); return new_stream(s, 0, 0); }
RT cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { NOTE(); return new_stream(s, f, 0); }
RT cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) { NOTE(); return new_stream(s, f, p); }
RT cudaStreamDestroy(cudaStream_t h) { STREAM(h); NOTE(0, s->id); drain(s); streams().erase(s); return cudaSuccess; }  // not freed: events refer to it
RT cudaStreamGetPriority(cudaStream_t h, int* p) { STREAM(h); NOTE(0, s->id); *p = s->priority; return cudaSuccess; }
RT cudaStreamGetFlags(cudaStream_t h, unsigned* f) { STREAM(h); NOTE(0, s->id); *f = s->flags; return cudaSuccess; }
RT cudaStreamGetDevice(cudaStream_t h, int* d) { STREAM(h); NOTE(0, s->id); *d = s->device; return cudaSuccess; }
RT cudaStreamGetId(cudaStream_t h, unsigned long long* id) { STREAM(h); NOTE(0, s->id); *id = s->id; return cudaSuccess; }
RT cudaStreamSynchronize(cudaStream_t h) {
  REFUSE_IN_CAPTURE(kWaits);
  STREAM(h);
  NOTE(kWaits, s->id);
  drain(s);
  return cudaSuccess;
}
RT cudaStreamQuery(cudaStream_t h) { REFUSE_IN_CAPTURE(0); STREAM(h); NOTE(0, s->id); return s->busy ? cudaErrorNotReady : cudaSuccess; }
RT cudaStreamWaitEvent(cudaStream_t h, cudaEvent_t event, unsigned) {
  STREAM(h);
  NOTE(0, s->id);
  auto* e = (Event*)event;
  if (e->capture) s->capture = e->capture;
  else if (!ready(e) && e->stream != s) {
    s->busy = true;
    enqueue(s, [e = *e] { if (!ready(&e)) drain(e.stream); });
  }
  return cudaSuccess;
}
RT cudaStreamAddCallback(cudaStream_t h, cudaStreamCallback_t f, void* data, unsigned) { STREAM(h); NOTE(0, s->id); enqueue(s, [=] { f(h, cudaSuccess, data); }); return cudaSuccess; }
RT cudaLaunchHostFunc(cudaStream_t h, cudaHostFn_t f, void* data) { STREAM(h); NOTE(captured(s), s->id); enqueue(s, [=] { f(data); }); return cudaSuccess; }
RT cudaEventCreate(cudaEvent_t* e) { NOTE(); use(); *e = (cudaEvent_t) new Event; return cudaSuccess; }
RT cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { NOTE(); use(); *e = (cudaEvent_t) new Event; return cudaSuccess; }
RT cudaEventDestroy(cudaEvent_t e) { NOTE(); Lock lock(mutex()); delete (Event*)e; return cudaSuccess; }
static cudaError_t record(const char* call, cudaEvent_t event, cudaStream_t h) {
  STREAM(h);
  auto* e = (Event*)event;
  note(call, captured(s), s->id);
  e->capture = s->capture, e->time = now();
  if (!s->capture) e->stream = s, e->ticket = s->asked;
  return cudaSuccess;
}
RT cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return record(__func__, e, s); }
RT cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return record(__func__, e, s); }
RT cudaEventQuery(cudaEvent_t e) {
  REFUSE_IN_CAPTURE(0);
  Lock lock(mutex());
  const cudaError_t state = ready((Event*)e) ? cudaSuccess : cudaErrorNotReady;
  NOTE(0, 0, -1, 0, state);
  return state ? fail(state) : state;
}
RT cudaEventSynchronize(cudaEvent_t e) {
  REFUSE_IN_CAPTURE(kWaits);
  NOTE(kWaits);
  Lock lock(mutex());
  if (!ready((Event*)e)) drain(((Event*)e)->stream);
  return cudaSuccess;
}
RT cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  NOTE();
  *ms = float(((Event*)b)->time - ((Event*)a)->time);
  return ready((Event*)a) && ready((Event*)b) ? cudaSuccess : fail(cudaErrorNotReady);
}

// --- Runtime: graphs --------------------------------------------------------------------------------------------------

static cudaError_t begin(const char* call, cudaStream_t h, cudaStreamCaptureMode mode, Graph* graph) {
  STREAM(h);
  const bool refused = (uintptr_t)h <= 1 || s->capture;
  note(call, 0, s->id, -1, 0, refused ? cudaErrorStreamCaptureUnsupported : 0);
  if (refused) return fail(cudaErrorStreamCaptureUnsupported);
  static unsigned long long last = 0;
  s->capture = std::make_shared<Capture>(Capture{++last, mode, graph});
  captures().insert(s->capture.get());
  captures_global += mode == cudaStreamCaptureModeGlobal;
  captures_of_thread += mode != cudaStreamCaptureModeRelaxed;
  return cudaSuccess;
}
RT cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { return begin(__func__, s, m, new Graph); }
RT cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, enum cudaStreamCaptureMode m) { return begin(__func__, s, m, (Graph*)g); }
RT cudaStreamEndCapture(cudaStream_t h, cudaGraph_t* graph) {
  STREAM(h);
  NOTE(0, s->id);
  *graph = nullptr;
  const std::shared_ptr<Capture> c = s->capture;
  if (!c) return fail(cudaErrorIllegalState);
  for (Stream* other : streams()) if (other->capture == c) other->capture = nullptr;
  captures().erase(c.get());
  captures_global -= c->mode == cudaStreamCaptureModeGlobal;
  captures_of_thread -= c->mode != cudaStreamCaptureModeRelaxed;
  if (c->broken) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = (cudaGraph_t)c->graph;
  return cudaSuccess;
}
RT cudaStreamIsCapturing(cudaStream_t h, enum cudaStreamCaptureStatus* status) {
  STREAM(h);
  NOTE(0, s->id);
  *status = !s->capture ? cudaStreamCaptureStatusNone : s->capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
RT cudaStreamGetCaptureInfo(cudaStream_t h, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                            const cudaGraphNode_t** deps, const cudaGraphEdgeData** edges, size_t* n) {
  STREAM(h);
  NOTE(0, s->id);
  *status = !s->capture ? cudaStreamCaptureStatusNone : s->capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (id) *id = s->capture ? s->capture->id : 0;
  if (graph) *graph = s->capture ? (cudaGraph_t)s->capture->graph : nullptr;
  if (deps) *deps = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
RT cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) { NOTE(); std::swap(*mode, thread_mode); return cudaSuccess; }
RT cudaGraphCreate(cudaGraph_t* g, unsigned) { NOTE(); *g = (cudaGraph_t) new Graph; return cudaSuccess; }
RT cudaGraphDestroy(cudaGraph_t g) { NOTE(); delete (Graph*)g; return cudaSuccess; }
RT cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) { NOTE(); *n = ((Graph*)g)->nodes.size(); return cudaSuccess; }
RT cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) { NOTE(); *e = (cudaGraphExec_t) new Graph(*(Graph*)g); return cudaSuccess; }
RT cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) { NOTE(); *e = (cudaGraphExec_t) new Graph(*(Graph*)g); return cudaSuccess; }
RT cudaGraphExecDestroy(cudaGraphExec_t e) { NOTE(); delete (Graph*)e; return cudaSuccess; }
RT cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t h) {
  STREAM(h);
  NOTE(0, s->id);
  for (const Work& node : ((Graph*)e)->nodes) enqueue(s, node);
  return cudaSuccess;
}
RT cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) { NOTE(); *o = (cudaUserObject_t)&contexts[0]; return cudaSuccess; }

// --- Runtime: kernels -------------------------------------------------------------------------------------------------

extern "C" void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" char __cudaInitModule(void**) { return 0; }
extern "C" void __cudaRegisterFunction(void**, const char* f, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(mutex());
  kernels()[f] = new_kernel(name);
}
static std::map<const void*, std::pair<size_t, void*>>& variables() { static auto* m = new std::map<const void*, std::pair<size_t, void*>>; return *m; }
extern "C" void __cudaRegisterVar(void**, char* var, char*, const char*, int, size_t size, int, int) { Lock lock(mutex()); variables()[var] = {size, nullptr}; }
RT cudaGetSymbolAddress(void** p, const void* symbol) {
  NOTE();
  Lock lock(mutex());
  auto& v = variables()[symbol];
  if (!v.second) v.second = take(device, v.first);
  *p = v.second;
  return cudaSuccess;
}
RT cudaMemcpyToSymbol(const void* symbol, const void* from, size_t n, size_t offset, enum cudaMemcpyKind k) {
  void* to;
  cudaGetSymbolAddress(&to, symbol);
  return copy(__func__, (char*)to + offset, from, n, k, nullptr, true);
}
RT __cudaGetKernel(cudaKernel_t* k, const void* f) {
  Lock lock(mutex());
  *k = (cudaKernel_t)kernel_of(f);
  return *k ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction);
}
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
RT __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const PushedCall& c = pushed.back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *(void**)stream = c.stream;
  pushed.pop_back();
  return cudaSuccess;
}
static cudaError_t run(const char* call, const void* f, dim3 g, dim3 b, void** args, size_t shared, const void* s) {
  const unsigned grid[3] = {g.x, g.y, g.z}, block[3] = {b.x, b.y, b.z};
  const cudaError_t e = launch(call, f, grid, block, shared, s, args);
  return e ? fail(e) : e;
}
RT __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s) { return run("cudaLaunchKernel", k, g, b, args, shared, s); }
RT cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s) { return run(__func__, f, g, b, args, shared, s); }
RT cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s) { return run(__func__, f, g, b, args, shared, s); }
RT cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) { return run(__func__, f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream); }
RT cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  NOTE();
  Lock lock(mutex());
  const Kernel* k = kernel_of(f);
  if (!k || !k->loadable()) return fail(k ? cudaErrorNoKernelImageForDevice : cudaErrorInvalidDeviceFunction);
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = capability(), a->maxDynamicSharedSizeBytes = kSharedDefault;
  return cudaSuccess;
}
static void set_shared(const void* f, int value) { Lock lock(mutex()); if (Kernel* k = kernel_of(f)) k->shared = value; }
RT cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute a, int v) { NOTE(); if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) set_shared(f, v); return cudaSuccess; }
RT cudaKernelSetAttributeForDevice(cudaKernel_t f, enum cudaFuncAttribute a, int v, int) { NOTE(); if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) set_shared(f, v); return cudaSuccess; }
RT cudaFuncSetCacheConfig(const void*, enum cudaFuncCache) { NOTE(); return cudaSuccess; }
RT cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int threads, size_t) { NOTE(); *n = blocks_an_sm(threads); return cudaSuccess; }
RT cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int threads, size_t, unsigned) { NOTE(); *n = blocks_an_sm(threads); return cudaSuccess; }
RT cudaGetFuncBySymbol(cudaFunction_t* f, const void* symbol) { NOTE(); Lock lock(mutex()); *f = (cudaFunction_t)kernel_of(symbol); return *f ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction); }
RT cudaLibraryLoadData(cudaLibrary_t* l, const void*, enum cudaJitOption*, void**, unsigned, enum cudaLibraryOption*, void**, unsigned) { NOTE(); *l = (cudaLibrary_t)&contexts[0]; return cudaSuccess; }
RT cudaLibraryGetKernel(cudaKernel_t* k, cudaLibrary_t, const char* name) { NOTE(); Lock lock(mutex()); *k = (cudaKernel_t)new_kernel(name); return cudaSuccess; }

// --- Driver -----------------------------------------------------------------------------------------------------------

static void* symbol(const char* name) {
  static void* self = [] { Dl_info info; dladdr((void*)&fakecuda_count, &info); return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD); }();
  for (const char* version : {"_v3", "_v2", ""})
    if (void* p = dlsym(self, (std::string(name) + version).c_str())) return p;
  return nullptr;
}
static void* find(const char* name, void** p, int* status) {
  *p = symbol(name);
  if (status) *status = *p ? 0 : 1;  // success, or not found
  return *p;
}
RT cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned, unsigned long long, enum cudaDriverEntryPointQueryResult* status) { NOTE(); find(name, p, (int*)status); return cudaSuccess; }
DR cuGetProcAddress(const char* name, void** p, int, cuuint64_t, CUdriverProcAddressQueryResult* status) { NOTE(); return find(name, p, (int*)status) ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND; }
DR cuInit(unsigned) { NOTE(); return n_devices() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
DR cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* out) { NOTE(); if (out) *out = nullptr; return CUDA_SUCCESS; }
DR cuLogsUnregisterCallback(CUlogsCallbackHandle) { NOTE(); return CUDA_SUCCESS; }
DR cuDriverGetVersion(int* v) { NOTE(); *v = CUDA_VERSION; return CUDA_SUCCESS; }
DR cuDeviceGetCount(int* n) { NOTE(); *n = n_devices(); return CUDA_SUCCESS; }
DR cuDeviceGet(CUdevice* d, int i) { NOTE(); *d = i; return i < n_devices() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }
DR cuDeviceGetName(char* out, int n, CUdevice) { NOTE(); snprintf(out, n, "%s", kName); return CUDA_SUCCESS; }
DR cuDeviceGetUuid(CUuuid* u, CUdevice d) { NOTE(); memset(u, 0x11 * (d + 1), sizeof *u); return CUDA_SUCCESS; }
DR cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) { NOTE(); *v = attribute(a); return CUDA_SUCCESS; }
DR cuDeviceTotalMem(size_t* n, CUdevice) { NOTE(); *n = kTotal; return CUDA_SUCCESS; }
DR cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { NOTE(); context_made[d] = true; *c = (CUcontext)&contexts[d]; return CUDA_SUCCESS; }
DR cuDevicePrimaryCtxRelease(CUdevice) { NOTE(); return CUDA_SUCCESS; }
DR cuDevicePrimaryCtxGetState(CUdevice d, unsigned* flags, int* active) { NOTE(); *flags = 0, *active = context_made[d]; return CUDA_SUCCESS; }
DR cuCtxGetCurrent(CUcontext* c) { NOTE(); *c = bound ? (CUcontext)&contexts[device] : nullptr; return CUDA_SUCCESS; }
DR cuCtxSetCurrent(CUcontext c) { NOTE(); bound = c != nullptr; if (c) device = ((Context*)c)->device; return CUDA_SUCCESS; }
DR cuCtxGetDevice(CUdevice* d) { NOTE(); *d = device; return bound ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }
DR cuCtxSynchronize() { return drv(cudaDeviceSynchronize()); }
DR cuCtxGetLimit(size_t* v, CUlimit) { NOTE(); *v = 1 << 20; return CUDA_SUCCESS; }
DR cuCtxSetLimit(CUlimit, size_t) { NOTE(); return CUDA_SUCCESS; }
DR cuGetErrorString(CUresult e, const char** s) { *s = cudaGetErrorName(cudaError_t(int(e))); return CUDA_SUCCESS; }
DR cuGetErrorName(CUresult e, const char** s) { *s = cudaGetErrorName(cudaError_t(int(e))); return CUDA_SUCCESS; }
DR cuModuleLoad(CUmodule* m, const char*) { NOTE(); *m = (CUmodule)&contexts[device]; return CUDA_SUCCESS; }
DR cuModuleLoadData(CUmodule* m, const void*) { NOTE(); *m = (CUmodule)&contexts[device]; return CUDA_SUCCESS; }
DR cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) { NOTE(); *m = (CUmodule)&contexts[device]; return CUDA_SUCCESS; }
DR cuModuleLoadFatBinary(CUmodule* m, const void*) { NOTE(); *m = (CUmodule)&contexts[device]; return CUDA_SUCCESS; }
DR cuModuleUnload(CUmodule) { NOTE(); return CUDA_SUCCESS; }
DR cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) { NOTE(); Lock lock(mutex()); Kernel* k = new_kernel(name, ((Context*)m)->device); *f = (CUfunction)k; return k->loadable() ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU; }
DR cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  NOTE();
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
DR cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { NOTE(); if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) set_shared(f, v); return CUDA_SUCCESS; }
DR cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { NOTE(); return CUDA_SUCCESS; }
DR cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream s, void** args, void**) {
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return drv(launch(__func__, f, grid, block, shared, s, args));
}
DR cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** args, void**) {
  const unsigned grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ}, block[3] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return drv(launch(__func__, f, grid, block, c->sharedMemBytes, c->hStream, args));
}
DR cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream s, void** args) {
  return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, s, args, nullptr);
}
DR cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int threads, size_t) { NOTE(); *n = blocks_an_sm(threads); return CUDA_SUCCESS; }
DR cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { NOTE(); *n = kSms / 8; return CUDA_SUCCESS; }
DR cuPointerGetAttribute(void* out, CUpointer_attribute a, CUdeviceptr p) {
  NOTE();
  Lock lock(mutex());
  const int d = device_of((void*)p);
  const bool known = d >= 0 || pinned_at((void*)p);
  switch (a) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext*)out = d >= 0 ? (CUcontext)&contexts[d] : nullptr; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned*)out = d >= 0 ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(CUdeviceptr*)out = p; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int*)out = d; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(bool*)out = false; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long*)out = 1; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
DR cuMemGetInfo(size_t* f, size_t* t) { return drv(cudaMemGetInfo(f, t)); }
DR cuMemAlloc(CUdeviceptr* p, size_t n) { return drv(allocate(__func__, (void**)p, n)); }
DR cuMemFree(CUdeviceptr p) { return drv(release(__func__, (void*)p, true)); }
DR cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t n) { return drv(copy(__func__, (void*)to, from, n, cudaMemcpyDefault, nullptr, true)); }
DR cuMemcpyDtoH(void* to, CUdeviceptr from, size_t n) { return drv(copy(__func__, to, (void*)from, n, cudaMemcpyDefault, nullptr, true)); }
DR cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t n, CUstream s) { return drv(copy(__func__, (void*)to, from, n, cudaMemcpyDefault, s, false)); }
DR cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t n, CUstream s) { return drv(copy(__func__, to, (void*)from, n, cudaMemcpyDefault, s, false)); }
DR cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) { return drv(copy(__func__, (void*)to, (void*)from, n, cudaMemcpyDefault, s, false)); }
DR cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) { return drv(fill(__func__, (void*)p, v, n, s, false)); }
DR cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) { return drv(fill(__func__, (void*)p, v, n, s, false)); }
DR cuMemGetAddressRange(CUdeviceptr* base, size_t* n, CUdeviceptr p) {
  NOTE();
  Lock lock(mutex());
  const int d = device_of((void*)p);
  if (d < 0) return CUDA_ERROR_INVALID_VALUE;
  auto it = arena(d).taken.upper_bound((char*)p);
  if (it == arena(d).taken.begin()) return CUDA_ERROR_INVALID_VALUE;
  --it;
  if (base) *base = (CUdeviceptr)it->first;
  if (n) *n = it->second;
  return CUDA_SUCCESS;
}
DR cuMemGetAllocationGranularity(size_t* n, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) { NOTE(); *n = 2 << 20; return CUDA_SUCCESS; }
DR cuStreamSynchronize(CUstream s) { return drv(cudaStreamSynchronize(s)); }
DR cuStreamCreate(CUstream* s, unsigned f) { return drv(cudaStreamCreateWithFlags(s, f)); }
DR cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* out) { return drv(cudaStreamIsCapturing(s, (cudaStreamCaptureStatus*)out)); }
DR cuStreamWaitEvent(CUstream s, CUevent e, unsigned f) { return drv(cudaStreamWaitEvent(s, e, f)); }
DR cuEventCreate(CUevent* e, unsigned f) { return drv(cudaEventCreateWithFlags(e, f)); }
DR cuEventRecord(CUevent e, CUstream s) { return drv(cudaEventRecord(e, s)); }
DR cuEventSynchronize(CUevent e) { return drv(cudaEventSynchronize(e)); }
DR cuEventQuery(CUevent e) { return drv(cudaEventQuery(e)); }
DR cuEventDestroy(CUevent e) { return drv(cudaEventDestroy(e)); }
