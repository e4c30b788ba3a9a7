// A stand-in for cuDNN: every plan of a convolution or an attention is found, asks for
// STANDIN_WORKSPACE_BYTES, and computes nothing.
#include <cuda_runtime_api.h>
#include <cudnn.h>

#include <cstdio>
#include <cstdlib>

#include "device.h"

namespace {

cudaStream_t stream_of_all = nullptr;

template <class Handle>
cudnnStatus_t new_handle(Handle* handle) {
  *handle = static_cast<Handle>(std::calloc(1, 256));
  return *handle != nullptr ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

cudnnStatus_t no_bytes(size_t* bytes) {
  *bytes = 0;
  return CUDNN_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

size_t cudnnGetVersion() { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion() { return CUDART_VERSION; }

cudnnStatus_t cudnnGetProperty(libraryPropertyType property, int* value) {
  *value = property == MAJOR_VERSION   ? CUDNN_MAJOR
           : property == MINOR_VERSION ? CUDNN_MINOR
                                       : CUDNN_PATCHLEVEL;
  return CUDNN_STATUS_SUCCESS;
}

const char* cudnnGetErrorString(cudnnStatus_t) { return "an error of the stand-in"; }

void cudnnGetLastErrorString(char* text, size_t length) {
  std::snprintf(text, length, "an error of the stand-in");
}

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) { return new_handle(handle); }

cudnnStatus_t cudnnSetStream(cudnnHandle_t, cudaStream_t stream) {
  stream_of_all = stream;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t, cudaStream_t* stream) {
  *stream = stream_of_all;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* made) {
  return new_handle(made);
}
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t* made) {
  return new_handle(made);
}
cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t* made) {
  return new_handle(made);
}
cudnnStatus_t cudnnCreateActivationDescriptor(cudnnActivationDescriptor_t* made) {
  return new_handle(made);
}

// -- batch norm: what it takes besides its tensors -------------------------------------------------

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnActivationDescriptor_t, size_t* bytes) {
  return no_bytes(bytes);
}

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnActivationDescriptor_t, size_t* bytes) {
  return no_bytes(bytes);
}

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnActivationDescriptor_t,
    const cudnnTensorDescriptor_t, size_t* bytes) {
  return no_bytes(bytes);
}

// -- convolutions and attention: plans of the backend interface -------------------------------------

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t,
                                           cudnnBackendDescriptor_t* made) {
  return new_handle(made);
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  std::free(descriptor);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t, int64_t, int64_t* count,
                                       void* value) {
  int64_t found = 1;
  switch (name) {
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
      if (value != nullptr) {
        *static_cast<int64_t*>(value) = standin::setting("STANDIN_WORKSPACE_BYTES", 0);
      }
      break;
    // Attention's plans are refused where they want more than a multiprocessor has, as they seem to
    // where this is not answered.
    case CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED:
      if (value != nullptr) *static_cast<int32_t*>(value) = 0;
      break;
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
      if (value != nullptr) *static_cast<int64_t*>(value) = 1;
      break;
    case CUDNN_ATTR_ENGINEHEUR_RESULTS:
    case CUDNN_ATTR_ENGINECFG_ENGINE:
    case CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG: break;  // the caller's descriptor will do
    default: found = 0;
  }
  if (count != nullptr) *count = found;
  return CUDNN_STATUS_SUCCESS;
}

}  // extern "C"
