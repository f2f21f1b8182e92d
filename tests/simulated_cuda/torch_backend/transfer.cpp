#include "transfer.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "driver.h"
#include "memory.h"
#include "streams.h"

namespace torch_backend {

namespace {

// More runs than this are copied as one span: the race detector compares every copy with every other.
constexpr int64_t kMaxRuns = 256;

struct Dimension {
  int64_t size;
  int64_t stride;  // in bytes
};

// The elements of a tensor as equal runs of bytes: one at each index of the outer dimensions.
struct Runs {
  std::vector<Dimension> outer;  // the innermost first
  int64_t bytes = 0;
  int64_t count = 1;
  int64_t span = 0;  // from the first byte to the end of the last

  bool scattered() const { return count > kMaxRuns; }
};

Runs runs_of(const at::Tensor& tensor) {
  Runs runs;
  runs.bytes = runs.span = tensor.element_size();
  std::vector<Dimension> dimensions;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d) != 0) {  // others are the same bytes again
      dimensions.push_back({tensor.size(d), tensor.stride(d) * tensor.element_size()});
    }
  }
  std::sort(dimensions.begin(), dimensions.end(), [](auto a, auto b) { return a.stride < b.stride; });
  for (const Dimension& dimension : dimensions) {
    runs.span += (dimension.size - 1) * dimension.stride;
    if (runs.outer.empty() && dimension.stride == runs.bytes) {
      runs.bytes *= dimension.size;
    } else {
      runs.outer.push_back(dimension);
      runs.count *= dimension.size;
    }
  }
  return runs;
}

// Calls visit(offset, bytes) for each run, or once for the whole span if there are too many.
template <typename Visit>
void for_each_run(const Runs& runs, Visit visit) {
  if (runs.scattered()) {
    visit(int64_t{0}, static_cast<size_t>(runs.span));
    return;
  }
  for (int64_t index = 0; index < runs.count; ++index) {
    int64_t offset = 0;
    int64_t rest = index;
    for (const Dimension& dimension : runs.outer) {
      offset += rest % dimension.size * dimension.stride;
      rest /= dimension.size;
    }
    visit(offset, static_cast<size_t>(runs.bytes));
  }
}

DeviceAddress address_of(const at::Tensor& tensor) { return reinterpret_cast<DeviceAddress>(tensor.const_data_ptr()); }

at::Tensor make_image(const at::Tensor& device, const Runs& runs) {
  const auto bytes = static_cast<size_t>(runs.span);
  const c10::Storage storage(c10::Storage::use_byte_size_t{}, bytes, pinned_allocator().allocate(bytes),
                             &pinned_allocator(), /*resizable=*/false);
  at::Tensor image = at::empty({0}, device.options().device(at::kCPU));
  image.set_(storage, 0, device.sizes(), device.strides());
  image._set_conj(device.is_conj());
  image._set_neg(device.is_neg());
  return image;
}

void download_into(const at::Tensor& image, const at::Tensor& device, const Runs& runs) {
  const c10::Stream stream = current_stream(device.get_device());
  const DeviceScope scope(device.get_device());
  auto* to = static_cast<std::byte*>(image.mutable_data_ptr());
  for_each_run(runs, [&](int64_t offset, size_t bytes) {
    const DeviceAddress from = address_of(device) + static_cast<DeviceAddress>(offset);
    check(driver().copy_to_host(to + offset, from, bytes, handle(stream.id())), "cuMemcpyDtoHAsync");
  });
  synchronize_stream(stream);
  if (driver().host_read != nullptr) {
    driver().host_read(to, static_cast<size_t>(runs.span), "torch");
  }
}

}  // namespace

at::Tensor download(const at::Tensor& device) {
  const Runs runs = runs_of(device);
  const at::Tensor image = make_image(device, runs);
  download_into(image, device, runs);
  return image;
}

at::Tensor image_to_fill(const at::Tensor& device) {
  const Runs runs = runs_of(device);
  const at::Tensor image = make_image(device, runs);
  if (runs.scattered()) {  // upload() writes the gaps back
    download_into(image, device, runs);
  }
  return image;
}

void upload(const at::Tensor& image, const at::Tensor& device) {
  const Runs runs = runs_of(device);
  const c10::Stream stream = current_stream(device.get_device());
  const DeviceScope scope(device.get_device());
  const auto* from = static_cast<const std::byte*>(image.const_data_ptr());
  if (driver().host_write != nullptr) {
    driver().host_write(from, static_cast<size_t>(runs.span), "torch");
  }
  record_use(from, stream);
  for_each_run(runs, [&](int64_t offset, size_t bytes) {
    const DeviceAddress to = address_of(device) + static_cast<DeviceAddress>(offset);
    check(driver().copy_to_device(to, from + offset, bytes, handle(stream.id())), "cuMemcpyHtoDAsync");
  });
}

void copy_dense(const at::Tensor& destination, const at::Tensor& source) {
  const at::Tensor& on_device = destination.is_cuda() ? destination : source;
  const c10::Stream stream = current_stream(on_device.get_device());
  const DeviceScope scope(on_device.get_device());
  const auto bytes = static_cast<size_t>(source.numel() * source.element_size());
  if (source.is_cpu()) {
    record_use(source.storage().data(), stream);
    check(driver().copy_to_device(address_of(destination), source.const_data_ptr(), bytes, handle(stream.id())),
          "cuMemcpyHtoDAsync");
  } else if (destination.is_cpu()) {
    record_use(destination.storage().data(), stream);
    check(driver().copy_to_host(destination.mutable_data_ptr(), address_of(source), bytes, handle(stream.id())),
          "cuMemcpyDtoHAsync");
  } else {
    check(driver().copy_on_device(address_of(destination), address_of(source), bytes, handle(stream.id())),
          "cuMemcpyDtoDAsync");
  }
}

void set_bytes(const at::Tensor& device, unsigned char value) {
  const c10::Stream stream = current_stream(device.get_device());
  const DeviceScope scope(device.get_device());
  const auto bytes = static_cast<size_t>(device.numel() * device.element_size());
  check(driver().set_bytes(address_of(device), value, bytes, handle(stream.id())), "cuMemsetD8Async");
}

}  // namespace torch_backend
