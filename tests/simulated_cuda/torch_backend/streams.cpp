#include "streams.h"

#include <c10/util/Exception.h>

#include <array>
#include <mutex>
#include <utility>
#include <vector>

#include "driver.h"

namespace torch_backend {

namespace {

constexpr size_t kStreamsOfPool = 32;  // of torch's own pools
constexpr unsigned kNonBlocking = 1;   // CU_STREAM_NON_BLOCKING: no implicit order with the default stream, as in torch

thread_local c10::DeviceIndex this_device = 0;
thread_local std::array<c10::StreamId, kMaxDevices> streams{};

struct Pool {
  std::vector<c10::StreamId> streams;
  size_t next = 0;
};

std::mutex pools_mutex;
std::array<Pool, kMaxDevices> pools;

c10::Stream make_stream(c10::DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::DeviceType::CUDA, device), id);
}

}  // namespace

c10::DeviceIndex current_device() { return this_device; }

c10::DeviceIndex exchange_device(c10::DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal ", int{device});
  return std::exchange(this_device, device);
}

c10::Stream current_stream(c10::DeviceIndex device) {
  const c10::DeviceIndex index = device < 0 ? this_device : device;
  return make_stream(index, streams.at(static_cast<size_t>(index)));
}

c10::Stream exchange_stream(c10::Stream stream) {
  const c10::DeviceIndex device = stream.device_index();
  return make_stream(device, std::exchange(streams.at(static_cast<size_t>(device)), stream.id()));
}

c10::Stream default_stream(c10::DeviceIndex device) { return make_stream(device < 0 ? this_device : device, 0); }

c10::Stream pool_stream(c10::DeviceIndex device) {
  const c10::DeviceIndex index = device < 0 ? this_device : device;
  const DeviceScope scope(index);
  const std::lock_guard lock(pools_mutex);
  Pool& pool = pools.at(static_cast<size_t>(index));
  if (pool.streams.size() < kStreamsOfPool) {
    Handle created = nullptr;
    check(driver().create_stream(&created, kNonBlocking), "cuStreamCreate");
    pool.streams.push_back(reinterpret_cast<c10::StreamId>(created));
    return make_stream(index, pool.streams.back());
  }
  return make_stream(index, pool.streams[pool.next++ % kStreamsOfPool]);
}

size_t pool_size() {
  const std::lock_guard lock(pools_mutex);
  size_t count = 0;
  for (const Pool& pool : pools) {
    count += pool.streams.size();
  }
  return count;
}

void synchronize_stream(c10::Stream stream) {
  const DeviceScope scope(stream.device_index());
  check(driver().synchronize_stream(handle(stream.id())), "cuStreamSynchronize");
}

void synchronize_device(c10::DeviceIndex device) {
  const DeviceScope scope(device);
  check(driver().synchronize_context(), "cuCtxSynchronize");
}

}  // namespace torch_backend
