// Every operator without a kernel of its own: its tensors are copied to the CPU, it runs there, and what it wrote or
// returned is copied to the device. Where a real GPU would refuse tensors of several devices, so does this.
#include <ATen/native/CPUFallback.h>
#include <torch/library.h>

#include <optional>
#include <string>

namespace torch_backend {

namespace {

// Indices may be on the host while the tensor that they select from is on a device.
bool takes_several_devices(const std::string& name) { return name.find("index") != std::string::npos; }

void check_same_device(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::optional<c10::Device> device;
  for (const c10::IValue& argument : torch::jit::last(stack, op.schema().arguments().size())) {
    // A 0-d tensor on the host is a number.
    if (!argument.isTensor() || !argument.toTensor().defined() ||
        (argument.toTensor().is_cpu() && argument.toTensor().dim() == 0)) {
      continue;
    }
    const c10::Device other = argument.toTensor().device();
    TORCH_CHECK(!device.has_value() || *device == other,
                "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                other, "! (in ", op.schema().name(), ")");
    device = other;
  }
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (!takes_several_devices(op.schema().name())) {
    check_same_device(op, *stack);
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

}  // namespace torch_backend
