// Every operator without a kernel of its own: its tensors are copied to the CPU, it runs there, and what it wrote or
// returned is copied to the device. Where a real GPU would refuse tensors of several devices, so does this.
#include "fallback.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUFallback.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

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

void replace_real_kernels() {
  // Which kernels are replaced is no news.
  struct Silence final : c10::WarningHandler {
    void process(const c10::Warning& /*warning*/) override {}
  } silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  // Never destroyed: the dispatcher may be gone by then.
  static auto& registrations = *new std::vector<c10::RegistrationHandleRAII>;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const std::optional<c10::OperatorHandle> op = dispatcher.findOp(name);
    if (name.getNamespace() == "aten" && op && op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
      registrations.push_back(dispatcher.registerImpl(name, c10::DispatchKey::CUDA,
                                                      c10::KernelFunction::makeFromBoxedFunction<&run_on_cpu>(), {}, {},
                                                      "of the simulated devices"));
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

}  // namespace torch_backend
