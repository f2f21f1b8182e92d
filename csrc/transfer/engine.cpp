#include "transfer/engine.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "error.h"
#include "trace/recorder.h"
#include "transfer/node.h"
#include "transfer/reader.h"
#include "transfer/schedule.h"
#include "transfer/slot_tasks.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

namespace {

Boxes boxes_of(const Program& program, int32_t wave) {
  Boxes boxes;
  for (const size_t i : program.items_in_wave(wave)) {
    const Transfer& transfer = program.transfers()[i];
    if (transfer.kind != Transfer::Kind::kDirect) continue;
    const copy::Conversion* conversion = transfer.conversion ? &*transfer.conversion : nullptr;
    if (transfer.loops.empty()) {
      if (conversion != nullptr && !conversion->same_dtype) ++boxes.converted;
      continue;
    }
    const size_t file = program.layouts().records[program.items()[i].record].file;
    boxes.add(transfer.device, {file, transfer.source, transfer.destination, i, transfer.loops, conversion});
  }
  return boxes;
}

Attribute attribution(const Program& program) {
  return [&program](Error& error, size_t item) {
    error.item = static_cast<int64_t>(item);
    program.layouts().attribute(error, program.items()[item].record);
  };
}

// What all waves of a run have in common.
struct Run {
  Run(const io::ByteSources& byte_sources, const Options& options, const CudaTargets& targets)
      : sources(byte_sources),
        limits(limits_of(options, io::access_of(sources))),
        cuda(targets),
        recorder(options.recorder.get()),
        policies(policies_for(sources, limits, options.mapped)),
        shared(io::access_of(sources).shared) {
    if (cuda.ring == nullptr) return;
    const int64_t block = cuda.ring->block_bytes();
    slot_policies = policies;
    for (Policy& policy : slot_policies) {
      policy.block_bytes = std::min(policy.block_bytes, block);
      policy.run_bytes = block;
      policy.fills_blocks = false;  // a slot is filled, in whatever blocks
    }
  }

  const io::ByteSources& sources;
  const Limits limits;
  const CudaTargets& cuda;
  trace::Recorder* recorder;
  std::vector<Policy> policies;       // for boxes on the host
  std::vector<Policy> slot_policies;  // for boxes on devices
  const bool shared;                  // with other ranks of the node
  const Node node = node_of_this_process();
};

int64_t bytes_of(const Task& task) { return task.range.end - task.range.begin; }

// Boxes that are placed in any order, as tasks: slots on their way to devices first, then boxes for the host.
class Wave {
 public:
  Wave(Boxes boxes, Attribute attribute, Run& run)
      : run_(run),
        reader_(run.sources, run.policies, std::move(attribute)),
        bytes_(boxes.bytes),
        converted_(boxes.converted) {
    host_ = join_pieces(split_boxes(std::move(boxes.host), run.policies), run.policies);
    if (run.shared) begin_at_own_place(host_.tasks, run.node, bytes_of);
    if (boxes.devices.empty()) return;
    cuda::PinnedRing* ring = run.cuda.ring;
    if (ring == nullptr) throw std::invalid_argument("boxes for a GPU need a pinned ring");
    slots_ = make_slot_tasks(boxes.devices, run.slot_policies, ring->slot_bytes());
    if (run.shared) {
      begin_at_own_place(slots_, run.node, [](const SlotTask& slot) {
        int64_t bytes = 0;
        for (const Task& task : slot.schedule.tasks) bytes += bytes_of(task);
        return bytes;
      });
    }
    for (const auto& [ordinal, pieces] : boxes.devices) devices_.emplace(ordinal, &ring->device(ordinal));
    // This comes before the first byte is written, so that a load that runs out of device memory can be tried again.
    std::set<int> launching;
    for (const SlotTask& task : slots_) {
      if (!task.plan.entries.empty()) launching.insert(task.device);
    }
    for (const int ordinal : launching) devices_.at(ordinal)->prepare_to_launch();
  }

  int64_t bytes() const { return bytes_; }
  int64_t converted() const { return converted_; }
  size_t tasks() const { return slots_.size() + host_.tasks.size(); }

  void work(size_t task, Worker& worker) {
    if (task < slots_.size()) {
      fill(slots_[task], worker);
    } else {
      reader_.run(host_, host_.tasks[task - slots_.size()], worker);
    }
  }

  // What is written from here on waits for the work that torch has enqueued.
  void begin() {
    for (const auto& [ordinal, device] : devices_) device->begin(run_.cuda.torch_streams.at(ordinal), run_.recorder);
  }
  // What torch enqueues from here on waits for what was written.
  void end() {
    for (const auto& [ordinal, device] : devices_) device->end(run_.cuda.torch_streams.at(ordinal));
  }

 private:
  void fill(SlotTask& task, Worker& worker) {
    cuda::Device& device = *devices_.at(task.device);
    cuda::SlotLease slot = [&] {
      const trace::Span wait(worker.counters->recorder, "wait for slot");
      return run_.cuda.ring->acquire(device);
    }();
    try {
      with_memory_errors([&] {
        slot.about_to_write(task.plan.bytes);
        if (task.device == run_.cuda.received.device) {
          take_from_device(task);
        } else {
          task.place_at(slot.data());
          for (const Task& read : task.schedule.tasks) reader_.run(task.schedule, read, worker);
        }
        task.plan.write_descriptors(slot.data());
        trace::Span enqueue(worker.counters->recorder, "enqueue");
        enqueue.add_bytes(task.plan.bytes);
        std::move(slot).submit(device, task.plan);
      });
    } catch (Error& error) {
      if (error.record < 0) reader_.attribute(error, task.schedule.pieces.front().item);
      run_.cuda.ring->fail(error);
      throw;
    }
    task = {};  // its memory is not needed until the end of the load
  }

