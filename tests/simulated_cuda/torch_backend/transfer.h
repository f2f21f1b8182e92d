// Moving the elements of strided device tensors to and from pinned host memory, on torch's current stream.
// Only bytes that belong to elements are touched as long as that takes few copies, so that what another stream does to
// the gaps between them is not mistaken for a race.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_backend {

// A CPU tensor in pinned memory with a device tensor's strides and elements. Waits for the copy.
at::Tensor download(const at::Tensor& device);

// A CPU tensor in pinned memory to be filled with what the device tensor is to hold, then given to upload().
at::Tensor image_to_fill(const at::Tensor& device);

// Copies an image to its device tensor without waiting; the image's memory may be released at once.
void upload(const at::Tensor& image, const at::Tensor& device);

// Copies between tensors of one type and layout of which at least one is on the device, without waiting.
// A host tensor has to be pinned.
void copy_dense(const at::Tensor& destination, const at::Tensor& source);

// Sets all bytes of a dense device tensor without waiting.
void set_bytes(const at::Tensor& device, unsigned char value);

}  // namespace torch_backend
