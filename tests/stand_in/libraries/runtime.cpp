// A stand-in for the CUDA runtime (libcudart): memory is counted, kernels are accepted and never run.
// Its streams and events are in streams.cpp.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "device.h"
#include "runtime.h"

namespace standin {

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

cudaError_t device_answer() {
  return faulted() ? fail(cudaErrorIllegalAddress) : cudaSuccess;
}

}  // namespace standin

namespace {

using standin::device_answer;
using standin::fail;
using standin::last_error;

constexpr uint64_t kPage = 4096;

struct Block {
  int device;
  uint64_t bytes;
};

std::mutex lock;
std::map<uint64_t, Block>& blocks = *new std::map<uint64_t, Block>;        // cudaMalloc's
std::map<uint64_t, uint64_t>& pinned = *new std::map<uint64_t, uint64_t>;  // cudaHostAlloc's
uint64_t number(const void* address) { return reinterpret_cast<uint64_t>(address); }

bool in_pinned(uint64_t address) {
  auto after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  auto block = std::prev(after);
  return address < block->first + block->second;
}

// Nothing lies on the device: what is written there is lost, what is read is STANDIN_FILL.
cudaError_t copy(void* to, const void* from, size_t bytes) {
  if (standin::is_device_address(number(to))) return device_answer();
  if (standin::is_device_address(number(from))) {
    std::memset(to, static_cast<int>(standin::setting("STANDIN_FILL", 0)), bytes);
  } else {
    std::memmove(to, from, bytes);
  }
  return device_answer();
}

cudaError_t allocate(void** pointer, size_t bytes) {
  if (device_answer() != cudaSuccess) return last_error;
  int device = standin::current_device();
  uint64_t taken = standin::round_up(bytes, standin::kGranule);
  if (!standin::take(device, taken)) return fail(cudaErrorMemoryAllocation);
  uint64_t address = standin::new_address(taken);
  std::lock_guard<std::mutex> guard(lock);
  blocks[address] = {device, taken};
  *pointer = reinterpret_cast<void*>(address);
  return cudaSuccess;
}

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported by the stand-in"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
};

const ErrorText& error_text(cudaError_t error) {
  static const ErrorText other{cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known;
  }
  return other;
}

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local Launch pushed;

}  // namespace

extern "C" {

// -- devices ------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(standin::visible().size());
  return *count > 0 ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  *device = standin::current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!standin::set_device(device)) return fail(cudaErrorInvalidDevice);
  standin::make_context(device);
  return device_answer();
}

cudaError_t cudaDeviceSynchronize() {
  standin::make_context(standin::current_device());
  return device_answer();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = standin::kCudaVersion;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, length, "%s", standin::bus_id(standin::visible().at(device)).c_str());
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  // The runtime's numbers of attributes are the driver's.
  cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attribute), device);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= static_cast<int>(standin::visible().size())) {
    return fail(cudaErrorInvalidDevice);
  }
  auto attribute = [device](CUdevice_attribute which) {
    int value = 0;
    cuDeviceGetAttribute(&value, which, device);
    return value;
  };
  cudaDeviceProp& p = *properties;
  std::memset(&p, 0, sizeof p);
  int physical = standin::visible().at(device);
  std::snprintf(p.name, sizeof p.name, "%s", standin::device_name().c_str());
  std::memcpy(&p.uuid, standin::uuid_bytes(physical).data(), sizeof p.uuid);
  p.pciBusID = physical + 1;
  p.totalGlobalMem = standin::total_bytes();
  p.major = standin::capability() / 10;
  p.minor = standin::capability() % 10;
  p.multiProcessorCount = standin::multiprocessors();
  p.warpSize = attribute(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  p.regsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  p.regsPerMultiprocessor = p.regsPerBlock;
  p.sharedMemPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p.sharedMemPerBlockOptin = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  p.sharedMemPerMultiprocessor =
      attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  p.reservedSharedMemPerBlock = 1024;
  p.maxThreadsPerBlock = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  p.maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p.maxBlocksPerMultiProcessor = 32;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X);
  p.maxGridSize[1] = p.maxGridSize[2] = attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y);
  p.totalConstMem = 65536;
  p.textureAlignment = 512;
  p.texturePitchAlignment = 32;
  p.l2CacheSize = 50 << 20;
  p.memoryBusWidth = 5120;
  p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = 1;
  p.managedMemory = p.concurrentManagedAccess = p.cooperativeLaunch = 1;
  return cudaSuccess;
}

// -- memory -------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  int device = standin::current_device();
  standin::make_context(device);
  uint64_t used = standin::used_bytes(standin::visible().at(device));
  *total = standin::total_bytes();
  *free = *total > used ? *total - used : 0;
  return device_answer();
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes); }

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return device_answer();
  std::lock_guard<std::mutex> guard(lock);
  auto block = blocks.find(number(pointer));
  if (block == blocks.end()) return fail(cudaErrorInvalidValue);
  standin::give(block->second.device, block->second.bytes);
  blocks.erase(block);
  return device_answer();
}

// Pools of the driver's own are not counted here; torch's backend:cudaMallocAsync needs them.
cudaError_t cudaMallocAsync(void**, size_t, cudaStream_t) { return fail(cudaErrorNotSupported); }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t*, int) {
  return fail(cudaErrorNotSupported);
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  void* made = std::aligned_alloc(kPage, standin::round_up(bytes > 0 ? bytes : 1, kPage));
  if (made == nullptr) return fail(cudaErrorMemoryAllocation);
  std::lock_guard<std::mutex> guard(lock);
  pinned[number(made)] = bytes;
  *pointer = made;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  pinned.erase(number(pointer));
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  pinned[number(pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  return pinned.erase(number(pointer)) > 0 ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  std::memset(attributes, 0, sizeof *attributes);
  std::lock_guard<std::mutex> guard(lock);
  bool device = standin::is_device_address(number(pointer));
  attributes->type = device                       ? cudaMemoryTypeDevice
                     : in_pinned(number(pointer)) ? cudaMemoryTypeHost
                                                  : cudaMemoryTypeUnregistered;
  attributes->device = standin::current_device();
  auto after = blocks.upper_bound(number(pointer));
  if (device && after != blocks.begin()) attributes->device = std::prev(after)->second.device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (!device) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return copy(to, from, bytes);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return copy(to, from, bytes);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (!standin::is_device_address(number(to))) std::memset(to, value, bytes);
  return device_answer();
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

// -- errors -------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) { return error_text(error).text; }
const char* cudaGetErrorName(cudaError_t error) { return error_text(error).name; }

// -- kernels ------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  standin::count_launch();
  return device_answer();
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  standin::count_launch();
  return device_answer();
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  standin::count_launch();
  return device_answer();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->maxDynamicSharedSizeBytes = 49152;
  attributes->binaryVersion = attributes->ptxVersion = standin::capability();
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*,
                                                                   int threads, size_t, unsigned) {
  *count = std::clamp(2048 / std::max(threads, 1), 1, 32);
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char room[1 << 16];  // constants of kernels, which nobody reads
  *address = room;
  return cudaSuccess;
}

// What nvcc's launches compile to: a configuration is pushed and popped around the call.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t bytes, cudaStream_t stream) {
  pushed = {grid, block, bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* bytes, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *bytes = pushed.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}

char __cudaInitModule(void**) { return 1; }

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

// torch reaches the driver's virtual memory calls (expandable segments) through this one.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *function = driver != nullptr ? dlsym(driver, name) : nullptr;
  if (result != nullptr) {
    *result = *function != nullptr ? cudaDriverEntryPointSuccess
                                   : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}

}  // extern "C"
