// Running operators on the CPU for the simulated devices.
#pragma once

namespace torch_backend {

// A CUDA build of torch has kernels of its own for real devices, which nothing here can run: all are replaced by the
// fallback. To be called before the kernels that know the simulated devices are registered, as the latest one counts.
void replace_real_kernels();

}  // namespace torch_backend
