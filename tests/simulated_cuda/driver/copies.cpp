#include "driver/copies.h"

#include <cstring>
#include <sstream>
#include <utility>

namespace simcuda {

namespace {

// One end of a copy.
struct Place {
  Interval range;
  std::byte* bytes = nullptr;   // where the simulator's threads find it
  Context* device = nullptr;    // whose memory it is; null for host memory
  HostRange* pinned = nullptr;  // host memory that the driver knows
  History* history = nullptr;   // null for host memory that the driver does not know
};

Place device_place(Call& call, uint64_t begin, size_t bytes) {
  const Interval range{begin, begin + bytes};
  Context* owner = call.simulator.owner_of(begin);
  Allocation* allocation = owner == nullptr ? nullptr : owner->memory.find(range);
  if (allocation == nullptr) {
    std::ostringstream what;
    if (owner == nullptr) {
      what << "OUT-OF-BOUNDS: 0x" << std::hex << begin << " is no device address";
    } else {
      what << owner->memory.what_is_wrong_with(range);
    }
    call.simulator.reports.add(what.str() + ", in " + call.label());
    throw DriverError{CUDA_ERROR_INVALID_VALUE};
  }
  return {range, owner->memory.alias(begin), owner, nullptr, &allocation->history};
}

Place host_place(Call& call, uint64_t begin, size_t bytes) {
  const Interval range{begin, begin + bytes};
  if (call.simulator.owner_of(begin) != nullptr) {
    call.simulator.reports.add("OUT-OF-BOUNDS: a device address where a host address belongs, in " + call.label());
    throw DriverError{CUDA_ERROR_INVALID_VALUE};
  }
  HostRange* pinned = call.simulator.host.find(range);
  return {range, reinterpret_cast<std::byte*>(begin), nullptr, pinned, pinned ? &pinned->history : nullptr};
}

struct Ends {
  Place destination;
  Place source;

  const Place& host() const { return destination.device == nullptr ? destination : source; }
  const Place& device() const { return destination.device != nullptr ? destination : source; }
};

Ends find_ends(Call& call, const Transfer& transfer) {
  const auto place = [&](bool on_host, uint64_t begin) {
    return on_host ? host_place(call, begin, transfer.bytes) : device_place(call, begin, transfer.bytes);
  };
  return {place(transfer.direction == Direction::kToHost, transfer.destination),
          place(transfer.direction == Direction::kToDevice, transfer.source)};
}

uint64_t checksum(const std::byte* bytes, size_t size) {
  constexpr uint64_t kFactor = 0xff51afd7ed558ccd;
  uint64_t sum = size;
  size_t at = 0;
  for (; at + sizeof(uint64_t) <= size; at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, sizeof(word));
    sum = (sum ^ word) * kFactor;
    sum ^= sum >> 32;
  }
  for (; at < size; ++at) sum = (sum ^ static_cast<uint64_t>(bytes[at])) * kFactor;
  return sum;
}

void count(Context& context, Direction direction, size_t bytes) {
  const char* const names[][2] = {
      {"copies", "bytes_to_device"}, {"copies_to_host", "bytes_to_host"}, {"copies_on_device", "bytes_on_device"}};
  const auto& [copies, sum] = names[static_cast<size_t>(direction)];
  ++context.statistics[copies];
  context.statistics[sum] += static_cast<long>(bytes);
}

// The order of the copy and what it touches, and the operation that does it.
std::shared_ptr<Completion> enqueue(Call& call, Stream& stream, Direction direction, const Ends& ends,
                                    std::function<CUresult()> run) {
  const size_t bytes = ends.source.range.size();
  const auto work = stream.order(call.label(std::to_string(bytes) + " bytes"));
  RaceDetector& races = call.simulator.races;
  if (ends.source.history != nullptr) races.record(*ends.source.history, work, Access::kRead, {ends.source.range});
  if (ends.destination.history != nullptr) {
    races.record(*ends.destination.history, work, Access::kWrite, {ends.destination.range});
  }
  Context& device = *ends.device().device;
  count(device, direction, bytes);
  Operation operation;
  operation.run = std::move(run);
  operation.bytes = bytes;
  if (direction == Direction::kToDevice) operation.link = &device.to_device;
  if (direction == Direction::kToHost) operation.link = &device.to_host;
  std::shared_ptr<Completion> completion = operation.completion;
  call.enqueue(stream, std::move(operation));
  return completion;
}

std::function<CUresult()> plain_copy(const Ends& ends) {
  return [to = ends.destination.bytes, from = ends.source.bytes, bytes = ends.source.range.size()] {
    std::memmove(to, from, bytes);
    return CUDA_SUCCESS;
  };
}

// A copy that notices when its source is not what it was when the copy was enqueued.
std::function<CUresult()> checked_copy(Call& call, const Ends& ends, uint64_t expected) {
  return [to = ends.destination.bytes, from = ends.source.bytes, bytes = ends.source.range.size(), expected,
          label = call.label(), &reports = call.simulator.reports] {
    std::memcpy(to, from, bytes);
    if (checksum(to, bytes) != expected) {
      reports.add("HOST-CHANGED: the source of " + label + " changed after the copy was enqueued");
    }
    return CUDA_SUCCESS;
  };
}

bool is_pinned_for(const Place& host, const Context& context) {
  return host.pinned != nullptr &&
         (host.pinned->portability == Portability::kPortable || host.pinned->context == &context);
}

void report_pageable(Call& call, const Place& host) {
  std::string text = "PAGEABLE: " + call.label() + ": the host memory is not pinned";
  if (host.pinned != nullptr) {
    text += " for this context, only for the one that registered it";
  } else if (call.simulator.host.was_removed(host.range)) {
    text += ", USE-AFTER-UNREGISTER: it was once";
  }
  call.simulator.reports.add(text);
}

// What the host itself touches when a copy does not run behind its back.
void check_host(Call& call, Direction direction, const Place& host) {
  if (host.history == nullptr) return;
  const Access access = direction == Direction::kToDevice ? Access::kRead : Access::kWrite;
  call.simulator.races.check_host(*host.history, access, host.range, call.label());
}

}  // namespace

