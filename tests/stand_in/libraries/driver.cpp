// A stand-in for the CUDA driver (libcuda): modules load, kernels launch and never run, and
// virtual memory (torch's expandable segments) is counted.
#include <cuda.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "device.h"

namespace {

struct Physical {
  int device;
  uint64_t bytes;
};

std::mutex lock;
std::map<CUmemGenericAllocationHandle, Physical>& memories =
    *new std::map<CUmemGenericAllocationHandle, Physical>;  // cuMemCreate's
std::map<CUdeviceptr, Physical>& blocks = *new std::map<CUdeviceptr, Physical>;  // cuMemAlloc's
std::atomic<CUmemGenericAllocationHandle> next_memory{1};

template <class Handle>
Handle some_handle(uintptr_t value) {
  return reinterpret_cast<Handle>(value);
}

CUresult device_answer() {
  return standin::faulted() ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

const char* error_text(CUresult error) {
  switch (error) {
    case CUDA_SUCCESS: return "no error";
    case CUDA_ERROR_OUT_OF_MEMORY: return "out of memory";
    case CUDA_ERROR_ILLEGAL_ADDRESS: return "an illegal memory access was encountered";
    default: return "an error of the stand-in";
  }
}

}  // namespace

// By compute capability, from the tables of the CUDA C++ programming guide: the most shared memory
// that a block may ask for, and the threads that a multiprocessor holds.
static int shared_kib() {
  const int capability = standin::capability();
  if (capability == 86 || capability == 89 || capability >= 120) return 99;
  if (capability >= 90) return 227;
  if (capability >= 80) return 163;
  if (capability == 75) return 64;
  return capability >= 70 ? 96 : 48;
}

static int threads() {
  const int capability = standin::capability();
  if (capability == 75) return 1024;
  return (capability >= 86 && capability <= 89) || capability >= 120 ? 1536 : 2048;
}

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error_text(error);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  return cuGetErrorString(error, text);
}

CUresult cuDriverGetVersion(int* version) {
  *version = standin::kCudaVersion;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = static_cast<int>(standin::visible().size());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  std::snprintf(name, length, "%s", standin::device_name().c_str());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  std::memcpy(uuid, standin::uuid_bytes(standin::visible().at(device)).data(), sizeof *uuid);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) {
  *bytes = standin::total_bytes();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = standin::multiprocessors(); break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = standin::capability() / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = standin::capability() % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_kib() << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = (shared_kib() + 1) << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = threads(); break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 2147483647; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: *value = 65535; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: *value = 512; break;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED: *value = 0; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = some_handle<CUcontext>(0x10);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = standin::current_device();
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  standin::make_context(device);
  return cuCtxGetCurrent(context);
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = standin::has_context(device) ? 1 : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}

// -- kernels ------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = some_handle<CUmodule>(0x20);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  *function = some_handle<CUfunction>(0x30);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, CUstream, void**, void**) {
  standin::count_launch();
  return device_answer();
}

CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**) {
  standin::count_launch();
  return device_answer();
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (!standin::is_device_address(pointer)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *static_cast<CUdeviceptr*>(value) = pointer;
  } else {
    *static_cast<unsigned*>(value) = CU_MEMORYTYPE_DEVICE;
  }
  return CUDA_SUCCESS;
}

// -- memory -------------------------------------------------------------------------------------

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  int device = standin::current_device();
  standin::make_context(device);
  uint64_t used = standin::used_bytes(standin::visible().at(device));
  *total = standin::total_bytes();
  *free = *total > used ? *total - used : 0;
  return device_answer();
}

CUresult cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
  Physical taken{standin::current_device(), standin::round_up(bytes, standin::kGranule)};
  if (!standin::take(taken.device, taken.bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  *pointer = standin::new_address(taken.bytes);
  std::lock_guard<std::mutex> guard(lock);
  blocks[*pointer] = taken;
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr pointer) {
  std::lock_guard<std::mutex> guard(lock);
  auto block = blocks.find(pointer);
  if (block == blocks.end()) return CUDA_ERROR_INVALID_VALUE;
  standin::give(block->second.device, block->second.bytes);
  blocks.erase(block);
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  *bytes = standin::kGranule;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t bytes, size_t, CUdeviceptr,
                             unsigned long long) {
  *pointer = standin::new_address(bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* memory, size_t bytes,
                     const CUmemAllocationProp* wanted, unsigned long long) {
  Physical taken{wanted->location.id, bytes};
  if (!standin::take(taken.device, taken.bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  std::lock_guard<std::mutex> guard(lock);
  *memory = next_memory++;
  memories[*memory] = taken;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle memory) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = memories.find(memory);
  if (found == memories.end()) return CUDA_ERROR_INVALID_VALUE;
  standin::give(found->second.device, found->second.bytes);
  memories.erase(found);
  return CUDA_SUCCESS;
}

}  // extern "C"
