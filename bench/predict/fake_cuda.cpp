// A CUDA device that is not there: lets PyTorch's fake tensors live on cuda:0 without a GPU.
//
// Fake tensors have shapes, dtypes and devices but no data, so no kernel ever runs. What stands
// in the way without a GPU is only PyTorch asking about the device: how many are there, is there
// cuDNN, which one is current, which stream. This library answers: one device, cuDNN present, the
// default stream. Autograd, autocast, checkpointing and the fused optimizers then choose the
// operators that they choose on a GPU, and a trace of a training step is a trace of the CUDA
// step.
//
// It must be loaded before torch is imported, in a process that does nothing else: loaded later,
// the forward pass and the backward pass fail. Nothing here reaches a driver; a real (not fake)
// tensor on cuda:0 is an error in such a process. bench/predict/shim.py compiles and loads it.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <memory>
#include <string>

namespace {

constexpr c10::DeviceIndex kOnlyDevice = 0;

// The release that convolution and attention are told of: new enough that no operator takes the
// path it keeps for an old cuDNN, or around the faults of 9.8 to 9.14. torch 2.11 ships 9.19.
constexpr long kCudnnVersion = 91900;

c10::Device only_device() {
  return c10::Device(c10::DeviceType::CUDA, kOnlyDevice);
}

c10::Stream default_stream() {
  return c10::Stream(c10::Stream::DEFAULT, only_device());
}

// Every operator enters its tensor's device through a guard, and autograd's engine starts one
// thread for each device that a guard counts. The base class counts one, but answers every
// question about the current device and stream with device -1: backward then takes each gradient
// to come from another stream, and asks for an event.
struct FakeCudaGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return only_device(); }
  c10::Device exchangeDevice(c10::Device) const override { return only_device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return default_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return default_stream(); }
};

// What ATen asks of "CUDA" from code that is compiled without it.
struct FakeCudaHooks final : at::CUDAHooksInterface {
  explicit FakeCudaHooks(const at::CUDAHooksArgs&) {}

  void init() const override {}

  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  // Backward asks this of the device that it is about to work on.
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }

  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return kOnlyDevice; }
  c10::DeviceIndex getCurrentDevice() const override { return kOnlyDevice; }

  // With these, convolution and batch norm choose the cuDNN operators, whose saved tensors (the
  // reserve of cudnn_batch_norm, for one) differ from those of the native ones.
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return kCudnnVersion; }
  long versionRuntimeCuDNN() const override { return kCudnnVersion; }
  double batchnormMinEpsilonCuDNN() const override { return 0.0; }
};

std::unique_ptr<at::CUDAHooksInterface> make_hooks(at::CUDAHooksArgs arguments) {
  return std::make_unique<FakeCudaHooks>(arguments);
}

// Preferred over the hooks that a CUDA build of torch registers under the same name when it
// loads, which would look for a driver.
const c10::Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs>
    hooks_registration("CUDAHooks", c10::REGISTRY_PREFERRED, at::CUDAHooksRegistry(), make_hooks);

// Never destroyed: torch keeps the bare pointer for the life of the process.
const c10::impl::DeviceGuardImplRegistrar
    guard_registration(c10::DeviceType::CUDA, new FakeCudaGuard());

}  // namespace
