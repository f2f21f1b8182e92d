// Device memory and pinned host memory. As with torch's caching allocators freeing waits for nothing: the memory is
// given back once the streams that use it have come past the point at which it was freed. Device memory goes back to
// the driver then, so that the simulator sees every use after that; pinned memory is kept for the next allocation,
// since the driver waits for all devices when it takes it back, which torch spares its users too.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <cstddef>

namespace torch_backend {

struct MemoryUse {
  size_t current = 0;
  size_t peak = 0;
};

// Allocates on the current device, for the stream that is current there.
c10::Allocator& device_allocator();

c10::Allocator& pinned_allocator();

// Gives a device storage other memory, with as much of what it held as fits.
void resize_storage(const c10::Storage& storage, size_t bytes);

// Tells that a stream uses an allocation of either kind; `begin` is its first byte.
void record_use(const void* begin, c10::Stream stream);

// Whether the driver knows the address as host memory that copies may read and write asynchronously.
bool is_pinned(const void* address);

// Gives back what was freed and is no longer in use.
void reap();

// How many pinned allocations are kept for later ones.
size_t kept_allocations();

MemoryUse memory_use(c10::DeviceIndex device);
void reset_peak(c10::DeviceIndex device);

}  // namespace torch_backend
