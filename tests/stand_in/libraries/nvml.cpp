// A stand-in for NVML (libnvidia-ml): the stand-in GPUs as the driver's monitor would see them.
//
// No pip package carries nvml.h, so the few public types that are used are declared here.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "device.h"

namespace {

enum Status : int {
  kSuccess = 0,
  kInvalidArgument = 2,
  kNotSupported = 3,
  kNotFound = 6,
  kInsufficientSize = 7,
};

struct Device;  // a handle: the number of the device, plus one

struct MemoryV1 {
  unsigned long long total, free, used;
};

struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};

struct ProcessV1 {
  unsigned pid;
  unsigned long long used;
};

struct ProcessV2 {  // and v3
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
};

constexpr unsigned kNoInstance = 0xffffffff;
constexpr int kHostShift = 1000000;

int number(const Device* device) { return static_cast<int>(reinterpret_cast<intptr_t>(device)) - 1; }

Status handle_of(int index, Device** device) {
  if (index < 0 || index >= standin::physical_count()) return kInvalidArgument;
  *device = reinterpret_cast<Device*>(static_cast<intptr_t>(index) + 1);
  return kSuccess;
}

Status write(char* text, unsigned length, const std::string& value) {
  if (length <= value.size()) return kInsufficientSize;
  std::snprintf(text, length, "%s", value.c_str());
  return kSuccess;
}

// STANDIN_PIDS: as a container's processes are seen, listed not at all or by the host's numbers.
std::vector<std::pair<int, uint64_t>> listed(const Device* device) {
  const char* how = std::getenv("STANDIN_PIDS");
  if (how != nullptr && std::strcmp(how, "hidden") == 0) return {};
  auto found = standin::processes(number(device));
  if (how != nullptr && std::strcmp(how, "host") == 0) {
    for (auto& process : found) process.first += kHostShift;
  }
  return found;
}

template <class Process, class Make>
Status list(const Device* device, unsigned* count, Process* out, Make make) {
  auto found = listed(device);
  unsigned room = *count;
  *count = static_cast<unsigned>(found.size());
  if (found.size() > room || (out == nullptr && !found.empty())) return kInsufficientSize;
  std::transform(found.begin(), found.end(), out, make);
  return kSuccess;
}

}  // namespace

extern "C" {

Status nvmlInit() { return kSuccess; }
Status nvmlInit_v2() { return kSuccess; }
Status nvmlInitWithFlags(unsigned) { return kSuccess; }
Status nvmlShutdown() { return kSuccess; }

const char* nvmlErrorString(Status status) {
  switch (status) {
    case kSuccess: return "Success";
    case kInvalidArgument: return "Invalid Argument";
    case kNotSupported: return "Not Supported";
    case kNotFound: return "Not Found";
    case kInsufficientSize: return "Insufficient Size";
  }
  return "Unknown Error";
}

// A record carries this as its driver, so that it says itself where it was made.
Status nvmlSystemGetDriverVersion(char* text, unsigned length) {
  return write(text, length, "stand-in");
}

Status nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = standin::kCudaVersion;
  return kSuccess;
}

Status nvmlSystemGetCudaDriverVersion(int* version) {
  return nvmlSystemGetCudaDriverVersion_v2(version);
}

Status nvmlDeviceGetCount_v2(unsigned* count) {
  *count = static_cast<unsigned>(standin::physical_count());
  return kSuccess;
}

Status nvmlDeviceGetHandleByIndex_v2(unsigned index, Device** device) {
  return handle_of(static_cast<int>(index), device);
}

Status nvmlDeviceGetHandleByUUID(const char* uuid, Device** device) {
  for (int i = 0; i < standin::physical_count(); ++i) {
    if (standin::uuid_text(i) == uuid) return handle_of(i, device);
  }
  return kNotFound;
}

Status nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, Device** device) {
  for (int i = 0; i < standin::physical_count(); ++i) {
    std::string full = standin::bus_id(i);  // torch writes the domain with four digits
    if (full == bus_id || full.substr(4) == bus_id) return handle_of(i, device);
  }
  return kNotFound;
}

Status nvmlDeviceGetName(const Device*, char* text, unsigned length) {
  return write(text, length, standin::device_name());
}

Status nvmlDeviceGetUUID(const Device* device, char* text, unsigned length) {
  return write(text, length, standin::uuid_text(number(device)));
}

Status nvmlDeviceGetIndex(const Device* device, unsigned* index) {
  *index = static_cast<unsigned>(number(device));
  return kSuccess;
}

Status nvmlDeviceGetMemoryInfo(const Device* device, MemoryV1* memory) {
  uint64_t total = standin::total_bytes();
  uint64_t used = std::min(standin::used_bytes(number(device)), total);
  *memory = {total, total - used, used};
  return kSuccess;
}

Status nvmlDeviceGetMemoryInfo_v2(const Device* device, MemoryV2* memory) {
  MemoryV1 known{};
  nvmlDeviceGetMemoryInfo(device, &known);
  *memory = {memory->version, known.total, 0, known.free, known.used};
  return kSuccess;
}

Status nvmlDeviceGetMaxMigDeviceCount(const Device*, unsigned* count) {
  *count = 0;
  return kSuccess;
}

// torch asks by the name without a version, which is the first form.
Status nvmlDeviceGetComputeRunningProcesses(const Device* device, unsigned* count,
                                            ProcessV1* processes) {
  return list(device, count, processes, [](const std::pair<int, uint64_t>& process) {
    return ProcessV1{static_cast<unsigned>(process.first), process.second};
  });
}

Status nvmlDeviceGetComputeRunningProcesses_v3(const Device* device, unsigned* count,
                                               ProcessV2* processes) {
  return list(device, count, processes, [](const std::pair<int, uint64_t>& process) {
    return ProcessV2{static_cast<unsigned>(process.first), process.second, kNoInstance,
                     kNoInstance};
  });
}

Status nvmlDeviceGetComputeRunningProcesses_v2(const Device* device, unsigned* count,
                                               ProcessV2* processes) {
  return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}

// torch looks all of these up as soon as it needs one call of NVML; one GPU has no links.
Status nvmlDeviceGetNvLinkRemoteDeviceType() { return kNotSupported; }
Status nvmlDeviceGetNvLinkRemotePciInfo_v2() { return kNotSupported; }
Status nvmlDeviceGetGpuFabricInfoV() { return kNotSupported; }
Status nvmlDeviceGetP2PStatus() { return kNotSupported; }

}  // extern "C"
