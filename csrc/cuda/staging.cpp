#include "cuda/staging.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "error.h"
#include "io/buffer.h"

namespace dcp_fast::cuda {

namespace {

constexpr int64_t kMinBlock = 64 << 10;
constexpr int64_t kMaxBlock = 1 << 30;  // offsets within a slot have 32 bits
// Enough slots that reading, copying and placing overlap: a block is made smaller before there are fewer.
constexpr int64_t kWantedSlots = 4;

// With room for the descriptors of a full block, or of many small boxes in place of it, or for the rest of the pages
// that a block touches. Whole pages.
int64_t with_descriptors(int64_t block) {
  constexpr auto kPage = static_cast<int64_t>(io::kDirectAlignment);
  return (block + std::max(block / 64, 3 * kPage) + kPage - 1) / kPage * kPage;
}

int64_t settle_block(int64_t memory, int64_t block) {
  const int64_t affordable = memory / kWantedSlots * 64 / 65 / kMinBlock * kMinBlock;
  return std::clamp(std::min(block, affordable), kMinBlock, kMaxBlock);
}

}  // namespace

Staging::Staging(int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes)
    : block_bytes_(settle_block(std::min(pinned_bytes, device_bytes), block_bytes)),
      slot_bytes_(static_cast<size_t>(with_descriptors(block_bytes_))),
      slots_(std::max<size_t>(1, static_cast<size_t>(std::min(pinned_bytes, device_bytes)) / slot_bytes_)),
      users_(slots_) {
  for (size_t slot = 0; slot < slots_; ++slot) order_.push_back(slot);
}

Staging::~Staging() {
  drain();
  if (devices_.empty()) return;
  try {
    const CurrentContext current(devices_.begin()->second.context());
    memory_.reset();
  } catch (...) {  // the context is broken
    memory_.reset();
  }
}

int64_t Staging::pinned_bytes() const { return memory_ ? static_cast<int64_t>(slots_ * slot_bytes_) : 0; }

int64_t Staging::device_bytes() const {
  int64_t most = 0;
  for (const auto& [ordinal, device] : devices_) most = std::max(most, device.staging_bytes());
  return most;
}

Device& Staging::device(int ordinal) {
  const auto found = devices_.try_emplace(ordinal, ordinal, slots_, slot_bytes_).first;
  Device& device = found->second;
  if (!memory_) device.in_context([this] { memory_ = std::make_unique<PinnedMemory>(slots_ * slot_bytes_); });
  return device;
}

SlotLease Staging::acquire() {
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  returned_.wait(lock, [this] { return !order_.empty() || error_; });
  if (error_) throw Error(*error_);
  SlotLease lease(*this, order_.front());
  order_.pop_front();
  lock.unlock();
  wait(lease.slot());
  lock.lock();
  slot_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return lease;
}

void Staging::fail(const Error& error) {
  const std::scoped_lock lock(mutex_);
  if (!error_) error_ = error;
  returned_.notify_all();
}

void Staging::wait(size_t slot) {
  if (users_[slot] == nullptr) return;
  users_[slot]->wait(slot);
  users_[slot] = nullptr;
}

void Staging::submit(size_t slot, Device& device, const SlotPlan& plan) {
  users_[slot] = &device;
  device.submit(slot, memory_->data() + slot * slot_bytes_, plan);
  const std::scoped_lock lock(mutex_);
  order_.push_back(slot);
  returned_.notify_one();
}

void Staging::give_back(size_t slot) {
  const std::scoped_lock lock(mutex_);
  order_.push_front(slot);
  returned_.notify_one();
}

void Staging::synchronize(const std::map<int, StreamHandle>& torch_streams, const std::function<bool()>& interrupted) {
  for (auto& [ordinal, device] : devices_) {
    const auto stream = torch_streams.find(ordinal);
    if (stream != torch_streams.end()) device.synchronize(stream->second, interrupted);
  }
  for (size_t slot = 0; slot < slots_; ++slot) wait(slot);
}

void Staging::drain() noexcept {
  for (auto& [ordinal, device] : devices_) device.drain();
}

DeviceStats Staging::take_stats() {
  DeviceStats stats;
  for (auto& [ordinal, device] : devices_) stats.join(device.take_stats());
  return stats;
}

double Staging::take_slot_seconds() {
  const std::scoped_lock lock(mutex_);
  return std::exchange(slot_seconds_, 0);
}

SlotLease::SlotLease(SlotLease&& other) noexcept
    : staging_(std::exchange(other.staging_, nullptr)), slot_(other.slot_) {}

SlotLease::~SlotLease() {
  if (staging_ != nullptr) staging_->give_back(slot_);
}

std::byte* SlotLease::data() const { return staging_->memory_->data() + slot_ * staging_->slot_bytes_; }

void SlotLease::about_to_write(size_t bytes) const {
  if (driver().simcuda_host_write != nullptr) driver().simcuda_host_write(data(), bytes, "reader");
}

void SlotLease::submit(Device& device, const SlotPlan& plan) && {
  std::exchange(staging_, nullptr)->submit(slot_, device, plan);
}

}  // namespace dcp_fast::cuda
