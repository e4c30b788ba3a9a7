// What the parts of the stand-in runtime share: how a call answers.
#pragma once

#include <cuda_runtime_api.h>

namespace standin {

extern thread_local cudaError_t last_error;

// The error is what cudaGetLastError gives next.
cudaError_t fail(cudaError_t error);

// What every call that reaches the device answers: an error for good once a kernel has faulted.
cudaError_t device_answer();

}  // namespace standin
