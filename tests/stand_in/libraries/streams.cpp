// The stand-in runtime's streams and events: numbers that somebody hands out.
//
// Nothing runs, so an event is done as soon as it is recorded; a test may hold events back.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "runtime.h"

namespace {

using standin::device_answer;
using standin::fail;

std::atomic<uint64_t> next_handle{0x1000};

template <class Handle>
cudaError_t new_handle(Handle* handle) {
  *handle = reinterpret_cast<Handle>(next_handle.fetch_add(64));
  return cudaSuccess;
}

std::mutex events_lock;
bool events_held = false;
uint64_t events_recorded = 0;
std::map<cudaEvent_t, std::pair<cudaStream_t, uint64_t>> event_places;
std::map<cudaStream_t, uint64_t> streams_done_to;

bool event_done(cudaEvent_t event) {
  auto place = event_places.find(event);
  return !events_held || place == event_places.end() ||
         place->second.second <= streams_done_to[place->second.first];
}

}  // namespace

extern "C" {

// For tests: from now on an event is done only when its stream is told to be, or waited for.
void standin_hold_events(int on) {
  std::lock_guard<std::mutex> guard(events_lock);
  events_held = on != 0;
}

void standin_finish_stream(cudaStream_t stream) {
  std::lock_guard<std::mutex> guard(events_lock);
  streams_done_to[stream] = events_recorded;
}

// -- streams ------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_handle(stream); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return new_handle(stream);
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return device_answer(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return device_answer(); }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  *status = cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = 0;
  if (graph != nullptr) *graph = nullptr;
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return fail(cudaErrorNotSupported);
}

// -- events -------------------------------------------------------------------------------------

cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_handle(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  std::lock_guard<std::mutex> guard(events_lock);
  event_places[event] = {stream, ++events_recorded};
  return device_answer();
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  std::lock_guard<std::mutex> guard(events_lock);
  return event_done(event) ? device_answer() : fail(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::lock_guard<std::mutex> guard(events_lock);
  if (!event_done(event)) {
    const auto& [stream, place] = event_places[event];
    streams_done_to[stream] = place;
  }
  return device_answer();
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::lock_guard<std::mutex> guard(events_lock);
  event_places.erase(event);
  return cudaSuccess;
}

// No kernel ran, so there is no time to tell: always 1 ms.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;
  return cudaSuccess;
}

}  // extern "C"
