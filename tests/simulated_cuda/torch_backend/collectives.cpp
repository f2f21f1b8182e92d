#include "collectives.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

namespace torch_backend {

namespace {

// Copies of device tensors on the host, to stand in for them while an operator runs.
class StandIns {
 public:
  // The value with each device tensor in it, however deep in lists, replaced.
  c10::IValue on_host(const c10::IValue& value) {
    return map(value, [this](const at::Tensor& device) {
      pairs_.emplace_back(device, device.cpu());
      return pairs_.back().second;
    });
  }

  // The value with each stand-in replaced by the tensor for which it stands.
  c10::IValue on_device(const c10::IValue& value) const {
    return map(value, [this](const at::Tensor& host) {
      for (const auto& [device, stand_in] : pairs_) {
        if (host.is_same(stand_in)) {
          return device;
        }
      }
      return host;
    });
  }

  void copy_back() const {
    for (const auto& [device, host] : pairs_) {
      device.copy_(host);
    }
  }

 private:
  template <typename Replace>
  static c10::IValue map(const c10::IValue& value, const Replace& replace) {
    if (value.isTensor()) {
      return value.toTensor().defined() ? c10::IValue(replace(value.toTensor())) : value;
    }
    if (value.isTensorList()) {
      std::vector<at::Tensor> tensors = value.toTensorVector();
      for (at::Tensor& tensor : tensors) {
        tensor = replace(tensor);
      }
      return tensors;
    }
    if (value.isList() && value.toListRef().size() > 0 && value.toListRef()[0].isTensorList()) {
      std::vector<std::vector<at::Tensor>> lists;
      for (const c10::IValue& list : value.toListRef()) {
        lists.push_back(map(list, replace).toTensorVector());
      }
      return lists;
    }
    return value;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  StandIns stand_ins;
  for (size_t i = op.schema().arguments().size(); i > 0; --i) {
    c10::IValue& argument = torch::jit::peek(*stack, 0, i);
    argument = stand_ins.on_host(argument);
  }
  op.callBoxed(stack);
  stack->back().toCustomClass<c10d::Work>()->wait();  // the last result of every collective
  stand_ins.copy_back();
  for (size_t i = op.schema().returns().size(); i > 0; --i) {
    c10::IValue& result = torch::jit::peek(*stack, 0, i);
    result = stand_ins.on_device(result);
  }
}

}  // namespace

void install_collectives() {
  // A CPU build has kernels for the device as well. They would have gloo read device memory; torch warns of replacing
  // them, which is just what is wanted.
  class Silence final : public c10::WarningHandler {
    void process(const c10::Warning& /*warning*/) override {}
  } silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  static torch::Library library(torch::Library::IMPL, "c10d", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (const char* name : {"_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_",
                           "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_", "alltoall_",
                           "alltoall_base_", "barrier", "broadcast_", "gather_", "recv_", "recv_any_source_", "reduce_",
                           "reduce_scatter_", "reduce_scatter_tensor_coalesced_", "scatter_", "send"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

}  // namespace torch_backend
