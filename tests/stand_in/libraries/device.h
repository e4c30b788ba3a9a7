// What the stand-in libraries share: the devices, and who holds how much of their memory.
//
// All settings come from the environment; ../README.md lists them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace standin {

constexpr int kMostDevices = 8;
constexpr uint64_t kGranule = 2ull << 20;  // the driver gives memory by 2 MiB
constexpr int kCudaVersion = 13000;        // of driver and runtime, as CUDA writes it

// A whole number that the environment names, or `otherwise`.
int64_t setting(const char* name, int64_t otherwise);

uint64_t round_up(uint64_t bytes, uint64_t unit);
std::string device_name();
int multiprocessors();
int capability();                  // 90 for 9.0
uint64_t total_bytes();            // of one device
int physical_count();              // the devices of the machine, as NVML counts them
const std::vector<int>& visible(); // their numbers, as CUDA_VISIBLE_DEVICES lets this process see them
std::string uuid_bytes(int physical);  // 16 bytes
std::string uuid_text(int physical);   // GPU-xxxxxxxx-xxxx-...
std::string bus_id(int physical);      // 00000000:01:00.0

// Devices below are numbers among the visible ones, except in `processes` and `used_bytes`.

int current_device();
bool set_device(int device);  // false: there is none of that number
void make_context(int device);
bool has_context(int device);

// Memory of this process; `take` makes the context first. False: the device has no room.
bool take(int device, uint64_t bytes);
void give(int device, uint64_t bytes);

// STANDIN_FAULT_AT=N: the N-th kernel of the process faults, and its context is lost with it.
void count_launch();
bool faulted();

// A range of addresses that nothing else has; nothing lies behind them.
uint64_t new_address(uint64_t bytes);
bool is_device_address(uint64_t address);

// What all living processes hold of a device of the machine, and each of them with a context.
uint64_t used_bytes(int physical);
std::vector<std::pair<int, uint64_t>> processes(int physical);

}  // namespace standin