  void take_from_device(SlotTask& task) const {
    std::vector<cuda::DeviceAddress> sources;
    std::vector<uint32_t> sizes;
    for (const Piece& piece : task.schedule.pieces) {
      const int64_t bytes = box::volume(piece.loops);
      if (box::source_span(piece.loops) != bytes) throw std::logic_error("what was received is not packed");
      sources.push_back(run_.cuda.received.address + static_cast<cuda::DeviceAddress>(piece.source));
      sizes.push_back(static_cast<uint32_t>(bytes));
    }
    task.plan.take_from_device(sources, sizes);
  }

  Run& run_;
  Reader reader_;
  const int64_t bytes_;
  const int64_t converted_;
  std::vector<SlotTask> slots_;
  std::map<int, cuda::Device*> devices_;
  Schedule host_;
};

constexpr size_t kWavesAtOnce = 2;

Stats run_waves(const std::vector<std::unique_ptr<Wave>>& waves, Run& run, const Options& options,
                const std::function<bool()>& interrupted, const std::function<void(size_t)>& placed) {
  io::IoCounters counters = options.counters();
  Stats stats;
  Groups groups;
  for (const auto& wave : waves) {
    const size_t number = groups.tasks.size();
    groups.after.push_back(number < kWavesAtOnce ? 0 : number + 1 - kWavesAtOnce);
    groups.tasks.push_back(wave->tasks());
    stats.bytes_placed += wave->bytes();
    stats.converted_items += wave->converted();
  }
  groups.finish = [&](size_t index) {
    waves[index]->end();
    if (placed) placed(index);
    if (index + kWavesAtOnce < waves.size()) waves[index + kWavesAtOnce]->begin();
  };
  try {
    for (size_t i = 0; i < std::min(kWavesAtOnce, waves.size()); ++i) waves[i]->begin();
    run_parallel(groups, run.limits.threads, counters, interrupted,
                 [&](size_t wave, size_t task, Worker& worker) { waves[wave]->work(task, worker); });
  } catch (...) {
    // Whoever catches this may free the destinations.
    if (run.cuda.ring != nullptr) run.cuda.ring->drain();
    throw;
  }
  stats.requests = counters.requests;
  stats.bytes_read = counters.bytes;
  stats.bytes_mapped = counters.mapped_bytes;
  stats.unmapped = counters.unmapped;
  return stats;
}

}  // namespace

void Boxes::add(int device, Piece piece) {
  bytes += box::volume(piece.loops);
  if (piece.conversion != nullptr && !piece.conversion->same_dtype) ++converted;
  (device == kHost ? host : devices[device]).push_back(std::move(piece));
}

Stats run_boxes(Boxes boxes, const io::ByteSources& sources, const Attribute& attribute, const Options& options,
                const CudaTargets& cuda, const std::function<bool()>& interrupted) {
  Run run(sources, options, cuda);
  std::vector<std::unique_ptr<Wave>> waves;
  waves.push_back(std::make_unique<Wave>(std::move(boxes), attribute, run));
  return run_waves(waves, run, options, interrupted, {});
}

Stats run_wave(const Program& program, int32_t wave, const Options& options, const CudaTargets& cuda,
               const std::function<bool()>& interrupted) {
  return run_boxes(boxes_of(program, wave), program.layouts().sources, attribution(program), options, cuda,
                   interrupted);
}

int64_t bytes_to_read(const Program& program, const Options& options) {
  const io::ByteSources& sources = program.layouts().sources;
  const CudaTargets no_devices;
  const Run run(sources, options, no_devices);
  const Schedule schedule = join_pieces(split_boxes(boxes_of(program, 0).host, run.policies), run.policies);
  int64_t bytes = 0;
  io::OpenSource open;
  const Task* before = nullptr;
  for (const Task& task : schedule.tasks) {
    const size_t file = task.range.file;
    if (before == nullptr || before->range.file != file) open = io::OpenSource(*sources[file]);
    before = &task;
    const auto add = [&](int64_t begin, int64_t end) {
      bytes += run.policies[file].bytes_of_request(begin, end, open.get()->size());
    };
    if (task.count > 1) {
      add(task.range.begin, task.range.end);
    } else {
      const Piece& piece = schedule.pieces[task.first];
      each_request(run.policies[file], piece.loops, 0, piece.source, add);
    }
  }
  return bytes;
}

Stats run_programs(const std::vector<const Program*>& programs, const Options& options, const CudaTargets& cuda,
                   const std::function<bool()>& interrupted, const std::function<void(size_t)>& placed) {
  if (programs.empty()) return {};
  const Layouts& layouts = programs.front()->layouts();
  Run run(layouts.sources, options, cuda);
  std::vector<std::unique_ptr<Wave>> waves;
  for (const Program* program : programs) {
    if (&program->layouts() != &layouts || program->waves() != 1) {
      throw std::invalid_argument("programs that run together have one wave each, of the same layouts");
    }
    waves.push_back(std::make_unique<Wave>(boxes_of(*program, 0), attribution(*program), run));
  }
  return run_waves(waves, run, options, interrupted, placed);
}

}  // namespace dcp_fast::transfer
