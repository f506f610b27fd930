// A GPU that is the host, for a torch without CUDA: tensors on the device "cuda" lie in the host's memory, and what
// operators do with them is what the CPU's do. To be loaded before torch, one of whose functions it replaces.
//
// Like a real GPU it refuses operators that are given tensors on different devices, and, where it is told to, what
// would have to wait for it.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;

const c10::Device kGPU(c10::DeviceType::CUDA, 0);

// One device with one stream, on which everything has happened once it was called.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kGPU; }
  c10::Device exchangeDevice(c10::Device) const override { return kGPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kGPU); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kGPU); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    return {data, data, raw_deleter(), kGPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};
Allocator allocator;

// Host memory that counts as page-locked.
struct PinnedAllocator final : c10::Allocator {
  static inline std::set<const void*> pinned;
  static inline std::mutex mutex;

  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    pinned.insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    pinned.erase(data);
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
  static bool holds(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    return pinned.count(data) > 0;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};
PinnedAllocator pinned_allocator;

// The same memory as a tensor of the other device.
Tensor moved(const Tensor& tensor, c10::Device device) {
  if (!tensor.defined() || tensor.device() == device) {
    return tensor;
  }
  const bool to_gpu = device == kGPU;
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(
      storage.mutable_data(), new c10::Storage(storage), [](void* kept) { delete static_cast<c10::Storage*>(kept); },
      device);
  c10::Allocator* resizes = to_gpu ? static_cast<c10::Allocator*>(&allocator) : c10::GetCPUAllocator();
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), resizes, true),
      c10::DispatchKeySet(to_gpu ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

std::vector<Tensor> tensors_in(const IValue& value) {
  if (value.isTensor()) {
    return {value.toTensor()};
  }
  if (value.isTensorList()) {
    return value.toTensorVector();
  }
  std::vector<Tensor> found;
  if (value.isOptionalTensorList()) {
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      found.push_back(tensor.value_or(Tensor()));
    }
  }
  return found;
}

IValue moved(const IValue& value, c10::Device device) {
  if (value.isTensor()) {
    return moved(value.toTensor(), device);
  }
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) {
      list.push_back(moved(tensor, device));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional<Tensor>(moved(*tensor, device)) : std::nullopt);
    }
    return list;
  }
  return value.isDevice() ? IValue(device) : value;
}

bool waiting_is_an_error = false;

void wait(const std::string& operation) {
  TORCH_CHECK(!waiting_is_an_error, "called a synchronizing CUDA operation: ", operation);
}

// As torch on a GPU: scalars may be on the host, and so may indices, which are copied.
void check_devices(const std::string& operation, const std::vector<IValue>& arguments) {
  bool on_gpu = false, on_host = false;
  for (const IValue& argument : arguments) {
    for (const Tensor& tensor : tensors_in(argument)) {
      on_gpu |= tensor.defined() && tensor.is_cuda();
      on_host |= tensor.defined() && tensor.is_cpu() && (tensor.dim() > 0 || operation.rfind("aten::", 0) != 0);
    }
  }
  if (operation == "aten::index" || operation == "aten::index_put_" || operation == "aten::_index_put_impl_") {
    if (on_gpu && on_host) {
      wait(operation);
    }
    return;
  }
  TORCH_CHECK(!on_gpu || !on_host || operation == "aten::set_", "Expected all tensors to be on the same device, but ",
              operation, " was given some on the CPU");
}

// What has as many elements as the values say.
constexpr std::array<std::string_view, 4> kSizedByValues = {"aten::nonzero", "aten::masked_select", "aten::_unique2",
                                                            "aten::unique_consecutive"};

// The result behind an argument that the operator writes to, which it may have resized.
IValue written(const IValue& argument, const IValue& on_host) {
  if (argument.isTensor() && argument.toTensor().is_cuda()) {
    const Tensor &tensor = argument.toTensor(), &result = on_host.toTensor();
    if (result.sizes() != tensor.sizes() || result.data_ptr() != tensor.data_ptr()) {
      c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
      impl->set_storage_and_dtype(moved(result, kGPU).storage(), tensor.dtype());
      impl->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    }
  }
  return argument;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::vector<IValue> arguments(stack->end() - schema.arguments().size(), stack->end());
  stack->erase(stack->end() - schema.arguments().size(), stack->end());
  const std::string& name = schema.name();
  if (name == "aten::copy_") {
    const bool crosses = arguments[0].toTensor().device() != arguments[1].toTensor().device();
    if (crosses && !arguments[2].toBool()) {
      wait(name);
    }
  } else {
    check_devices(name, arguments);
    if (std::find(kSizedByValues.begin(), kSizedByValues.end(), name) != kSizedByValues.end()) {
      wait(name);
    }
  }
  torch::jit::Stack results;
  for (const IValue& argument : arguments) {
    results.push_back(moved(argument, c10::Device(c10::kCPU)));
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &results);
  for (size_t index = 0; index < schema.returns().size(); ++index) {
    const c10::AliasInfo* alias = schema.returns()[index].alias_info();
    IValue result = moved(results[index], kGPU);
    for (size_t k = 0; alias != nullptr && alias->isWrite() && k < arguments.size(); ++k) {
      const c10::AliasInfo* from = schema.arguments()[k].alias_info();
      if (from != nullptr && from->beforeSets() == alias->beforeSets()) {
        result = written(arguments[k], results[index]);
      }
    }
    stack->push_back(result);
  }
}

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

// Views share their base's storage, which a tensor made for the host would not.
Tensor as_strided(const Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef sizes) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

at::Scalar value_of(const Tensor& self) {
  wait("aten::_local_scalar_dense");
  return at::_local_scalar_dense(moved(self, c10::Device(c10::kCPU)));
}

// Only a GPU multiplies 16-bit matrices into a float32 one.
Tensor& addmm_into_wide(const Tensor& self, const Tensor& left, const Tensor& right, at::ScalarType dtype,
                        const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  return out.copy_(at::addmm(self, left.to(dtype), right.to(dtype), beta, alpha));
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("_local_scalar_dense", value_of);
  library.impl("addmm.dtype_out", addmm_into_wide);
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::holds(data); }
};

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace accelerator
}  // namespace at

// As torch.cuda.set_sync_debug_mode("error"), or "default".
extern "C" void let_waiting_be_an_error(bool is_error) { waiting_is_an_error = is_error; }

// The operators of a library that was loaded since: on the host too, also where they have a version for a real GPU.
extern "C" void run_library_on_host(const char* prefix) {
  static std::vector<c10::RegistrationHandleRAII> kept;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind(prefix, 0) == 0) {
      kept.push_back(c10::Dispatcher::singleton().registerImpl(
          name, c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&run_on_host>(), std::nullopt,
          nullptr, "on the host"));
    }
  }
}
