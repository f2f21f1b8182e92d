#include "memory.h"

#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "driver.h"
#include "streams.h"

namespace torch_backend {

namespace {

constexpr unsigned kPortable = 1;    // CU_MEMHOSTALLOC_PORTABLE: pinned for every context
constexpr int kMemoryType = 2;       // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
constexpr unsigned kHostMemory = 1;  // CU_MEMORYTYPE_HOST
constexpr size_t kMostKept = size_t{256} << 20;

enum class Kind { kDevice, kPinned };

struct Block {
  Kind kind;
  size_t bytes;
  c10::DeviceIndex device;
  std::vector<c10::Stream> users;
};

struct Retired {
  void* begin;
  Block block;
  std::vector<std::pair<c10::DeviceIndex, Handle>> events;  // of its users, when it was freed
};

std::mutex mutex;  // guards all that follows
std::unordered_map<const void*, Block> blocks;
std::vector<Retired> retired;
std::multimap<size_t, void*> kept;  // pinned memory that is idle, by size
size_t kept_bytes = 0;
std::array<MemoryUse, kMaxDevices> use;

// What is freed goes here; `retired` comes before its events, so that an error leaves it to be given back later.
void retire(void* begin) {
  if (begin == nullptr || in_bad_fork()) {
    return;
  }
  const std::lock_guard lock(mutex);
  Retired& last = retired.emplace_back(Retired{begin, std::move(blocks.extract(begin).mapped()), {}});
  if (last.block.kind == Kind::kDevice) {
    use.at(static_cast<size_t>(last.block.device)).current -= last.block.bytes;
  }
  try {
    for (const c10::Stream stream : last.block.users) {
      const DeviceScope scope(stream.device_index());
      Handle event = nullptr;
      check(driver().create_event(&event, kDisableTiming), "cuEventCreate");
      last.events.emplace_back(stream.device_index(), event);
      check(driver().record_event(event, handle(stream.id())), "cuEventRecord");
    }
  } catch (const c10::Error&) {
    // A deleter has nobody to report to. The driver failed, so whoever uses it next learns of it.
  }
}

bool is_done(const Retired& block) {
  return std::all_of(block.events.begin(), block.events.end(), [](const auto& event) {
    const DeviceScope scope(event.first);
    return driver().query_event(event.second) != kNotReady;
  });
}

bool give_back(const Retired& gone) {
  const DeviceScope scope(gone.block.device);
  if (gone.block.kind == Kind::kDevice) {
    return driver().free(reinterpret_cast<DeviceAddress>(gone.begin)) == kSuccess;
  }
  if (kept_bytes + gone.block.bytes <= kMostKept) {
    kept.emplace(gone.block.bytes, gone.begin);
    kept_bytes += gone.block.bytes;
    return true;
  }
  return driver().free_host(gone.begin) == kSuccess;
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::DeviceIndex index = current_device();
    const c10::Device device(c10::DeviceType::CUDA, index);
    if (bytes == 0) {
      return {nullptr, device};
    }
    reap();
    const DeviceScope scope(index);
    DeviceAddress address = 0;
    int status = driver().allocate(&address, bytes);
    if (status == kOutOfMemory) {  // what was freed may only be waiting for its streams
      synchronize_device(index);
      reap();
      status = driver().allocate(&address, bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, status != kOutOfMemory, "CUDA out of memory. Tried to allocate ", bytes,
                     " bytes on GPU ", int{index}, ".");
    check(status, "cuMemAlloc");
    void* begin = reinterpret_cast<void*>(address);
    const std::lock_guard lock(mutex);
    blocks[begin] = {Kind::kDevice, bytes, index, {current_stream(index)}};
    MemoryUse& of_device = use.at(static_cast<size_t>(index));
    of_device.current += bytes;
    of_device.peak = std::max(of_device.peak, of_device.current);
    return {begin, begin, &retire, device};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &retire; }

  void copy_data(void* destination, const void* source, size_t bytes) const override {
    const c10::Stream stream = current_stream(current_device());
    const DeviceScope scope(stream.device_index());
    check(driver().copy_on_device(reinterpret_cast<DeviceAddress>(destination), reinterpret_cast<DeviceAddress>(source),
                                  bytes, handle(stream.id())),
          "cuMemcpyDtoDAsync");
  }
};

// Few sizes, so that what is kept fits what is wanted.
size_t rounded(size_t bytes) {
  constexpr size_t kLarge = size_t{1} << 20;
  if (bytes > kLarge) {
    return (bytes + kLarge - 1) / kLarge * kLarge;
  }
  size_t size = 512;
  while (size < bytes) {
    size *= 2;
  }
  return size;
}

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) {
      return {nullptr, cpu};
    }
    reap();
    const c10::DeviceIndex device = current_device();
    const size_t size = rounded(bytes);
    const DeviceScope scope(device);
    const std::lock_guard lock(mutex);
    void* begin = nullptr;
    if (const auto found = kept.find(size); found != kept.end()) {
      begin = found->second;
      kept.erase(found);
      kept_bytes -= size;
    } else {
      check(driver().allocate_host(&begin, size, kPortable), "cuMemHostAlloc");
    }
    blocks[begin] = {Kind::kPinned, size, device, {}};
    return {begin, begin, &retire, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &retire; }

  void copy_data(void* destination, const void* source, size_t bytes) const override {
    std::memcpy(destination, source, bytes);
  }
};

}  // namespace

c10::Allocator& device_allocator() {
  static DeviceAllocator allocator;
  return allocator;
}

c10::Allocator& pinned_allocator() {
  static PinnedAllocator allocator;
  return allocator;
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  const c10::DeviceGuard guard(storage.device());
  c10::DataPtr other = device_allocator().allocate(bytes);
  if (const size_t held = std::min(bytes, storage.nbytes()); held != 0) {
    device_allocator().copy_data(other.get(), storage.data(), held);
  }
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(other));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

void record_use(const void* begin, c10::Stream stream) {
  const std::lock_guard lock(mutex);
  const auto block = blocks.find(begin);
  if (block == blocks.end()) {
    return;
  }
  std::vector<c10::Stream>& users = block->second.users;
  if (std::find(users.begin(), users.end(), stream) == users.end()) {
    users.push_back(stream);
  }
}

bool is_pinned(const void* address) {
  // As in torch: the question creates no context, and before the first one nothing is pinned.
  if (!has_context(current_device())) {
    return false;
  }
  const DeviceScope scope(current_device());
  unsigned type = 0;
  // The driver refuses addresses that it does not know.
  return driver().pointer_attribute(&type, kMemoryType, reinterpret_cast<DeviceAddress>(address)) == kSuccess &&
         type == kHostMemory;
}

void reap() {
  const std::lock_guard lock(mutex);
  for (size_t i = 0; i < retired.size();) {
    if (!is_done(retired[i]) || !give_back(retired[i])) {
      ++i;
      continue;
    }
    for (const auto& [device, event] : retired[i].events) {
      const DeviceScope scope(device);
      driver().destroy_event(event);
    }
    std::swap(retired[i], retired.back());
    retired.pop_back();
  }
}

size_t kept_allocations() {
  const std::lock_guard lock(mutex);
  return kept.size();
}

MemoryUse memory_use(c10::DeviceIndex device) {
  const std::lock_guard lock(mutex);
  return use.at(static_cast<size_t>(device));
}

void reset_peak(c10::DeviceIndex device) {
  const std::lock_guard lock(mutex);
  MemoryUse& of_device = use.at(static_cast<size_t>(device));
  of_device.peak = of_device.current;
}

}  // namespace torch_backend
