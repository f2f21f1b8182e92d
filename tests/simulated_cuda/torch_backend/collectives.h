// Collectives of device tensors by way of the host, so that gloo serves CUDA meshes as well.
#pragma once

namespace torch_backend {

void install_collectives();

}  // namespace torch_backend
