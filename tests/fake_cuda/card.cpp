// What a build of torch for CPUs lacks to run autograd over tensors that say they are on a CUDA device: a device guard
// that does nothing, hooks that say there is one device, and the choice of the attention kernel.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kCard(DeviceType::CUDA, 0);

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kCard; }
  Device getDevice() const override { return kCard; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kCard); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, kCard); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kCard); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kCard); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

Guard guard;
c10::impl::DeviceGuardImplRegistrar registered_guard(DeviceType::CUDA, &guard);

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  bool isPinnedPtr(const void*) const override { return false; }
};

// The rule of a CUDA build on cards since the RTX 30xx: flash attention for half precision and heads up to 256 wide
// without a mask, memory-efficient attention for the rest.
int64_t attention(const at::Tensor& query, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>& mask,
                  double, bool, std::optional<double>, bool) {
  const auto type = query.scalar_type();
  const bool half = type == at::kHalf || type == at::kBFloat16;
  const bool flash = half && query.size(-1) <= 256 && !(mask.has_value() && mask->defined());
  return static_cast<int64_t>(flash ? sdp::SDPBackend::flash_attention : sdp::SDPBackend::efficient_attention);
}

}  // namespace

namespace at {
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

namespace native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &attention)
}  // namespace native
}  // namespace at
