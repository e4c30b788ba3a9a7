// The stand-in GPUs: counts of bytes in a file that all processes of one STANDIN_STATE map.
//
// A process writes its own slot of the file only. What a process held is free as soon as it has
// ended, however it ended, as with a real driver.
#include "device.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>

namespace standin {
namespace {

constexpr int kSlots = 256;
constexpr uint64_t kFirstAddress = 0x500000000000ull;  // no process maps anything there
constexpr uint64_t kEndAddress = 0x600000000000ull;

struct Slot {
  int64_t pid;
  uint64_t held[kMostDevices];      // by the caller's allocations and its context
  int64_t has_context[kMostDevices];
};

struct State {
  std::mutex mutex;
  int file = -1;  // -1: of this process alone
  Slot* slots = nullptr;
  Slot* own = nullptr;
};

[[noreturn]] void give_up(const std::string& why) {
  std::fprintf(stderr, "stand-in GPU: %s\n", why.c_str());
  std::abort();
}

bool lives(int64_t pid) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(pid));
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return false;
  char text[512] = {};
  size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  // The name before the state stands in brackets and may hold some itself.
  const char* name_end = length > 0 ? std::strrchr(text, ')') : nullptr;
  return name_end != nullptr && std::strlen(name_end) > 2 && name_end[2] != 'Z' &&
         name_end[2] != 'X';
}

Slot* map_slots(int* file) {
  const char* folder = std::getenv("STANDIN_STATE");
  int flags = MAP_SHARED;
  if (folder == nullptr || *folder == '\0') {
    *file = -1;
    flags |= MAP_ANONYMOUS;
  } else {
    std::string path = std::string(folder) + "/devices";
    *file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (*file < 0 || ftruncate(*file, sizeof(Slot) * kSlots) != 0) {
      give_up("cannot write " + path + ": STANDIN_STATE must name a folder");
    }
  }
  void* memory = mmap(nullptr, sizeof(Slot) * kSlots, PROT_READ | PROT_WRITE, flags, *file, 0);
  if (memory == MAP_FAILED) give_up("the state cannot be mapped");
  return static_cast<Slot*>(memory);
}

State& state() {
  static State* only = [] {
    auto* made = new State;  // never freed: torch gives memory back until the very end
    made->slots = map_slots(&made->file);
    return made;
  }();
  return *only;
}

// Holds the state against the other threads and the other processes.
class Lock {
 public:
  Lock() : guard_(state().mutex) {
    if (state().file >= 0) flock(state().file, LOCK_EX);
  }
  ~Lock() {
    if (state().file >= 0) flock(state().file, LOCK_UN);
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::lock_guard<std::mutex> guard_;
};

// Under the lock. A process without a slot holds nothing.
Slot& own_slot() {
  if (state().own != nullptr) return *state().own;
  int64_t pid = getpid();
  Slot* begin = state().slots;
  Slot* end = begin + kSlots;
  Slot* free = std::find_if(begin, end, [&](const Slot& s) {
    return s.pid == 0 || s.pid == pid || !lives(s.pid);
  });
  if (free == end) give_up("more processes than the state has room for");
  *free = Slot{};
  free->pid = pid;
  state().own = free;
  return *free;
}

// Under the lock.
uint64_t held_by_all(int physical) {
  uint64_t sum = 0;
  for (int i = 0; i < kSlots; ++i) {
    const Slot& slot = state().slots[i];
    if (slot.held[physical] > 0 && lives(slot.pid)) sum += slot.held[physical];
  }
  return sum;
}

// Under the lock. The context is charged whether or not there is room.
void charge_context(int physical) {
  Slot& slot = own_slot();
  if (slot.has_context[physical] != 0) return;
  slot.has_context[physical] = 1;
  slot.held[physical] += static_cast<uint64_t>(setting("STANDIN_CONTEXT_BYTES", 0));
}

std::vector<int> read_visible() {
  std::vector<int> all;
  for (int i = 0; i < physical_count(); ++i) all.push_back(i);
  const char* chosen = std::getenv("CUDA_VISIBLE_DEVICES");
  if (chosen == nullptr) return all;
  std::vector<int> seen;
  std::stringstream words{std::string(chosen)};
  for (std::string word; std::getline(words, word, ',');) {
    auto found = std::find_if(all.begin(), all.end(), [&](int i) {
      return word == std::to_string(i) || (word.size() > 4 && uuid_text(i).rfind(word, 0) == 0);
    });
    if (found == all.end()) break;  // as CUDA does: an entry that is none hides the rest
    seen.push_back(*found);
  }
  return seen;
}

std::atomic<int64_t> launches{0};
thread_local int chosen_device = 0;
std::atomic<uint64_t> next_address{kFirstAddress};

}  // namespace

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  long long value = std::strtoll(text, &end, 10);
  if (*end != '\0' || value < 0) give_up(std::string(name) + "=" + text + " is no whole number");
  return value;
}

uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

// The brackets say what it is wherever the name is printed; a card's name leaves them out.
std::string device_name() { return "stand-in (no kernel runs)"; }

int multiprocessors() { return static_cast<int>(setting("STANDIN_MULTIPROCESSORS", 80)); }

int capability() { return static_cast<int>(setting("STANDIN_CAPABILITY", 90)); }

uint64_t total_bytes() {
  return static_cast<uint64_t>(setting("STANDIN_MEMORY_BYTES", 32ll << 30));
}

int physical_count() {
  return static_cast<int>(std::min<int64_t>(setting("STANDIN_DEVICES", 1), kMostDevices));
}

const std::vector<int>& visible() {
  static const std::vector<int> seen = read_visible();
  return seen;
}

std::string uuid_bytes(int physical) { return "stand-in GPU no" + std::to_string(physical); }

std::string uuid_text(int physical) {
  std::string text = "GPU-";
  std::string bytes = uuid_bytes(physical);
  for (size_t i = 0; i < bytes.size(); ++i) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", static_cast<unsigned char>(bytes[i]));
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += two;
  }
  return text;
}

std::string bus_id(int physical) {
  char text[32];
  std::snprintf(text, sizeof text, "00000000:%02X:00.0", physical + 1);
  return text;
}

int current_device() { return chosen_device; }

bool set_device(int device) {
  if (device < 0 || device >= static_cast<int>(visible().size())) return false;
  chosen_device = device;
  return true;
}

void make_context(int device) {
  Lock lock;
  charge_context(visible().at(device));
}

bool has_context(int device) {
  Lock lock;
  return state().own != nullptr && state().own->has_context[visible().at(device)] != 0;
}

bool take(int device, uint64_t bytes) {
  Lock lock;
  int physical = visible().at(device);
  charge_context(physical);
  if (held_by_all(physical) + bytes > total_bytes()) return false;
  own_slot().held[physical] += bytes;
  return true;
}

void give(int device, uint64_t bytes) {
  Lock lock;
  own_slot().held[visible().at(device)] -= bytes;
}

void count_launch() { ++launches; }

bool faulted() {
  static const int64_t fault_at = setting("STANDIN_FAULT_AT", 0);
  return fault_at > 0 && launches.load() >= fault_at;
}

uint64_t new_address(uint64_t bytes) {
  uint64_t address = next_address.fetch_add(round_up(bytes, kGranule) + kGranule);
  if (address + bytes > kEndAddress) give_up("out of addresses");
  return address;
}

bool is_device_address(uint64_t address) {
  return address >= kFirstAddress && address < next_address.load();
}

uint64_t used_bytes(int physical) {
  Lock lock;
  return held_by_all(physical);
}

std::vector<std::pair<int, uint64_t>> processes(int physical) {
  Lock lock;
  std::vector<std::pair<int, uint64_t>> found;
  for (int i = 0; i < kSlots; ++i) {
    const Slot& slot = state().slots[i];
    if (slot.pid != 0 && slot.has_context[physical] != 0 && lives(slot.pid)) {
      found.emplace_back(static_cast<int>(slot.pid), slot.held[physical]);
    }
  }
  return found;
}

}  // namespace standin