void copy_asynchronously(Call& call, const Transfer& transfer, CUstream handle) {
  const auto stream = call.stream(handle);
  if (transfer.bytes == 0) return;
  Ends ends = find_ends(call, transfer);
  if (transfer.direction == Direction::kOnDevice) {
    enqueue(call, *stream, transfer.direction, ends, plain_copy(ends));
    return;
  }
  if (ends.device().device != &stream->context()) {
    call.simulator.reports.add("CONTEXT: " + call.label() + " on " + stream->name() + " touches the memory of device " +
                               std::to_string(ends.device().device->device));
  }
  if (!is_pinned_for(ends.host(), stream->context())) {
    report_pageable(call, ends.host());
    check_host(call, transfer.direction, ends.host());
    const auto completion = enqueue(call, *stream, transfer.direction, ends, plain_copy(ends));
    // The source may be used again then, but the stream is not known to be done.
    if (transfer.direction == Direction::kToDevice) return call.simulator.wait(call.lock, completion);
    return call.synchronize(stream->context(), completion, stream->clock());
  }
  if (transfer.direction == Direction::kToHost || !call.simulator.settings.races) {
    enqueue(call, *stream, transfer.direction, ends, plain_copy(ends));
    return;
  }
  call.lock.unlock();
  const uint64_t expected = checksum(ends.source.bytes, transfer.bytes);
  call.lock.lock();
  ends = find_ends(call, transfer);  // another thread may have changed what is known of them
  enqueue(call, *stream, transfer.direction, ends, checked_copy(call, ends, expected));
}

void copy_and_wait(Call& call, const Transfer& transfer) {
  if (transfer.bytes == 0) return;
  const Ends ends = find_ends(call, transfer);
  check_host(call, transfer.direction, ends.host());
  const auto stream = call.stream(nullptr);
  const auto completion = enqueue(call, *stream, transfer.direction, ends, plain_copy(ends));
  call.synchronize(stream->context(), completion, stream->clock());
}

void fill_asynchronously(Call& call, CUdeviceptr destination, unsigned char value, size_t bytes, CUstream handle) {
  const auto stream = call.stream(handle);
  if (bytes == 0) return;
  const Place place = device_place(call, destination, bytes);
  const auto work = stream->order(call.label(std::to_string(bytes) + " bytes"));
  call.simulator.races.record(*place.history, work, Access::kWrite, {place.range});
  ++place.device->statistics["fills"];
  Operation operation;
  operation.run = [to = place.bytes, value, bytes] {
    std::memset(to, value, bytes);
    return CUDA_SUCCESS;
  };
  call.enqueue(*stream, std::move(operation));
}

}  // namespace simcuda
