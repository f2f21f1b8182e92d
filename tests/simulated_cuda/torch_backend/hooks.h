// The hooks by which torch's CPU code asks for CUDA: is there a device, pinned memory, whose is this pointer.
#pragma once

namespace torch_backend {

void install_hooks();

}  // namespace torch_backend
