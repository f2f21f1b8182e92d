#include "cuda/pinned_ring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "cuda/numa.h"

namespace dcp_fast::cuda {

namespace {

constexpr int64_t kMinBlock = 64 << 10;
constexpr int64_t kMaxBlock = 1 << 30;  // offsets within a slot have 32 bits
// Reading, copying and placing overlap with this many slots. Where memory is short, blocks become smaller first.
constexpr int64_t kWantedSlots = 4;

// The size of a slot: a block, and room for its descriptors or for the rest of the pages that it touches. It is a
// multiple of the system's pages, since each slot is pinned on its own.
int64_t with_descriptors(int64_t block) {
  constexpr auto kPageBytes = static_cast<int64_t>(io::kPageBytes);
  const int64_t page = std::max<int64_t>(kPageBytes, ::sysconf(_SC_PAGESIZE));
  return (block + std::max(block / 64, 3 * kPageBytes) + page - 1) / page * page;
}

int64_t affordable_block(int64_t memory, int64_t block) {
  const int64_t affordable = memory / kWantedSlots * 64 / 65 / kMinBlock * kMinBlock;
  return std::clamp(std::min(block, affordable), kMinBlock, kMaxBlock);
}

}  // namespace

PinnedRing::PinnedRing(int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes)
    : block_bytes_(affordable_block(std::min(pinned_bytes, device_bytes), block_bytes)),
      slot_bytes_(static_cast<size_t>(with_descriptors(block_bytes_))),
      slots_(std::max<size_t>(1, static_cast<size_t>(std::min(pinned_bytes, device_bytes)) / slot_bytes_)) {
  for (size_t slot = slots_.size(); slot-- > 0;) fresh_.push_back(slot);
}

PinnedRing::~PinnedRing() {
  drain();
  if (devices_.empty()) return;
  try {
    const CurrentContext current(devices_.begin()->second.context());
    slots_.clear();
  } catch (...) {  // the context is broken
    slots_.clear();
  }
}

int64_t PinnedRing::pinned_bytes() const {
  const std::scoped_lock lock(mutex_);
  return static_cast<int64_t>(pinned_ * slot_bytes_);
}

int64_t PinnedRing::device_bytes() const {
  int64_t most = 0;
  for (const auto& [ordinal, device] : devices_) most = std::max(most, device.staging_bytes());
  return most;
}

Device& PinnedRing::device(int ordinal) {
  const size_t bytes = slots_.size() * slot_bytes_;
  std::byte* ring = memory_.reserve(bytes);
#ifdef MADV_DONTFORK
  // After a fork the first write to a page may move it away from where devices read it.
  static_cast<void>(::madvise(ring, bytes, MADV_DONTFORK));
#endif
  return devices_.try_emplace(ordinal, ordinal, slots_.size(), slot_bytes_).first->second;
}

void PinnedRing::prepare(int ordinal) {
  Device& device = this->device(ordinal);
  device.prepare_to_launch();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!fresh_.empty() && pin_one(device, lock)) {
    }
    if (error_) throw Error(*error_);
  }
  device.wait_for_kernel();
}

SlotLease PinnedRing::acquire(Device& device) {
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    returned_.wait(lock, [this] { return !order_.empty() || !fresh_.empty() || error_; });
    if (error_) throw Error(*error_);
    // A slot that is pinned already and still in the cache is filled sooner than a fresh one.
    if (fresh_.empty() || (!order_.empty() && is_done(order_.front()))) break;
    pin_one(device, lock);
  }
  SlotLease lease(*this, order_.front());
  order_.pop_front();
  lock.unlock();
  wait(lease.slot());
  lock.lock();
  slot_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return lease;
}

// Pins a fresh slot, and does not hold the lock meanwhile. Returns false if the driver refuses. The ring then consists
// of the slots that are pinned already, and the refusal is an error only if there are none.
bool PinnedRing::pin_one(Device& device, std::unique_lock<std::mutex>& lock) {
  const size_t slot = fresh_.back();
  fresh_.pop_back();
  ++pinning_;
  lock.unlock();
  std::optional<Error> refusal;
  try {
    pin(slot, device);
  } catch (const Error& error) {
    refusal = error;
    refusal->device = -1;  // all devices share the ring
  }
  lock.lock();
  --pinning_;
  if (!refusal) {
    ++pinned_;
    order_.push_front(slot);
    returned_.notify_one();
    return true;
  }
  fresh_.clear();
  const bool hopeless = pinned_ == 0 && pinning_ == 0;
  if (!error_ && (hopeless || refusal->kind != ErrorKind::kCudaRefused)) error_ = refusal;
  returned_.notify_all();
  return false;
}

void PinnedRing::pin(size_t slot, Device& device) {
  std::byte* memory = memory_.reserve(0) + slot * slot_bytes_;
  prefer_node(memory, slot_bytes_, device.numa_node());
  device.in_context([&] { slots_[slot].memory = std::make_unique<PinnedMemory>(memory, slot_bytes_); });
}

void PinnedRing::fail(const Error& error) {
  const std::scoped_lock lock(mutex_);
  if (!error_) error_ = error;
  returned_.notify_all();
}

bool PinnedRing::is_done(size_t slot) { return slots_[slot].user == nullptr || slots_[slot].user->is_done(slot); }

void PinnedRing::wait(size_t slot) {
  if (slots_[slot].user == nullptr) return;
  slots_[slot].user->wait(slot);
  slots_[slot].user = nullptr;
}

void PinnedRing::submit(size_t slot, Device& device, const SlotPlan& plan) {
  slots_[slot].user = &device;
  device.submit(slot, slots_[slot].memory->data(), plan);
  const std::scoped_lock lock(mutex_);
  order_.push_back(slot);
  returned_.notify_one();
}

void PinnedRing::give_back(size_t slot) {
  const std::scoped_lock lock(mutex_);
  order_.push_front(slot);
  returned_.notify_one();
}

void PinnedRing::synchronize(const std::map<int, StreamHandle>& torch_streams,
                             const std::function<bool()>& interrupted) {
  for (auto& [ordinal, device] : devices_) {
    const auto stream = torch_streams.find(ordinal);
    if (stream != torch_streams.end()) device.synchronize(stream->second, interrupted);
  }
  for (size_t slot = 0; slot < slots_.size(); ++slot) wait(slot);
}

void PinnedRing::drain() noexcept {
  for (auto& [ordinal, device] : devices_) device.drain();
}

DeviceStats PinnedRing::take_stats() {
  DeviceStats stats;
  for (auto& [ordinal, device] : devices_) stats.join(device.take_stats());
  return stats;
}

double PinnedRing::take_slot_seconds() {
  const std::scoped_lock lock(mutex_);
  return std::exchange(slot_seconds_, 0);
}

SlotLease::SlotLease(SlotLease&& other) noexcept : ring_(std::exchange(other.ring_, nullptr)), slot_(other.slot_) {}

SlotLease::~SlotLease() {
  if (ring_ != nullptr) ring_->give_back(slot_);
}

std::byte* SlotLease::data() const { return ring_->slots_[slot_].memory->data(); }

void SlotLease::about_to_write(size_t bytes) const {
  if (driver().simcuda_host_write != nullptr) driver().simcuda_host_write(data(), bytes, "reader");
}

void SlotLease::submit(Device& device, const SlotPlan& plan) && {
  std::exchange(ring_, nullptr)->submit(slot_, device, plan);
}

}  // namespace dcp_fast::cuda
