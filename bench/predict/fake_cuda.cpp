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

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
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

// -- which kernel scaled_dot_product_attention takes ------------------------------------------
//
// torch decides on the host, from shapes, types, the card's compute capability and the switches of
// torch.backends.cuda; without the decision of its CUDA part it would take the formula of matrix
// products, whose scores are held for backward. Rules as of 2.11 and 2.13 for CUDA 13.

int capability = 90;  // major * 10 + minor

struct Attention {
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const std::optional<at::Tensor>& mask;
  double dropout;
  bool causal;
  bool grouped;  // heads of keys and values may be fewer

  bool dense() const { return query.dim() == 4 && key.dim() == 4 && value.dim() == 4; }
  bool half() const { return query.scalar_type() == at::kHalf || brain(); }
  bool brain() const { return query.scalar_type() == at::kBFloat16; }
  bool one_type() const {
    return key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type();
  }
  bool learns() const {
    return query.requires_grad() || key.requires_grad() || value.requires_grad();
  }
  bool some_tokens() const { return query.size(2) != 0 && key.size(2) != 0; }
  bool lies_along_heads(bool or_one_wide) const {
    const bool along = query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1;
    const bool mask_along = !mask || mask->stride(-1) == 1;
    return (along || (or_one_wide && query.size(3) == 1)) && mask_along;
  }
  bool heads_match(bool keys_as_values) const {
    if (query.size(0) != key.size(0) || query.size(0) != value.size(0)) return false;
    const auto heads = query.size(1), of_keys = key.size(1), of_values = value.size(1);
    if (!grouped) return heads == of_keys && heads == of_values;
    if (keys_as_values && of_keys != of_values) return false;
    return of_keys && of_values && heads % of_keys == 0 && heads % of_values == 0;
  }
};

bool half_that_the_card_computes(const Attention& a) {
  return a.one_type() && (capability >= 80 ? a.half() : a.half() && !a.brain());
}

bool fits(int64_t side, int64_t wanted) { return side == wanted || side == 1; }

bool mask_fits(const Attention& a) {
  if (!a.mask) return true;
  const at::Tensor& mask = *a.mask;
  if (mask.requires_grad() || mask.dim() < 2) return false;
  if (!fits(mask.size(-2), a.query.size(2)) || !fits(mask.size(-1), a.key.size(2))) return false;
  if (mask.dim() == 2) return true;
  return mask.dim() == 4 && fits(mask.size(0), a.query.size(0)) &&
      fits(mask.size(1), a.query.size(1));
}

bool cudnn_takes(const Attention& a) {
  auto& switches = at::globalContext();
  if (!switches.userEnabledCuDNNSDP() || !a.dense()) return false;
  if (switches.deterministicAlgorithms() && !switches.deterministicAlgorithmsWarnOnly()) {
    return false;
  }
  if (capability < 80 || !half_that_the_card_computes(a) || !mask_fits(a)) return false;
#if TORCH_VERSION_MINOR > 11 || TORCH_VERSION_MAJOR > 2
  if (a.dropout * 16.0 != std::floor(a.dropout * 16.0)) return false;
#endif
  if (!a.some_tokens() || !a.lies_along_heads(true) || !a.heads_match(false)) return false;
  const auto wide = a.query.size(3), of_values = a.value.size(3);
  const bool newer = capability == 90 || capability / 10 == 10;
  const int64_t widest = newer ? 256 : 128;
  if (wide > widest || of_values > widest || wide % 8 || of_values % 8) return false;
  return a.key.size(2) != 1 && !(a.dropout != 0.0 && a.query.size(2) == 1);
}

bool flash_takes(const Attention& a) {
  if (!at::globalContext().userEnabledFlashSDP() || !a.dense() || a.mask) return false;
  const auto wide = a.query.size(3);
  if (wide != a.key.size(3) || wide != a.value.size(3) || wide > 256) return false;
  if (capability < 80 || !half_that_the_card_computes(a)) return false;
  const bool little_shared = (capability >= 86 && capability <= 89) || capability >= 120;
  if (a.learns() && little_shared && wide > 192 && (a.dropout > 0.0 || wide <= 224)) return false;
  if (a.causal && a.query.size(2) != a.key.size(2)) return false;
  return a.heads_match(true) && a.some_tokens() && a.lies_along_heads(true);
}

bool efficient_takes(const Attention& a) {
  if (!at::globalContext().userEnabledMemEfficientSDP() || !a.dense()) return false;
  const bool tensor_cores = capability >= 80 || (capability >= 70 && a.half());
  int64_t side = capability >= 80 ? 4 : 1;
  if (tensor_cores) side = std::max<int64_t>(side, a.half() ? 8 : 4);
  const auto wide = a.query.size(3), of_values = a.value.size(3);
  if (wide != a.key.size(3) || wide % side || wide == 0 || of_values % side || of_values == 0) {
    return false;
  }
  if (!a.some_tokens() || !a.lies_along_heads(false)) return false;
  const Attention ungrouped{a.query, a.key, a.value, a.mask, a.dropout, a.causal, false};
  if (!ungrouped.heads_match(true)) return false;
  const bool single = a.query.scalar_type() == at::kFloat && a.one_type();
  return single || half_that_the_card_computes(a);
}

std::array<at::SDPBackend, at::num_sdp_backends> wanted_order() {
  auto order = at::globalContext().sDPPriorityOrder();
  const char* kept_back = std::getenv("TORCH_CUDNN_SDPA_DEPRIORITIZED");
  const bool cudnn_first = (capability / 10 == 9 || capability / 10 == 10) &&
      !(kept_back && std::string(kept_back) == "1");
  const bool untouched = order[0] == at::SDPBackend::flash_attention &&
      order[1] == at::SDPBackend::efficient_attention && order[2] == at::SDPBackend::math;
  if (cudnn_first && untouched) {
    auto cudnn = std::find(order.begin(), order.end(), at::SDPBackend::cudnn_attention);
    std::rotate(order.begin(), cudnn, cudnn + 1);
  }
  return order;
}

int64_t chosen_kernel(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double>,
    bool grouped) {
  const Attention a{query, key, value, mask, dropout, causal, grouped};
  for (const auto kernel : wanted_order()) {
    const bool takes = kernel == at::SDPBackend::cudnn_attention ? cudnn_takes(a)
        : kernel == at::SDPBackend::flash_attention              ? flash_takes(a)
        : kernel == at::SDPBackend::efficient_attention          ? efficient_takes(a)
        : kernel == at::SDPBackend::math && at::globalContext().userEnabledMathSDP();
    if (takes) return static_cast<int64_t>(kernel);
  }
  TORCH_CHECK(false, "No available kernel. Aborting execution.");
}

}  // namespace

// To be called once torch is there: a CUDA build of torch registers its own choice as it loads,
// which would ask the driver.
extern "C" void fake_cuda_card(int major, int minor) {
  capability = major * 10 + minor;
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&chosen_kernel);
}
