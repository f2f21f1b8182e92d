// The kernels under torch's CUDA key: what has to know where device memory is. Views take torch's own kernels, which
// touch no memory; everything else falls back to the CPU (fallback.cpp).
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "fallback.h"
#include "memory.h"
#include "streams.h"
#include "transfer.h"

namespace torch_backend {

namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// Factories

c10::Device device_or_current(std::optional<c10::Device> device) {
  const bool chosen = device.has_value() && device->has_index();
  return {c10::DeviceType::CUDA, chosen ? device->index() : current_device()};
}

void refuse_pinned(std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout> /*layout*/,
                 std::optional<at::Device> device, std::optional<bool> pin_memory,
                 std::optional<at::MemoryFormat> format) {
  refuse_pinned(pin_memory);
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, &device_allocator(), kKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                         std::optional<bool> pin_memory) {
  refuse_pinned(pin_memory);
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator(), kKeys, c10::dtype_or_default(type));
}

// Copies

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.strides() == b.strides() && a.is_conj() == b.is_conj() &&
         a.is_neg() == b.is_neg() && a.is_non_overlapping_and_dense();
}

// Whether one driver call can do a copy; between devices it goes by way of the host.
bool is_direct(const at::Tensor& destination, const at::Tensor& source) {
  if (!same_layout(destination, source)) {
    return false;
  }
  if (destination.is_cpu() || source.is_cpu()) {
    return (destination.is_cpu() ? destination : source).is_pinned();
  }
  return destination.device() == source.device();
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& given, bool non_blocking) {
  if (self.is_same(given)) {
    return self;
  }
  const at::Tensor source = given.sizes() == self.sizes() ? given : given.expand(self.sizes());
  if (self.numel() == 0) {
    return self;
  }
  const bool with_host = self.is_cpu() || source.is_cpu();
  if (is_direct(self, source)) {
    copy_dense(self, source);
  } else {
    const at::Tensor on_host = source.is_cpu() ? source : download(source);
    if (self.is_cpu()) {
      return self.copy_(on_host);
    }
    const at::Tensor image = image_to_fill(self);
    image.copy_(on_host);
    upload(image, self);
  }
  if (with_host && !non_blocking) {
    synchronize_stream(current_stream((self.is_cpu() ? source : self).get_device()));
  }
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  at::Tensor to = destination;
  return copy_(to, source, non_blocking);
}

at::Tensor& fill_scalar(at::Tensor& self, const at::Scalar& value) {
  if (self.numel() == 0) {
    return self;
  }
  const at::Tensor element = at::full({}, value, self.options().device(at::kCPU));
  const auto* bytes = static_cast<const unsigned char*>(element.const_data_ptr());
  const bool uniform = std::all_of(bytes, bytes + element.element_size(), [&](auto byte) { return byte == *bytes; });
  if (uniform && self.is_non_overlapping_and_dense() && !self.is_conj() && !self.is_neg()) {
    set_bytes(self, *bytes);
    return self;
  }
  const at::Tensor image = image_to_fill(self);
  image.fill_(value);
  upload(image, self);
  return self;
}

at::Tensor& zero_(at::Tensor& self) { return fill_scalar(self, 0); }

// Storage

void grow_storage(const c10::Storage& storage, size_t bytes) {
  if (bytes > storage.nbytes()) {
    resize_storage(storage, bytes);
  }
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  at::TensorImpl* impl = self.unsafeGetTensorImpl();
  const auto offset = static_cast<size_t>(self.storage_offset());
  grow_storage(self.storage(),
               at::detail::computeStorageNbytesContiguous(size, static_cast<size_t>(self.element_size()), offset));
  if (self.sizes() != size) {
    impl->set_sizes_contiguous(size);
  }
  if (format.has_value() && *format != at::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& destination) {
  if (destination.sizes() != source.sizes()) {
    destination.resize_(source.sizes());
    if (source.is_non_overlapping_and_dense()) {  // an operator chooses the layout of an output that it resizes
      destination.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides());
    }
  }
  return copy_from(source, destination, /*non_blocking=*/true);
}

at::Tensor& set_storage_part(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                             at::IntArrayRef stride) {
  at::native::checkSetStorage(self, source, offset, size, stride, /*check_offset_in_bounds=*/false);
  at::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  grow_storage(source, at::detail::computeStorageNbytes(self.sizes(), self.strides(), impl->itemsize(),
                                                        static_cast<size_t>(offset)));
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / static_cast<size_t>(self.element_size()));
  return set_storage_part(self, std::move(source), 0, {elements}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_empty(at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t{}, 0, device_allocator().allocate(0),
                                        &device_allocator(), /*resizable=*/true));
}

void record_stream(at::Tensor& self, at::Stream stream) { record_use(self.storage().data(), stream); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  replace_real_kernels();
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("fill_.Scalar", fill_scalar);
  m.impl("zero_", zero_);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage_part);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_empty);
  m.impl("record_stream", record_stream);

  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("is_set_to", at::native::is_set_to);
}

}  // namespace torch_backend
