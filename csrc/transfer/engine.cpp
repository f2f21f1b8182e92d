#include "transfer/engine.h"

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "error.h"
#include "trace/recorder.h"
#include "transfer/reader.h"
#include "transfer/schedule.h"
#include "transfer/slot_tasks.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

namespace {

// The boxes of one wave, by where they go.
struct Boxes {
  std::vector<Piece> host;
  std::map<int, std::vector<Piece>> devices;
  int64_t bytes = 0;
};

Boxes boxes_of(const Program& program, int32_t wave) {
  Boxes boxes;
  for (const size_t i : program.items_of(wave)) {
    const Transfer& transfer = program.transfers()[i];
    if (transfer.kind != Transfer::Kind::kDirect || transfer.loops.empty()) continue;
    const size_t file = program.layouts().records[program.items()[i].record].file;
    std::vector<Piece>& pieces = transfer.device == kHost ? boxes.host : boxes.devices[transfer.device];
    pieces.push_back({file, transfer.source, transfer.destination, i, transfer.loops});
    boxes.bytes += box::volume(transfer.loops);
  }
  return boxes;
}

std::vector<Policy> policies_for(const Layouts& layouts, int64_t block_bytes, int64_t run_bytes) {
  std::vector<Policy> policies;
  policies.reserve(layouts.modes.size());
  for (const io::IoMode mode : layouts.modes) {
    policies.push_back({request_cost(mode), block_bytes, mode == io::IoMode::kDirect, run_bytes});
  }
  return policies;
}

// Slots on their way to the devices of one wave.
class DeviceWave {
 public:
  DeviceWave(const Boxes& boxes, const std::vector<Policy>& policies, const CudaTargets& cuda,
             trace::Recorder* recorder)
      : cuda_(cuda), tasks_(make_slot_tasks(boxes.devices, policies, cuda.staging->slot_bytes())) {
    for (const auto& [ordinal, pieces] : boxes.devices) {
      cuda::Device& device = cuda.staging->device(ordinal);
      devices_.emplace(ordinal, &device);
      device.begin(cuda.torch_streams.at(ordinal), recorder);
    }
    // Before the first byte is written: memory may be had once somebody has given some back.
    for (const SlotTask& task : tasks_) {
      if (!task.plan.entries.empty()) devices_.at(task.device)->prepare_to_launch();
    }
  }

  size_t tasks() const { return tasks_.size(); }

  void run(size_t index, Reader& reader, Worker& worker) {
    SlotTask& task = tasks_[index];
    cuda::SlotLease slot = [&] {
      const trace::Span wait(worker.counters->recorder, "wait for slot");
      return cuda_.staging->acquire(*devices_.at(task.device));
    }();
    try {
      with_memory_errors([&] {
        slot.about_to_write(task.plan.bytes);
        task.place_at(slot.data());
        for (const Task& read : task.schedule.tasks) reader.run(task.schedule, read, worker);
        task.plan.write_descriptors(slot.data());
        trace::Span enqueue(worker.counters->recorder, "enqueue");
        enqueue.add_bytes(task.plan.bytes);
        std::move(slot).submit(*devices_.at(task.device), task.plan);
      });
    } catch (Error& error) {
      if (error.record < 0) reader.attribute(error, task.schedule.pieces.front().item);
      cuda_.staging->fail(error);
      throw;
    }
    task = {};  // the descriptions of all boxes of a load need not stay until its end
  }

  void end() {
    for (const auto& [ordinal, device] : devices_) device->end(cuda_.torch_streams.at(ordinal));
  }

 private:
  const CudaTargets& cuda_;
  std::vector<SlotTask> tasks_;
  std::map<int, cuda::Device*> devices_;
};

}  // namespace

Stats run_wave(const Program& program, int32_t wave, const Options& options, const CudaTargets& cuda,
               const std::function<bool()>& interrupted) {
  const Layouts& layouts = program.layouts();
  const Settled settled = settle(options, layouts.any_direct());
  const Boxes boxes = boxes_of(program, wave);
  const std::vector<Policy> policies = policies_for(layouts, settled.block_bytes, settled.block_bytes);
  Reader reader(program, policies);
  const Schedule schedule = join_pieces(split_boxes(boxes.host, policies), policies);
  std::optional<DeviceWave> devices;
  if (!boxes.devices.empty()) {
    if (cuda.staging == nullptr) throw std::invalid_argument("boxes for a GPU need staging");
    const int64_t slot_block = cuda.staging->block_bytes();
    devices.emplace(boxes, policies_for(layouts, std::min(slot_block, settled.block_bytes), slot_block), cuda,
                    options.recorder.get());
  }
  const size_t slots = devices ? devices->tasks() : 0;
  io::IoCounters counters = options.counters();
  try {
    run_parallel(slots + schedule.tasks.size(), settled.threads, counters, interrupted,
                 [&](size_t task, Worker& worker) {
                   if (task < slots) {
                     devices->run(task, reader, worker);
                   } else {
                     reader.run(schedule, schedule.tasks[task - slots], worker);
                   }
                 });
    if (devices) devices->end();
  } catch (...) {
    // Whoever catches this may free the destinations.
    if (devices) cuda.staging->drain();
    throw;
  }
  Stats stats;
  stats.requests = counters.requests;
  stats.bytes_read = counters.bytes;
  stats.bytes_placed = boxes.bytes;
  return stats;
}

}  // namespace dcp_fast::transfer
